"""Phases 2 and 3: train the arms that start at random, then those that start from the teacher or a control of it."""

import time

from .arms import train_phase, trained_models
from .phase1_teacher import metric_file
from .run import Run


def run_phase2(run: Run) -> None:
    """Make phase2/ARM for every arm with random initialisation, unless all are there already."""
    _run(run, 2, run.hashes(run.activations / "manifest.json", metric_file(run)))


def run_phase3(run: Run) -> None:
    """Make phase3/ARM for every arm that a teacher initialises, unless all are there already."""
    made = (run.phase(1) / name for name in ("concepts.json", "geometry.safetensors", "teacher.safetensors"))
    _run(run, 3, run.hashes(run.activations / "manifest.json", *made))


def _run(run: Run, phase: int, inputs: dict[str, str]) -> None:
    if run.provenance.is_done(phase, run.config, inputs, trained_models(run, phase), run.force):
        run.say(f"phase {phase}: done before")
        return
    run.require_done(1)
    started = time.monotonic()
    train_phase(run, phase)
    run.finish(phase, inputs, started)
