"""The published commands and the study that chose the quickstart's options."""

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


TINY = [
    "run.threads=1",
    "corpus.max_tokens=3000", "corpus.context_length=128", "corpus.split=[0.4, 0.3, 0.3]",
    "geometry.permutations=100",
    "concepts.max_parents=4", "concepts.max_children_per_parent=6", "concepts.split=[0.5, 0.2, 0.3]",
    "concepts.min_test_rows=1", "hsae.n_parents=16", "hsae.topk_parent=4", "hsae.topk_child_total=4",
    "hsae.n_children_per_parent=4", "hsae.subspace_dim=4", "training.batch_size=64",
    "training.baseline.stages=[{name: train, steps: 2}]", "training.teacher.stages=[{name: adapt, steps: 2}]",
    "eval.bootstrap=100", "eval.lm_contexts=1", "eval.steering.max_concepts=1", "eval.steering.contexts=1",
    "eval.steering.context_length=4",
]  # fmt: skip


def test_the_study_of_the_quickstarts_options(tmp_path):
    settings = [part for setting in TINY for part in ("--set", setting)]
    study = EXPERIMENTS / "choose_quickstart.py"
    for part, hooks, rows in (("model", "", 9), ("hook", "model.layers.3", 11)):
        answer = script(study, "--out", tmp_path, "--part", part, "--hooks", hooks, *settings)
        assert answer.code == 0, answer.err
        lines = (tmp_path / f"{part}.md").read_text().splitlines()
        assert len(lines) == 2 + rows
        columns = {line.count("|") for line in lines}
        assert columns == {13}, columns
        assert lines[2] in answer.out
