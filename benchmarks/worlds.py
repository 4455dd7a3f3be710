"""How often is the decision on a hierarchy right? Worlds in which the answer is known (docs/method.md, section 3).

    python benchmarks/worlds.py --out FOLDER [--draws 200] [--curve-draws 40] [--workers 2]

Writes worlds.json, worlds.md and worlds.svg: the share of draws in which `hierarchy_decision` calls a hierarchy, world
by world at one signal, and as a curve over signals. Draws have the seeds 0 to DRAWS - 1; the rule was chosen on seeds
from 50,000. Exit code 1 if the true world is called in less than 95 % of the draws, any other in more than 5 %, or the
published angle criterion fails to pass somewhere.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from scipy.stats import beta as beta_distribution

from polytope_hsae.fileio import write_json, write_text
from polytope_hsae.geometry.worlds import WORLDS, WorldSize, try_world
from polytope_hsae.report.palette import LIGHT, LINE_STYLES, SERIES
from polytope_hsae.report.svg import Frame, draw

SIGNAL, SIGNALS = 0.4, (0.05, 0.1, 0.15, 0.2, 0.25, 0.26, 0.27, 0.28, 0.29, 0.3, 0.4, 0.5)
ALPHA, LEAST_POWER, MOST_FALSE = 0.01, 0.95, 0.05
Job = tuple[str, float, int]


def answer(job: Job) -> dict[str, Any]:
    """One draw of (world, signal, seed), with the tests as passed or not."""
    name, signal, seed = job
    found = try_world(name, signal, WorldSize(), seed, ALPHA)
    tests = {test: result["passes"] for test, result in found["tests"].items()}
    return {"hierarchy": found["hierarchy"], "angle_passes": found["angle_passes"], "tests": tests}


def rate(passed: Iterable[bool]) -> dict[str, Any]:
    """Share with its exact 95 % interval (Clopper and Pearson)."""
    values = list(passed)
    n, hits = len(values), sum(values)
    low = float(beta_distribution.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(beta_distribution.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return {"share": hits / n, "ci95": [low, high], "draws": n}


def summarised(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of draws in which hierarchy is called, the angle passes, and each test passes."""
    return {
        "hierarchy": rate(draw["hierarchy"] for draw in found),
        "angle_passes": rate(draw["angle_passes"] for draw in found),
        "tests": {test: sum(draw["tests"][test] for draw in found) / len(found) for test in found[0]["tests"]},
    }


def picture(curve: dict[str, list[float]]) -> str:
    """Share of draws called a hierarchy, over the signal."""

    def paint(axes: Axes) -> None:
        for number, (name, shares) in enumerate(curve.items()):
            colour = LIGHT[list(SERIES)[number % len(SERIES)]]
            axes.plot(
                SIGNALS, shares, color=colour, linestyle=LINE_STYLES[number % 4], label=name.replace("_", " "),
                marker="o", markersize=3, clip_on=False,
            )  # fmt: skip
        axes.set_ylim(0, 1)
        axes.grid(axis="y")
        axes.set_xlabel("signal, length of the parent's direction (a word's noise: 1)")
        axes.set_title("share of draws called a hierarchy")
        axes.legend(loc="center right")

    said = "; ".join(f"{name}: {', '.join(f'{share:.0%}' for share in shares)}" for name, shares in curve.items())
    words = f"At signals {', '.join(map(str, SIGNALS))}: {said}"
    return draw("worlds", "Decisions by world and signal", words, Frame(2.4, 0.6), paint).standalone


def table(worlds: dict[str, Any]) -> str:
    """The main result as Markdown."""
    tests = list(worlds["noise"]["tests"])
    lines = [f"| world | called | 95 % | angle passes | {' | '.join(tests)} |", "| --- " * (4 + len(tests)) + "|"]
    for name, found in worlds.items():
        called, shares = found["hierarchy"], found["tests"].values()
        interval = " to ".join(f"{bound:.1%}" for bound in called["ci95"])
        rest = " | ".join(f"{share:.1%}" for share in shares)
        lines.append(f"| {name} | {called['share']:.1%} | {interval} | {found['angle_passes']['share']:.1%} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--curve-draws", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    main_jobs = list(product(WORLDS, [SIGNAL], range(options.draws)))
    curve_jobs = list(product(WORLDS, SIGNALS, range(options.draws, options.draws + options.curve_draws)))
    context = get_context("forkserver")
    with ProcessPoolExecutor(options.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        done = dict(zip(main_jobs + curve_jobs, workers.map(answer, main_jobs + curve_jobs, chunksize=4), strict=True))
    worlds = {name: summarised([done[job] for job in main_jobs if job[0] == name]) for name in WORLDS}
    curve = {
        name: [
            sum(done[job]["hierarchy"] for job in curve_jobs if job[:2] == (name, signal)) / options.curve_draws
            for signal in SIGNALS
        ]
        for name in WORLDS
    }
    right = worlds["hierarchy"]["hierarchy"]["share"] >= LEAST_POWER
    right &= all(found["hierarchy"]["share"] <= MOST_FALSE for name, found in worlds.items() if name != "hierarchy")
    right &= all(found["angle_passes"]["share"] == 1.0 for found in worlds.values())
    document = {
        "alpha": ALPHA, "signal": SIGNAL, "size": asdict(WorldSize()), "meaning": WORLDS, "worlds": worlds,
        "curve": {"signals": SIGNALS, "draws": options.curve_draws, "called": curve},
        "stated": {"true_at_least": LEAST_POWER, "false_at_most": MOST_FALSE, "holds": right},
    }  # fmt: skip
    write_json(options.out / "worlds.json", document)
    write_text(options.out / "worlds.svg", picture(curve))
    size = ", ".join(f"{name} {value}" for name, value in asdict(WorldSize()).items())
    said = "It does." if right else "It does not."
    text = (
        f"Signal {SIGNAL}, alpha {ALPHA}; {size}.\n\n{table(worlds)}\n\nStated: the true world is called in at least "
        f"{LEAST_POWER:.0%} of the draws, any other in at most {MOST_FALSE:.0%}, and the angle passes in all. {said}\n"
    )
    write_text(options.out / "worlds.md", text)
    print(text)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
