"""Every Python block and `hsae` command of README.md and docs/ runs, on the finished smoke run as the quickstart's.

A line `<!-- test: skip WHY -->` above a block leaves it out. The Python blocks of one page share one namespace.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from running import SMOKE, hsae

ROOT = Path(__file__).parents[1]
RECORDS = {"LOG.md", "LOG-speed.md", "method.md", "design.md", "results.md"}  # what was done and how, not guides
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in RECORDS)]
BLOCK = re.compile(r"(<!-- test: skip [^>]*-->\n)?```(\w+)\n(.*?)```", flags=re.DOTALL)
TEXT = "\n\n".join(f"The farmer fed the horse and the dog by the river. It was day {day}." for day in range(400))


def blocks(page: Path, kind: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for skip, language, text in found if language == kind and not skip]


def commands() -> list[str]:
    lines = [line for page in PAGES for text in blocks(page, "bash") for line in text.splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines if line.startswith("hsae ")})


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


@pytest.mark.parametrize("command", commands())
def test_hsae_commands_run(folder, command):
    """`quickstart` becomes the smoke config, another language model a tiny one."""
    arguments: list[str] = []
    for part in shlex.split(command)[1:]:
        if part == "quickstart":
            arguments += SMOKE
        elif part.startswith("model.name="):
            arguments.append(f"model.name={tiny.save_family(folder / 'model', 'llama')}")
        else:
            arguments.append(part)
    if command.startswith("hsae run") and "--out" not in arguments:
        arguments += ["--out", "runs/quickstart"]
    answer = hsae(*arguments)
    assert answer.code == 0, answer.err
    assert answer.out


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
