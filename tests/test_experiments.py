"""The published commands."""

from pathlib import Path

import pytest
from running import SMOKE, files, script

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPTS = {
    "phase1_teacher_extraction.py": ["phase 1: done before"],
    "phase2_baseline_hsae.py": ["phase 2: done before"],
    "phase3_teacher_hsae.py": ["phase 3: done before"],
    "phase4_evaluation.py": ["phase 4: done before", "Targets"],
    "run_all_phases.py": ["phase 1: done before", "phase 4: done before", "Targets"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_published_commands_are_those_of_hsae(finished, name):
    before = files(finished)
    answer = script(EXPERIMENTS / name, "--config", *SMOKE, "--out", finished)
    assert answer.code == 0, answer.err
    for words in SCRIPTS[name]:
        assert words in answer.out
    assert files(finished) == before
