"""Phase 3: train the arms that start from the teacher, and its controls."""

import time

from .arms import train_phase, trained_models
from .run import Run


def run_phase3(run: Run) -> None:
    """Make phase3/ARM for every arm that a teacher initialises, unless all are there already."""
    made = (run.phase(1) / name for name in ("concepts.json", "geometry.safetensors", "teacher.safetensors"))
    inputs = run.hashes(run.activations / "manifest.json", *made)
    if run.provenance.is_done(3, run.config, inputs, trained_models(run, 3), run.force):
        run.say("phase 3: done before")
        return
    run.require_done(1)
    started = time.monotonic()
    train_phase(run, 3)
    run.finish(3, inputs, started)
