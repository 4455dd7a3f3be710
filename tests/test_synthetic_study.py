"""hsae synthetic: a twin of the large study that runs in seconds, resuming, refusals, and a table from the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import files, hsae, refused

from polytope_hsae.config import ConfigError
from polytope_hsae.study.synthetic.plan import SyntheticRun, load_synthetic, model_config, settings_hash

TWIN: dict[str, Any] = {
    "name": "twin",
    "world": {
        "n_features": 80,
        "width": 48,
        "trees": 10,
        "branching": 4,
        "depth": 1,
        "rate_max": 0.3,
        "rate_min": 0.01,
        "orthogonal_steps": 50,
    },
    "n_latents": 60,
    "l0": 4,
    "rows": 100_000,
    "batch_size": 256,
    "sample_rows": 4096,
    "test_rows": 8192,
    "training": {"lr": 0.01, "warmup_steps": 20},
    "hsae": {
        "n_children_per_parent": 4,
        "gate": "hard",
        "children": "direct",
        "parent_budget": "batch",
        "child_budget": "batch",
        "budget_slots": 3.0,
        "topk_parent": 2,
        "topk_child_total": 2,
        "top_level_beta": 1.0,
    },
    "arms": [
        {"name": "nested", "kind": "hsae"},
        {"name": "topk", "kind": "topk"},
        {"name": "frozen", "kind": "topk", "chance": "frozen"},
        {"name": "random", "kind": "hsae", "chance": "random"},
    ],
}
BRIEF = {"rows": 1024}


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**TWIN, **changes}))
    return path


def run(path: Path, *more: object) -> Any:
    return hsae("synthetic", "run", path, "--device", "cpu", *more)


def records(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a finished twin. Read only."""
    path = written(tmp_path_factory.mktemp("twin"))
    answer = run(path)
    assert answer.code == 0, answer.err
    return path.parent


def test_an_hsae_finds_planted_trees_far_above_chance(done):
    found = records(done)
    nested, topk, frozen, random = (found[f"{name}-s0"] for name in ("nested", "topk", "frozen", "random"))
    assert nested["edges"]["structure"]["f1"] > 0.3
    assert nested["edges"]["structure"]["f1"] > nested["edges"]["structure"]["chance"] + 0.25
    assert random["edges"]["forest"]["f1"] < 0.05
    assert nested["features"]["mcc"] > random["features"]["mcc"] + 0.2
    assert nested["features"]["f1"] > random["features"]["f1"] + 0.3
    assert topk["ev"] > frozen["ev"] + 0.1 > random["ev"]
    assert frozen["features"]["mcc"] < topk["features"]["mcc"] - 0.1
    assert "structure" not in topk["edges"]
    assert (random["rows"], random["rows_per_second"]) == (0, None)
    assert {record["rows"] for name, record in found.items() if name != "random-s0"} == {99_840}
    for name in ("nested", "frozen", "random"):
        assert found[f"{name}-s0"]["l0"] == pytest.approx(4, abs=0.15)
    assert nested["l0"] == pytest.approx(nested["l0_parents"] + nested["l0_children"], abs=1e-3)
    assert nested["two_level_bound"] == 40


def test_a_finished_study_is_not_run_again_and_its_table_needs_the_files_alone(done, tmp_path):
    before = files(done)
    answer = run(done / "study.yaml")
    assert (answer.code, files(done)) == (0, before)
    assert "4 of 4 runs are there" in answer.out
    copied = tmp_path / "elsewhere"
    shutil.copytree(done / "runs", copied / "runs")
    shutil.copy(done / "study.yaml", copied)
    assert hsae("synthetic", "table", copied).code == 0
    assert (copied / "table.md").read_bytes() == (done / "table.md").read_bytes()
    table = (copied / "table.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("| nested")]) == 4
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("| arm")]
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)


def test_a_stopped_study_goes_on_and_a_changed_arm_is_made_again(tmp_path):
    path = written(tmp_path / "brief", **BRIEF)
    assert run(path, "--only", "topk").code == 0
    assert set(records(path.parent)) == {"topk-s0"}
    assert run(path).code == 0
    first = records(path.parent)
    written(path.parent, **BRIEF, hsae={**TWIN["hsae"], "top_level_beta": 0.5})
    answer = run(path)
    assert "2 of 4 runs are there" in answer.out
    after = records(path.parent)
    assert (after["topk-s0"], after["frozen-s0"]) == (first["topk-s0"], first["frozen-s0"])
    assert after["nested-s0"]["settings_sha256"] != first["nested-s0"]["settings_sha256"]


def test_workers_give_the_same_numbers(tmp_path):
    alone, both = written(tmp_path / "alone", **BRIEF), written(tmp_path / "both", **BRIEF)
    assert run(alone, "--only", "topk").code == 0
    answer = run(both, "--only", "topk", "--workers", 2)
    assert answer.code == 0, answer.err
    one, other = (records(path.parent)["topk-s0"] for path in (alone, both))
    assert one["features"]["mcc"] == pytest.approx(other["features"]["mcc"], abs=1e-3)
    assert other["workers"] == 2


def test_overrides_go_to_another_folder(tmp_path):
    path = written(tmp_path / "study", **BRIEF)
    refused(run(path, "--set", "rows=2048"), "--set", "--out")
    out = tmp_path / "out"
    assert run(path, "--only", "random", "--set", "world.noise=0.1", "--out", out).code == 0
    assert load_synthetic(out / "study.yaml").world.noise == 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"l0": 5}, ("arms.nested.hsae", "l0 = 5")),
        ({"world": {**TWIN["world"], "trees": 30}}, ("world.trees",)),
        ({"rows": 10}, ("rows", "batch_size")),
        ({"training": {"batch_size": 3}}, ("training.batch_size",)),
        ({"arms": [{"name": "a", "kind": kind} for kind in ("topk", "hsae")]}, ("arms", "differ")),
        ({"hsae": {**TWIN["hsae"], "n_parents": 40}}, ("n_parents", "200", "60")),
        ({"arms": [{"name": "a", "kind": "topk", "flat": {"k": 0}}]}, ("arms.a.flat", "k")),
    ],
)
def test_bad_studies_are_one_line(tmp_path, changes, words):
    refused(run(written(tmp_path / "bad", **changes)), *words)


def test_the_packaged_studies_are_valid_and_of_the_published_shape():
    studies = Path(__file__).parents[1] / "studies"
    for name in ("synthetic", "synthetic-small"):
        study = load_synthetic(studies / name / "study.yaml")
        assert len({settings_hash(study, run) for run in study.runs}) == len(study.runs)
    study = load_synthetic(studies / "synthetic" / "study.yaml")
    world = study.world
    assert (world.n_features, world.width, world.trees, world.branching, world.depth) == (16_384, 768, 128, 4, 3)
    assert (study.n_latents, study.l0) == (4096, 25)
    hsae_arms = [model_config(study, arm) for arm in study.arms if arm.kind == "hsae"]
    assert all(4090 <= made.n_parents * (1 + made.n_children_per_parent) <= 4096 for made in hsae_arms)
    assert SyntheticRun("topk", 0).file == "topk-s0.json"


def test_a_study_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a YAML file"):
        load_synthetic(tmp_path / "none.yaml")
