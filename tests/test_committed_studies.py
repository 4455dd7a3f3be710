"""The studies in the repository: their tables and pages are those of their records, whatever has changed since."""

import shutil
from pathlib import Path

import pytest
from running import hsae

STUDIES = Path(__file__).parents[1] / "studies"
MADE = {"table.md": ("study", "table"), "results.md": ("findings", "write")}
COMMITTED = sorted(folder for folder in STUDIES.iterdir() if any((folder / name).is_file() for name in MADE))


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
