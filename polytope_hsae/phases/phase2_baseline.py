"""Phase 2: train the arms that start at random, the baseline and the flat models."""

import time

from .arms import train_phase, trained_models
from .phase1_teacher import metric_file
from .run import Run


def run_phase2(run: Run) -> None:
    """Make phase2/ARM for every arm with random initialisation, unless all are there already."""
    inputs = run.hashes(run.activations / "manifest.json", metric_file(run))
    if run.provenance.is_done(2, run.config, inputs, trained_models(run, 2), run.force):
        run.say("phase 2: done before")
        return
    run.require_done(1)
    started = time.monotonic()
    train_phase(run, 2)
    run.finish(2, inputs, started)
