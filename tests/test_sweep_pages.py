"""hsae sweep table and page: from the files alone, and words that follow the numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import contents, hsae, refused
from sweeps import CONCEPTS, HOOKS, records, rewrite, run, written

from polytope_hsae.evaluation.bootstrap import Units, paired
from polytope_hsae.sweep.records import pack_units, short_evidence, unpack_units
from polytope_hsae.sweep.summary import pooled

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def concepts(tmp_path_factory, fixtures) -> Path:
    """The folder of a finished sweep with a teacher. Read only."""
    folder = tmp_path_factory.mktemp("concepts")
    answer = run(written(folder, CONCEPTS), folder / "out", fixtures)
    assert answer.code == 0, answer.err
    return folder / "out"


def copied(folder: Path, to: Path, found: list[dict[str, Any]] | None = None) -> Path:
    """A copy of a sweep's files with these records."""
    to.mkdir(exist_ok=True)
    for name in ("study.yaml", "hooks.json"):
        (to / name).write_text((folder / name).read_text())
    rewrite(to, records(folder) if found is None else found)
    return to


def page(folder: Path) -> str:
    answer = hsae("sweep", "page", folder)
    assert answer.code == 0, answer.err
    return (folder / "page.md").read_text()


def table(folder: Path, *more: str) -> str:
    answer = hsae("sweep", "table", folder, *more)
    assert answer.code == 0, answer.err
    return (folder / "table.md").read_text()


@pytest.mark.parametrize("name", ["win", "evidence", "evidence-small", "synthetic", "synthetic-small"])
def test_a_committed_table_is_remade_from_its_records(name, tmp_path):
    studied, there = ROOT / "studies" / name, ROOT / "docs" / "results" / f"{name}.md"
    there = there if there.is_file() else studied / "table.md"
    for file in ("study.yaml", "runs.jsonl", "hooks.json"):
        if (studied / file).is_file():
            (tmp_path / file).write_bytes((studied / file).read_bytes())
    split = ["--test"] if there.parent.name == "results" else []
    assert table(tmp_path, *split) == there.read_text()


def test_the_committed_page_is_remade_from_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [f"studies/{name}" for name in ("win", "evidence", "synthetic")]
    answer = hsae("sweep", "page", *names, "--page", tmp_path / "results.md", "--test")
    assert answer.code == 0, answer.err
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    assert contents(tmp_path / "results") == contents(ROOT / "docs" / "results")
    assert len((tmp_path / "results.md").read_text().split()) <= 4000


def test_seeds_change_the_models_and_not_the_data(concepts):
    one, other = (record for record in records(concepts) if (record["arm"], record["hook"]) == ("baseline", HOOKS[0]))
    assert one["data_sha256"] == other["data_sha256"]
    metrics = [found["val"]["metrics"] for found in (one, other)]
    assert metrics[0]["ce_clean"] == metrics[1]["ce_clean"]  # the same documents
    assert metrics[0]["ev"] != metrics[1]["ev"]
    keys = [found["val"]["units"]["purity"]["keys"] for found in (one, other)]
    assert keys[0] == keys[1]  # the same concepts


