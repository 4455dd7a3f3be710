"""The README's picture of studies/win: how far each arm is from BatchTopK, and how many latents are dead.

python scripts/plot_win.py studies/win docs/win.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, StrMethodFormatter
from polytope_hsae.study.results import Result, Results, difference, mean, read_results

from polytope_hsae.report.palette import LIGHT

REFERENCE = "batchtopk"
LOOSE = "recommended-loose"  # drawn apart: where it is not run it would be the same
ARMS = {
    "recommended": ("H-SAE", LIGHT["s1"], 2.4),
    "batchtopk": ("BatchTopK", LIGHT["s3"], 1.4),
    "batchtopk-aux": ("BatchTopK, auxiliary loss", LIGHT["s6"], 1.4),
    "jumprelu": ("JumpReLU", LIGHT["s4"], 1.4),
    "topk": ("TopK", LIGHT["s2"], 1.4),
    "matryoshka": ("Matryoshka", LIGHT["s5"], 1.4),
}


def cells(results: Results, arm: str, hook: str) -> list[Result]:
    """An arm's results at a hook, by rising L0."""
    found = [result for result in results.found if (result.cell.arm, result.cell.hook) == (arm, hook)]
    return sorted(found, key=lambda result: result.cell.l0)


def dead_share(result: Result) -> float:
    """Dead latents among all of them, %; in the mean over seeds."""
    parents, children = (result.spread("usage", f"dead_{level}") for level in ("parents", "children"))
    if children is None:
        return 100 * mean(parents)
    per_parent = result.records[min(result.records)]["config"]["n_children_per_parent"]
    return 100 * (mean(parents) + per_parent * mean(children)) / (1 + per_parent)


def short(hook: str) -> str:
    """A hook's name in a title."""
    return hook.split("_pre_")[0].replace("_", " ")


def plot_lead(axes: Axes, results: Results, hook: str) -> None:
    """EV minus BatchTopK's, in points, paired by seed; bars are deviations over seeds."""
    references = cells(results, REFERENCE, hook)
    for arm, (_, colour, width) in ARMS.items():
        gaps = [
            difference(result, other, "test", "ev")
            for result, other in zip(cells(results, arm, hook), references, strict=True)
        ]
        values = [100 * mean(gap) for gap in gaps]
        bars = [100 * (gap.sd or 0.0) for gap in gaps if gap is not None]  # none of them is: `mean` has seen to that
        axes.errorbar(results.study.l0, values, bars, color=colour, linewidth=width, marker="o", markersize=4)
    for result in cells(results, LOOSE, hook):
        reference = next(other for other in references if other.cell.l0 == result.cell.l0)
        gap, (_, colour, _) = difference(result, reference, "test", "ev"), ARMS["recommended"]
        label = f"H-SAE, busiest parent on in {100 * mean(result.spread('hierarchy', 'max_firing_rate')):.0f} % of rows"
        axes.plot(
            result.cell.l0, 100 * mean(gap), color=colour, marker="o", fillstyle="none", linestyle="", label=label
        )
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.set_title(f"EV, points from BatchTopK: {short(hook)}", loc="left", fontsize=10)


def plot_dead(axes: Axes, results: Results, hook: str) -> None:
    """Latents that are never on in 1,048,576 train rows, % of all."""
    for arm, (name, colour, width) in ARMS.items():
        shares = [dead_share(result) for result in cells(results, arm, hook)]
        axes.plot(results.study.l0, shares, color=colour, linewidth=width, marker="o", markersize=4, label=name)
    axes.set_title(f"Dead latents, %: {short(hook)}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    results = read_results(args.study)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    final, middle = results.study.hooks
    figure, (left, centre, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    plot_lead(left, results, final)
    plot_lead(centre, results, middle)
    plot_dead(right, results, final)
    for axes in (left, centre, right):
        axes.set_xscale("log")
        axes.set_xticks(results.study.l0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("L0, active latents of a row")
        axes.grid(color=LIGHT["line"], linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(args.out, dpi=160, metadata={"Software": None})
    print(args.out)


if __name__ == "__main__":
    main()
