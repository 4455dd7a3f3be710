"""The studies in the repository: their tables and pages are those of their records, whatever has changed since."""

import shutil
from pathlib import Path

import pytest
from running import hsae

from polytope_hsae.study.results import Results, mean, read_results

STUDIES = Path(__file__).parents[1] / "studies"
MADE = {"table.md": ("study", "table"), "results.md": ("findings", "write")}
STUDIED = sorted(path.parent for path in STUDIES.glob("*/study.yaml"))
COMMITTED = [folder for folder in STUDIED if any((folder / name).is_file() for name in MADE)]


def test_some_are_committed():
    assert COMMITTED


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_page_is_remade_from_its_records(folder, tmp_path):
    out = tmp_path / folder.name
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.md", "*.svg", "*.html", "results"))
    name = next(name for name in MADE if (folder / name).is_file())
    command = ("synthetic", "table") if folder.name.startswith("synthetic") else MADE[name]
    text = (folder / name).read_text()
    split = ("--test",) if "; test values" in text or "; test documents" in text else ()
    answer = hsae(*command, out, *split)
    assert answer.code == 0, answer.err
    assert (out / name).read_text() == text


def test_the_page_of_findings_is_remade_from_its_records(tmp_path):
    out, docs = tmp_path / "evidence", STUDIES.parent / "docs"
    shutil.copytree(STUDIES / "evidence", out)
    answer = hsae("findings", "write", out, "--page", tmp_path / "results.md", "--test")
    assert answer.code == 0, answer.err
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        path.name for path in (docs / "results").iterdir()
    }


def ev_and_ce(results: Results, arm: str, hook: str, l0: int) -> str:
    found = next(found for found in results.found if found.cell == (arm, hook, l0))
    return " / ".join(f"{mean(found.spread('test', name)):.3f}" for name in ("ev", "ce_recovered"))


def test_the_readme_says_what_the_records_say():
    results = read_results(STUDIES / "win")
    lines = iter((STUDIES.parent / "README.md").read_text().splitlines())
    rows = []
    for line in lines:
        if line.startswith("| hook, L0 "):
            next(lines)
            rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in iter(lambda: next(lines), "")]
    asked = [
        (arm, hook, l0)
        for hook in results.study.hooks
        for arm in ("recommended", "recommended-loose")
        for l0 in results.study.l0
        if l0 in results.study.arm(arm).l0
    ]
    assert len(asked) == 10
    for (first, *cells), (ours, hook, l0) in zip(rows, asked, strict=True):
        assert first.split(",")[-1].strip().split()[-1] == str(l0)
        flat = {"BatchTopK": "batchtopk", "BatchTopK-aux": "batchtopk-aux", "JumpReLU": "jumprelu"}[
            cells[1].split()[-1]
        ]
        evs = {
            found.cell.arm: mean(found.spread("test", "ev"))
            for found in results.found
            if found.cell[1:] == (hook, l0) and found.kind != "hsae"
        }
        assert flat == max(evs, key=evs.__getitem__)
        cells[1] = cells[1].removesuffix(cells[1].split()[-1]).strip()
        assert cells == [ev_and_ce(results, arm, hook, l0) for arm in (ours, flat, "matryoshka", "published-routing")]
