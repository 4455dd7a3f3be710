"""All four phases in order, and the report on them."""

import time

from ..report.build import write_report
from ..units import duration, size
from .phase1_teacher import run_phase1
from .phase4_evaluate import run_phase4
from .run import Run
from .training_phases import run_phase2, run_phase3

PHASES = {1: run_phase1, 2: run_phase2, 3: run_phase3, 4: run_phase4}


def run_all(run: Run) -> None:
    """Every phase that is not done yet, then the table of targets and the report."""
    started = time.monotonic()
    for run_phase in PHASES.values():
        run_phase(run)
    report = write_report(run.folder)
    run.say(f"report: {report} ({size(report.stat().st_size)})")
    run.say(f"all phases: done in {duration(time.monotonic() - started)}")
