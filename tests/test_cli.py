"""The command line: help, schema, concepts, overrides, and one line for bad input."""

import json
import os
import signal
import subprocess
import sys
import warnings
from typing import Any

import pytest
from pydantic_core import to_jsonable_python
from running import SMOKE, files, hsae, refused

from polytope_hsae import __version__
from polytope_hsae.completion import field_paths
from polytope_hsae.config import load_config
from polytope_hsae.data.concepts import Concepts
from polytope_hsae.fileio import read_json
from polytope_hsae.phases import phase4_evaluate

COMMANDS = ("run", "phase1", "phase2", "phase3", "phase4", "report", "evaluate", "concepts", "doctor", "config-schema")

PROGRAM = """
import sys
sys.argv = ["hsae", *sys.argv[1:]]
from polytope_hsae.cli import main
try:
    main()
finally:
    slow = [name for name in ("torch", "transformers", "numpy", "sklearn") if name in sys.modules]
    print("slow imports:", slow)
"""


def fast(*arguments: str, **environment: str) -> str:
    """What `hsae` prints in a new process, which must not have imported anything slow."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    out, slow = answer.stdout.split("slow imports: ")
    assert slow == "[]\n"
    return out


def test_help_is_fast():
    out = fast("-h")
    for command in COMMANDS:
        assert f" {command} " in out


def test_version_and_help():
    assert hsae().out == hsae("-h").out  # without a command
    assert set(json.loads(hsae("config-schema").out)["properties"]) >= {"run", "hsae", "arms"}
    assert hsae("--version") == (0, f"hsae {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run"], ["Missing argument 'CONFIG'"]),
        (["run", "smoke", "--bogus"], ["No such option: --bogus"]),
        (["run", "smoke", "--out"], ["--out", "requires an argument"]),
        (["run", "smoke", "quickstart"], ["unexpected extra argument", "quickstart"]),
        (["run", "smoke", "--seed", "x"], ["--seed", "integer"]),
        (["sing"], ["No such command 'sing'"]),
        (["evaluate"], ["Missing argument 'MODEL_DIR...'"]),
        (["evaluate", "model", "--split", "train"], ["--split", "'train'", "val", "test"]),
    ],
)
def test_a_misspelt_command_is_one_line(arguments, words):
    refused(hsae(*arguments), *words)


# -- completion


def bash(line: str) -> dict[str, str]:
    """The environment in which bash asks for what may come at the end of a command line."""
    return {"_HSAE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}


def test_configs_and_fields_are_completed(tmp_path, monkeypatch):
    def complete(line: str) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in bash(line).items():
                patch.setenv(name, value)
            return hsae().out.split()

    (tmp_path / "mine.yaml").write_text("run: {name: mine}\narms: [{name: baseline}, {name: other}]\n")
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    packaged = ["factored", "jax-compat", "quickstart", "recommended", "smoke", "v2-focused"]
    assert complete("hsae run ") == [*packaged, "mine.yaml"]
    assert complete("hsae phase2 sm") == ["smoke"]
    assert complete(f"hsae concepts {tmp_path}/m") == [f"{tmp_path}/mine.yaml"]
    assert complete("hsae run smoke --set training.lo") == ["training.log_every="]
    fields = complete("hsae run mine.yaml --seed 1 --set arms.1.")
    assert {"arms.1.name=", "arms.1.init="} <= set(fields)
    assert complete("hsae run mine.yaml --set arms.2.") == []
    assert complete("hsae run no-such-config --set training.lo") == ["training.log_every="]
    assert complete("hsae evaluate model --split t") == ["test"]


def test_completion_is_fast():
    assert fast(**bash("hsae run smoke --set model.d")) == "model.dtype=\n"


def test_every_field_that_is_offered_can_be_set():
    config = load_config("quickstart")
    paths = [path for path, _ in field_paths(config)]
    assert len(paths) == len(set(paths)) > 100
    for path in paths:
        value: Any = config
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else getattr(value, part)
        assert load_config("quickstart", [f"{path}={json.dumps(to_jsonable_python(value))}"]) == config


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["phase2", "smoke", "--set", "training.lr=fast"], ["training.lr: found 'fast', allowed: "]),
        (["run", "smoke", "--device", "abacus"], ["run.device: found 'abacus', allowed: auto, cpu"]),
        (["run", "smoke", "--device", "cuda:99"], ["run.device: found 'cuda:99', allowed: "]),
        (["concepts", "smoke", "--set", "concepts.split=[1, 1, 1]"], ["concepts.split: found [1", "sum 1"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, arguments, words):
    refused(hsae(*arguments, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_concepts_prints_the_tree_with_counts(finished):
    made = Concepts.from_json(json.loads((finished / "phase1/concepts.json").read_text()))
    answer = hsae("concepts", "smoke")
    assert answer.code == 0, answer.err
    assert all(f"{parent.name} (" in answer.out for parent in made.parents)
    assert hsae("concepts", "smoke", "--out", finished).out == answer.out
    assert hsae("concepts", "smoke", "--seed", "1").code == 2  # it has no such option
    document = hsae("concepts", "smoke", "--json")
    found = json.loads(document.out)
    assert {key: value for key, value in found.items() if key != "checks"} == made.to_json()
    assert found["checks"] == json.loads((finished / "phase1/checks.json").read_text())
    assert document.err == ""


# -- documents for programs, silence, interruption


@pytest.mark.parametrize("command", ["run", "phase4"])
def test_json_is_one_document_on_standard_output(finished, command):
    before = files(finished)
    answer = hsae(command, *SMOKE, "--out", finished, "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == read_json(finished / "phase4/results.json")
    assert "phase 4: done before" in answer.err
    assert "Targets" in answer.err
    quiet = hsae(command, *SMOKE, "--out", finished, "--json", "--quiet")
    assert quiet == (0, answer.out, "")
    assert hsae(command, *SMOKE, "--out", finished, "--quiet") == (0, "", "")
    assert files(finished) == before


def test_evaluate_prints_a_table_or_a_document(finished):
    before = files(finished)
    models = [finished / "phase2/flat_topk/model", finished / "phase3/teacher/model"]
    table = hsae("evaluate", *models, "--split", "test")
    assert table.code == 0, table.err
    for words in ("flat_topk/model", "teacher/model", "test split", "purity"):
        assert words in " ".join(table.out.split())
    compared = json.loads(hsae("evaluate", models[1], "--split", "val", "--json", "--device", "cpu").out)
    assert compared["run"]["split"] == "val"
    assert [model["path"] for model in compared["models"].values()] == [str(models[1])]
    assert files(finished) == before


def test_quiet_hides_warnings(finished, monkeypatch):
    monkeypatch.setattr(phase4_evaluate, "print_results", lambda run: warnings.warn("few rows", stacklevel=1))
    assert hsae("phase4", *SMOKE, "--out", finished).err == "warning: few rows\n"
    assert hsae("phase4", *SMOKE, "--out", finished, "--quiet").err == ""


def test_sigterm_interrupts_as_ctrl_c_does(finished, monkeypatch):
    def terminate(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    mine = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        monkeypatch.setattr(phase4_evaluate, "print_results", terminate)
        answer = hsae("phase4", *SMOKE, "--out", finished)
        assert (answer.code, answer.err) == (130, "interrupted\n")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, mine)