def test_a_grid_has_the_tables_of_its_sizes(grid, tmp_path):
    text = table(copied(grid, tmp_path))
    main, hierarchy, trials = (
        [line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n| arm ")[1:]
    )
    assert [len(part) for part in (main, hierarchy, trials)] == [4, 3, 6]  # a head of two; arms; two rates each
    for record in records(grid):
        if record["seed"] == 0:
            start = f"| {record['arm']} | {record['lr']:g} | {record['val']['metrics']['ev']['value']:.4f} "
            assert any(line.startswith(start) for line in trials)
    nested = next(line for line in main if line.startswith("| nested"))
    assert nested.split("|")[2].strip() == "64"
    assert "(topk)" in nested
    assert "no flat arm" in nested  # none has as few atoms
    shown = page(tmp_path)
    assert "hierarchical arms are ahead of the best flat arm in" in shown
    assert shown.count(".svg)") == 2
    refused(hsae("sweep", "table", tmp_path, "--test"), "test values", "--test")


@pytest.mark.parametrize("l0, mark", [(3.95, ""), (3.90, " †")])
def test_a_difference_that_is_not_at_matched_l0_is_marked(grid, tmp_path, l0, mark):
    found = records(grid)
    for record in found:
        record["val"]["metrics"]["l0"]["value"] = l0 if record["arm"] == "nested" else 4.0
    text = table(copied(grid, tmp_path, found))
    nested = next(line for line in text.splitlines() if line.startswith("| nested"))
    assert f"(topk){mark} |" in nested


def planted(
    concepts: Path, to: Path, purity: dict[str, float], units: int = 8, lacking: tuple[str, int] | None = None
) -> Path:
    """A copy with these purities by arm, and values that meet the other targets but for the control.

    lacking: hook and seed where three concepts have no purity.
    """
    found = records(concepts)
    for record in found:
        good = record["arm"] == "teacher"
        value = {
            "purity": purity.get(record["arm"], 0.2),
            "leakage": 0.5 if good else 0.9,
            "leakage_all_rows": 0.6 if good else 0.9,
            "steering_leakage": 0.1 if good else 0.4,
            "fvu": 0.3,
        }
        jitter = 1e-3 * np.arange(units)
        for name, number in value.items():
            numerator = (number + jitter).tolist()
            record["val"]["units"][name] = {"keys": list(range(units)), "numerator": numerator}
        if lacking == (record["hook"], record["seed"]):
            record["val"]["units"]["purity"]["numerator"][5:] = [None] * 3
    return copied(concepts, to, found)


def test_the_words_follow_the_numbers(concepts, tmp_path):
    good = page(planted(concepts, tmp_path, {"teacher": 0.6}))
    assert f"at 2 of 2 hooks: {HOOKS[0]} and {HOOKS[1]}" in good
    assert f"Permuted control (permuted) at {HOOKS[0]}: passes none of the targets" in good
    assert "**40.0 [40.0, 40.0] PASS**" in good
    few = page(planted(concepts, tmp_path, {"teacher": 0.6}, units=7))
    assert "at 0 of 2 hooks" in few
    assert "**40.0 [40.0, 40.0] INCONCLUSIVE** | 7 concepts |" in few
    assert "Not decided: 7 concepts, 8 are needed for a verdict." in few
    bad = page(planted(concepts, tmp_path, {"teacher": 0.25, "permuted": 0.6}))
    assert "at 0 of 2 hooks" in bad
    assert "passes purity gain in 2 of 2 seeds, which it should not" in bad


def test_n_is_of_the_value_over_seeds_and_each_seed_stands_beside(concepts, tmp_path):
    text = table(planted(concepts, tmp_path, {"teacher": 0.6}, lacking=(HOOKS[0], 1)))
    rows = [line for line in text.splitlines() if line.startswith("| Purity gain")]
    assert [row.split("|")[-2].strip() for row in rows] == ["8 concepts (8 and 5)"] * 2 + ["8 concepts"] * 2


def test_changed_settings_are_left_out_and_counted(concepts, tmp_path):
    copied(concepts, tmp_path)
    text = (
        (tmp_path / "study.yaml").read_text().replace("init: teacher\n", "init: teacher\n  teacher: {anchor: frozen}\n")
    )
    (tmp_path / "study.yaml").write_text(text)
    assert "as they were made: 4 runs." in table(tmp_path)


def test_over_seeds_a_concept_counts_with_its_sum():
    first = [Units.mean([0.1, 0.3, np.nan], [2, 5, 7]), Units.mean([0.2, 0.5, 0.4], [2, 5, 7])]
    second = [Units.mean([0.4, np.nan, 0.5], [2, 5, 7]), Units.mean([0.6, 0.7, np.nan], [2, 5, 7])]
    one, other = pooled(list(zip(first, second, strict=True)))
    np.testing.assert_allclose(one.numerator_U, [0.3, 0.5, np.nan])  # concept 7 never has a value in both arms
    np.testing.assert_allclose(other.numerator_U, [1.0, 0.7, np.nan])
    assert paired(one, other).value == pytest.approx(1.7 / 3 - 0.8 / 3)
    with pytest.raises(ValueError, match="found different ones in two arms of one seed"):
        pooled([(first[0], Units.mean([0.1], [2]))])


def test_units_come_back_and_many_are_added_in_groups():
    packed = pack_units(Units.mean([0.123456789, np.nan, 3.0], [4, 9, 11]))
    assert packed == {"keys": [4, 9, 11], "numerator": [0.12346, None, 3.0]}
    np.testing.assert_allclose(unpack_units(packed).numerator_U, [0.12346, np.nan, 3.0])
    numerator, denominator = np.arange(250.0), np.full(250, 2.0)
    numerator[3] = np.nan
    many = unpack_units(pack_units(Units.ratio(numerator, denominator)))
    assert len(many.keys_U) == 100
    assert many.numerator_U.sum() == pytest.approx(np.nansum(numerator))
    assert many.denominator_U.sum() == 2.0 * 249
    parents = {"z": [1.0] * 57, "q": [0.0] * 57}
    tree = {"main": {"parents": parents, "children": {"beta": [1.0] * 257}, "beta_ci95": [0.1, 0.2]}, "why": None}
    assert short_evidence(tree) == {"main": {"parents": {"z": [1.0] * 57}, "beta_ci95": [0.1, 0.2]}, "why": None}
    assert json.dumps(short_evidence(tree))
