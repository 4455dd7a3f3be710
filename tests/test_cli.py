"""The command line: help, schema, concepts, overrides, and one line for bad input."""

import json
import subprocess
import sys

import pytest
from running import hsae, refused

from polytope_hsae.data.concepts import Concepts

HELP = """
import sys
sys.argv = ["hsae", "-h"]
from polytope_hsae.cli import main
try:
    main()
finally:
    slow = [name for name in ("torch", "transformers", "numpy", "sklearn") if name in sys.modules]
    print("slow imports:", slow)
"""


def test_help_is_fast():
    answer = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0
    assert answer.stderr == ""
    assert "slow imports: []" in answer.stdout
    for command in ("run", "phase1", "phase2", "phase3", "phase4", "concepts", "config-schema"):
        assert f" {command} " in answer.stdout


def test_every_command_has_help():
    for command in ("run", "phase1", "phase2", "phase3", "phase4", "concepts", "config-schema"):
        answer = hsae(command, "-h")
        assert answer.code == 0
        assert "Usage" in answer.out


def test_the_schema_describes_every_field():
    answer = hsae("config-schema")
    assert answer.code == 0
    schema = json.loads(answer.out)
    blocks = {"Config": schema, **schema["$defs"]}
    assert len(blocks) > 10
    fields = [(block, name, field) for block, body in blocks.items() for name, field in body["properties"].items()]
    assert len(fields) > 80
    assert [(block, name) for block, name, field in fields if not field.get("description")] == []


@pytest.mark.parametrize(
    "settings, words",
    [
        (["run", "no-such-config"], ["config: found 'no-such-config'", "quickstart, smoke, v2-focused"]),
        (["run", "smoke", "--set", "training.lr"], ["--set: found 'training.lr', allowed: key.path=value"]),
        (["run", "smoke", "--set", "training.lrr=1"], ["training.lrr: found an unknown key, allowed: ", "lr"]),
        (["phase1", "smoke", "--set", "training.lr=.nan"], ["training.lr: found nan, allowed: "]),
        (["phase2", "smoke", "--set", "training.lr=fast"], ["training.lr: found 'fast', allowed: "]),
        (["run", "smoke", "--set", "hsae.topk_parent=33"], ["topk_parent: found 33, allowed: at most n_parents = 32"]),
        (
            ["run", "smoke", "--set", "training.baseline.stages=[{name: train, steps: 7}]"],
            ["training stages: found steps", "'baseline': 7", "'teacher': 24", "allowed: the same number of steps"],
        ),
        (["run", "smoke", "--seed", "-1"], ["run.seed: found -1, allowed: "]),
        (["run", "smoke", "--device", "abacus"], ["run.device: found 'abacus', allowed: auto, cpu"]),
        (["run", "smoke", "--device", "cuda:99"], ["run.device: found 'cuda:99', allowed: "]),
        (["concepts", "smoke", "--set", "concepts.split=[1, 1, 1]"], ["concepts.split: found [1", "sum 1"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, settings, words):
    refused(hsae(*settings, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_concepts_prints_the_tree_with_counts(finished):
    made = Concepts.from_json(json.loads((finished / "phase1/concepts.json").read_text()))
    answer = hsae("concepts", "smoke")
    assert answer.code == 0, answer.err
    assert f"{made.n_parents} parents" in answer.out
    assert f"{made.n_children} children" in answer.out
    for parent in made.parents:
        assert parent.name in answer.out
        for child in parent.children:
            assert child.name in answer.out
    assert hsae("concepts", "smoke", "--out", finished).out == answer.out
    assert hsae("concepts", "smoke", "--seed", "1").code == 2  # it has no such option
