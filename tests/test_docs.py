"""Every Python block and `hsae` command of README.md and docs/ runs, on the finished smoke run as the quickstart's.

A line `<!-- test: skip WHY -->` above a block leaves it out. The Python blocks of one page share one namespace.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml
from running import ARMS, SMOKE, hsae

from polytope_hsae.sweep.plan import SweepArm

ROOT = Path(__file__).parents[1]
RECORDS = {"LOG.md", "LOG-speed.md", "method.md", "design.md", "results.md"}  # what was done and how, not guides
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in RECORDS)]
SWEEP = ROOT / "docs" / "guides" / "sweep.md"
TWO_ARMS = ("--set", f"arms={json.dumps([arm for arm in ARMS if arm['name'] in ('baseline', 'teacher')])}")
BLOCK = re.compile(r"(<!-- test: skip [^>]*-->\n)?```(\w+)\n(.*?)```", flags=re.DOTALL)
TEXT = "\n\n".join(f"The farmer fed the horse and the dog by the river. It was day {day}." for day in range(400))


def blocks(page: Path, kind: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for skip, language, text in found if language == kind and not skip]


def commands(*pages: Path) -> list[str]:
    """The `hsae` lines of pages, in order."""
    lines = [line for page in pages for text in blocks(page, "bash") for line in text.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("hsae ")]


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """The working directory of a reader who has run the quickstart."""
    shutil.copytree(finished, tmp_path / "runs" / "quickstart")
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    shutil.copy(ROOT / "polytope_hsae" / "data" / "ontology-example.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(folder, page):
    namespace: dict[str, object] = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), namespace)


@pytest.mark.parametrize("command", sorted(set(commands(*[page for page in PAGES if page != SWEEP]))))
def test_hsae_commands_run(folder, command):
    """`quickstart` becomes the smoke config, another language model a tiny one; a run of its own has two arms."""
    arguments: list[str] = []
    for part in shlex.split(command)[1:]:
        if part == "quickstart":
            arguments += SMOKE
        elif part.startswith("model.name="):
            arguments.append(f"model.name={tiny.save_family(folder / 'model', 'llama')}")
        else:
            arguments.append(part)
    if command.startswith("hsae run"):
        arguments += TWO_ARMS if "--out" in arguments else ("--out", "runs/quickstart")
    answer = hsae(*arguments)
    assert answer.code == 0, answer.err
    assert answer.out


def test_guide_to_sweeps_runs(tmp_path, monkeypatch):
    """Its example, then the arm that it adds: only that arm's runs are made, and the table has all three."""
    monkeypatch.chdir(tmp_path)
    first, added, others = blocks(SWEEP, "yaml")
    assert [SweepArm.model_validate(arm).kind for arm in yaml.safe_load(others)] == ["hsae", "batchtopk"]
    study = Path(first.splitlines()[0].removeprefix("# "))
    study.parent.mkdir()
    study.write_text(first, encoding="utf-8")
    made: list[int] = []
    for command in commands(SWEEP):
        if "--only" in command:
            study.write_text(first + added, encoding="utf-8")
        answer = hsae(*shlex.split(command)[1:])
        assert answer.code == 0, answer.err
        made.append(len((study.parent / "runs.jsonl").read_text(encoding="utf-8").splitlines()))
    assert made[0] == 6  # two arms x two learning rates, and the better one with the other seed
    assert made[-1] == 9
    table = (study.parent / "table.md").read_text(encoding="utf-8")
    assert all(f"| {arm} |" in table for arm in ("hsae", "topk", "batchtopk"))


def test_cli_page_has_every_command_of_help():
    listed = re.findall(r"^│ ([a-z][\w-]*)  ", hsae("--help").out, flags=re.MULTILINE)
    page = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]("<!-- command tables -->")
    titles = re.findall(r"^## hsae ([\w-]+)", page, flags=re.MULTILINE)
    assert {"run", "sweep", "doctor"} <= set(listed)
    assert set(listed) == set(titles)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page):
    for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pytest.mark.parametrize("command, does", [("make demo", "hsae run quickstart"), ("make test", "pytest")])
def test_make_targets_do_what_the_readme_says(command, does):
    shown = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert does in shown.stdout
