"""The README's picture from a finished run: is the hierarchy there, and what does the teacher change?

python scripts/plot_quickstart.py runs/quickstart docs/quickstart.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from polytope_hsae.fileio import read_json

INK, GREY, BLUE, AMBER = "#222222", "#9aa0a6", "#2b6cb0", "#c2701c"
VARIANTS = (
    ("main", "WordNet", BLUE),
    ("pseudo_parents", "pseudo-parents", AMBER),
    ("shuffled_rows", "shuffled rows", GREY),
)
ARMS = (
    ("baseline", "baseline", GREY),
    ("flat_batchtopk", "BatchTopK", GREY),
    ("teacher", "teacher", BLUE),
    ("permuted_teacher", "permuted\nteacher", AMBER),
)


def plot_shared_parent(axes: Axes, evidence: dict) -> None:
    """One dot per parent: z of the shared-parent statistic, beside its controls."""
    for row, (key, _, colour) in enumerate(VARIANTS):
        z = np.array([value for value in evidence[key]["parents"]["z"] if value is not None])
        jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(z))
        axes.scatter(z, row + jitter, s=14, color=colour, alpha=0.8, linewidths=0)
        axes.text(
            1.0,
            row + 0.42,
            f"{(z > 3).mean():.0%} above 3",
            color=colour,
            ha="right",
            va="center",
            transform=axes.get_yaxis_transform(),
            fontsize=8,
        )
    axes.axvline(3, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(VARIANTS)), [name for _, name, _ in VARIANTS])
    axes.set_ylim(len(VARIANTS) - 0.4, -0.6)
    axes.set_xlabel("z of a parent's shared direction")
    axes.set_title("Siblings share a parent direction", loc="left", fontsize=10)


def plot_arms(axes: Axes, results: dict, metric: str, title: str) -> None:
    """A metric of every arm with its 95 % interval and the chance level."""
    shown = [(label, results["arms"][arm][metric], colour) for arm, label, colour in ARMS if arm in results["arms"]]
    for column, (_, found, colour) in enumerate(shown):
        low, high = found["ci95"]
        axes.plot([column, column], [low, high], color=colour, linewidth=2)
        axes.scatter([column], [found["value"]], color=colour, s=36, zorder=3)
    chance = shown[0][1]["chance"]
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
    axes.text(-0.45, chance, "chance", fontsize=8, va="bottom", color=INK)
    axes.set_xticks(range(len(shown)), [label for label, _, _ in shown], fontsize=8)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_title(title, loc="left", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    evidence = read_json(args.run / "phase1" / "evidence.json")
    results = read_json(args.run / "phase4" / "results.json")
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "text.color": INK,
            "svg.hashsalt": "polytope",
        }
    )
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=[1.4, 1, 1], layout="constrained"
    )
    plot_shared_parent(left, evidence)
    plot_arms(middle, results, "purity", "Purity on held-out words")
    plot_arms(right, results, "leakage", "Leakage on held-out words")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=160, metadata={"Software": None})
    print(args.out)


if __name__ == "__main__":
    main()
