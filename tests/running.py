"""Running `hsae` in tests: in this process, or in a process that can be killed; and looking at run folders.

Killable processes are forked from a server that has imported PyTorch already, which saves seconds for each.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from polytope_hsae.cli import main

ARMS: list[dict[str, Any]] = [
    {"name": "baseline"},
    {"name": "flat_topk", "kind": "topk", "match": {"l0": "baseline"}},
    {"name": "teacher", "init": "teacher"},
    {"name": "permuted_teacher", "init": "permuted_teacher"},
    {
        "name": "frozen",
        "init": "teacher",
        "teacher": {"anchor": "frozen"},
        "hsae": {"l1_parent": 1e-3, "l1_child": 1e-3, "biorth_lambda": 1e-4},
    },
]
# One thread: two that wait for each other are several times slower where other processes share the cores.
SMOKE = ("smoke", "--set", "run.threads=1", "--set", f"arms={json.dumps(ARMS)}")
TEACHER_ARMS = [arm for arm in ARMS if "init" in arm]
OF_TIME = {"provenance.json", "report.html"}  # the files that hold times and versions

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["polytope_hsae.phases.run_all", "transformers.models.llama.modeling_llama"])


class Answer(NamedTuple):
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def hsae(*arguments: object) -> Answer:
    """Run the command line in this process."""
    return _answer([str(part) for part in arguments], main)


def script(path: Path, *arguments: object) -> Answer:
    """Run a Python file as `python PATH ARGUMENTS` does, in this process."""
    texts = [str(part) for part in arguments]
    return _answer(texts, lambda: runpy.run_path(str(path), run_name="__main__"), str(path))


def _answer(arguments: list[str], call: Callable[[], object], program: str = "hsae") -> Answer:
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    sys.argv, code = [program, *arguments], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    finally:
        sys.argv = before[0]
        torch.set_num_threads(before[1])
        torch.use_deterministic_algorithms(before[2])
    return Answer(code, out.getvalue(), err.getvalue())


def start(log: Path, *arguments: object) -> multiprocessing.process.BaseProcess:
    """Run the command line in a process of its own; its output goes to `log`."""
    process = processes.Process(target=_run, args=(str(log), [str(part) for part in arguments]))
    process.start()
    return process


def _run(log: str, arguments: list[str]) -> None:
    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["hsae", *arguments]
    main()


def refused(answer: Answer, *words: str) -> None:
    """The answer is exit code 2 and one line that has all these words."""
    assert answer.code == 2, answer
    assert answer.err.startswith("error: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert "Traceback" not in answer.err
    missing = [word for word in words if word not in answer.err]
    assert not missing, (missing, answer.err)


def files(folder: Path, *parts: str) -> dict[str, tuple[str, int]]:
    """(sha256, mtime in ns) of all files below `folder` (or below parts of it) by relative path."""
    found = {}
    for top in [folder / part for part in parts] or [folder]:
        for path in sorted(top.rglob("*") if top.is_dir() else [top]):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(folder).as_posix()] = (digest, path.stat().st_mtime_ns)
    return found


def contents(folder: Path, *parts: str) -> dict[str, str]:
    """sha256 of all files but those that hold times."""
    return {name: digest for name, (digest, _) in files(folder, *parts).items() if name not in OF_TIME}


def without_cards(found: dict[str, Any]) -> dict[str, Any]:
    """What `files` or `contents` found, but for the models' cards, to which phase 4 adds what it measured."""
    return {name: state for name, state in found.items() if not name.endswith("model/card.json")}


def copy(run: Path, target: Path, phases: int = 4) -> Path:
    """A copy of a finished run folder as it was when only the first phases were done."""
    shutil.copytree(run, target)
    for phase in range(phases + 1, 5):
        shutil.rmtree(target / f"phase{phase}")
    if phases < 4:
        (target / "report.html").unlink()
        shutil.rmtree(target / "figures")
    path = target / "provenance.json"
    record = json.loads(path.read_text())
    record["phases"] = {f"phase{phase}": record["phases"][f"phase{phase}"] for phase in range(1, phases + 1)}
    path.write_text(json.dumps(record))
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["phase"] <= phases]
    (target / "metrics.jsonl").write_text("".join(kept))
    return target
