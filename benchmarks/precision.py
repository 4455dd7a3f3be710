"""Does bf16 train as float32 does? The factored form's baseline, the same start and batches, in every precision.

    python benchmarks/precision.py --out FOLDER [--steps 1000] [--device auto] [--set key=value]

On a GPU bf16, tf32 and float32, and float32 with another order of the rows as a scale for the distances; on a CPU,
where all precisions are float32, that twice, for which every distance is 0. Writes precision.json, precision.md and
precision.svg. The distance is the largest one between the curves of the loss, each averaged over windows of 25 steps,
as a share of float32's. Exit code 1 if bf16 was measured and is further away than LIMIT.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from polytope_hsae.bench.run import device_of
from polytope_hsae.bench.shapes import NEVER
from polytope_hsae.config import load_config
from polytope_hsae.data.stream import RowStream
from polytope_hsae.fileio import write_json, write_text
from polytope_hsae.phases.arms import initial_model, validation_metrics
from polytope_hsae.phases.phase1_teacher import run_phase1
from polytope_hsae.phases.run import Run
from polytope_hsae.provenance import environment
from polytope_hsae.report.palette import LIGHT, SERIES
from polytope_hsae.report.svg import Frame, draw
from polytope_hsae.training.trainer import HSAETrainer

WINDOW, LIMIT = 25, 0.01
BASE = "float32"


def train(run: Run, precision: str, steps: int, seed: int) -> dict[str, Any]:
    """The loss of every step, and validation EV at the end; `seed` is that of the order of the rows."""
    config = run.config
    arm = config.arm("baseline")
    stage = config.arm_stages(arm)[-1].model_copy(update={"steps": steps})
    quiet = {"precision": precision, "log_every": NEVER, "val_every": NEVER, "checkpoint_every": NEVER}
    training = config.training.model_copy(update=quiet)
    model = initial_model(run, arm, run.store)
    trainer = HSAETrainer(model, RowStream(run.store, "train", training.batch_size, seed), [stage], training)
    losses = [trainer.train_step(stage)()["loss"].detach().clone() for _ in range(steps)]
    return {
        "precision": precision,
        "seed": seed,
        "loss": torch.stack(losses).tolist(),
        **validation_metrics(run, model, run.store),
    }


def smooth(losses: list[float]) -> torch.Tensor:
    """Means of windows of WINDOW steps (of all of them where there are fewer)."""
    window = min(WINDOW, len(losses))
    return torch.tensor(losses[: len(losses) // window * window], dtype=torch.float64).view(-1, window).mean(1)


def distance(losses: list[float], base: list[float]) -> float:
    """The largest distance of the smoothed curves, as a share of `base`."""
    return float(((smooth(losses) - smooth(base)) / smooth(base)).abs().max())


def picture(curves: dict[str, dict[str, Any]], steps: int) -> str:
    """Smoothed curves less float32's, in per cent of it."""

    def paint(axes: Axes) -> None:
        base = smooth(curves[BASE]["loss"])
        at = torch.linspace(0, steps, len(base) + 1)[1:]
        for (name, curve), colour in zip(curves.items(), SERIES, strict=False):
            share = 100 * (smooth(curve["loss"]) - base) / base
            axes.plot(at, share, color=LIGHT[colour], label=name)
        axes.grid(axis="y")
        axes.set_xlabel("optimiser step")
        axes.set_title("loss, per cent above float32's")
        axes.legend(loc="best")

    said = "; ".join(f"{name} {distance(curve['loss'], curves[BASE]['loss']):.2%}" for name, curve in curves.items())
    return draw(
        "precision", "Training loss by precision", f"Largest distance: {said}", Frame(2.2, 0.6), paint
    ).standalone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="run folder, kept for the next time; default: OUT/run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    device = device_of(options.device)
    run = Run(load_config("factored", [*options.overrides, f"run.device={device}"]), options.run or options.out / "run")
    run_phase1(run)
    seed = run.config.run.seed
    names = {"bf16": "bf16", "tf32": "tf32", BASE: BASE} if device == "cuda" else {BASE: BASE, "float32 again": BASE}
    plans = {name: (precision, seed) for name, precision in names.items()}
    if device == "cuda":
        plans["float32, rows in another order"] = (BASE, seed + 1)
    curves = {name: train(run, *plan[:1], options.steps, plan[1]) for name, plan in plans.items()}
    found = {name: distance(curve["loss"], curves[BASE]["loss"]) for name, curve in curves.items()}
    document = {
        "environment": environment(device), "config": run.config.model_dump(mode="json"), "steps": options.steps,
        "window": WINDOW, "limit": LIMIT, "largest_distance": found, "curves": curves,
    }  # fmt: skip
    write_json(options.out / "precision.json", document)
    write_text(options.out / "precision.svg", picture(curves, options.steps))
    lines = [f"{document['environment']['device']}, {options.steps} steps, windows of {WINDOW}.", ""]
    lines += ["| training | last loss | largest distance from float32 | validation EV |", "| --- | --- | --- | --- |"]
    for name, curve in curves.items():
        last = float(smooth(curve["loss"])[-1])
        lines.append(f"| {name} | {last:.5g} | {found[name]:.3%} | {curve['val_ev']:.4f} |")
    within = found["bf16"] <= LIMIT if "bf16" in found else None
    answer = {True: "It does.", False: "It does not.", None: "On a CPU bf16 was not measured."}[within]
    lines += ["", f"Stated: bf16 stays within {LIMIT:.0%} of float32. {answer}"]
    write_text(options.out / "precision.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(1 if within is False else 0)


if __name__ == "__main__":
    main()
