"""hsae sweep run: which runs are made, resuming, what a change does, workers, refusals."""

import lzma
import os
import time
from pathlib import Path
from typing import Any

import pytest
from running import files, hsae, refused
from sweeps import CONCEPTS, GRID, HOOKS, SMOKE, WORLD, numbers, records, rewrite, run, written
from tiny import packaged_texts

from polytope_hsae.config import ConfigError, HSAEConfig, load_config
from polytope_hsae.models.flops import parameter_count
from polytope_hsae.sweep.plan import RunKey, Sweep, load_sweep, settings_hash, stated_config
from polytope_hsae.sweep.records import key_of, read_runs
from polytope_hsae.sweep.run import best_trial, due
from polytope_hsae.sweep.summary import read_results
from polytope_hsae.sweep.workers import results, threads_each, worker_pool

STUDIES = Path(__file__).parents[1] / "studies"
ARMS = GRID["arms"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder of a finished sweep on synthetic rows. Read only."""
    folder = tmp_path_factory.mktemp("world")
    answer = run(written(folder, WORLD), folder / "out", None)
    assert answer.code == 0, answer.err
    return folder / "out"


def test_learning_rates_are_tried_with_the_first_seed_and_the_best_goes_on(grid):
    found = records(grid)
    assert len(found) == 6  # two arms: two rates with seed 0, the better one with seed 1
    for record in found:
        assert (record["steps"], record["tokens"], record["failed"]) == (4, 256, None)
        assert 0 < record["val"]["metrics"]["l0"]["value"] <= 4
        assert record["peak_bytes"] == {"value": None, "why": "not counted on a CPU"}
        assert "steering_leakage" not in record["val"]["metrics"]
    nested, flat = ([record for record in found if record["arm"] == arm] for arm in ("nested", "topk"))
    assert {record["val"]["metrics"]["parent_given_child"]["value"] for record in nested} == {1.0}
    assert flat[0]["val"]["metrics"]["probe_min"]["why"] == "a flat model has no children"
    assert abs(flat[0]["parameters"] - nested[0]["parameters"]) < 0.02 * nested[0]["parameters"]
    for of_arm in (nested, flat):
        trials = {record["lr"]: record["val"]["metrics"]["ev"]["value"] for record in of_arm if record["seed"] == 0}
        assert set(trials) == {1e-3, 3e-3}
        chosen = {record["lr"] for record in of_arm if record["seed"] == 1}
        assert chosen == {max(trials, key=trials.__getitem__)}


def test_a_finished_sweep_is_not_run_again(grid, fixtures):
    before = files(grid)
    answer = run(grid / "study.yaml", grid, fixtures)
    assert (answer.code, files(grid)) == (0, before), answer.err
    assert "6 runs are there, 0 can be made now" in answer.out


def test_a_stopped_sweep_goes_on_and_ends_with_the_same_numbers(grid, fixtures, tmp_path):
    path, out = written(tmp_path, GRID), tmp_path / "out"
    shared = ("--cache", tmp_path / "cache")
    assert run(path, out, fixtures, *shared, "--only", "topk", "--limit", 1).code == 0
    assert [record["arm"] for record in records(out)] == ["nested"]  # which topk is sized by
    (out / ".runs.jsonl.12345678.tmp").write_text("{")  # what a kill in the middle of a write leaves
    answer = run(path, out, fixtures, *shared)
    assert answer.code == 0, answer.err
    assert [numbers(record) for record in records(out)] == [numbers(record) for record in records(grid)]
    assert not list(out.glob(".*"))
    assert str(tmp_path) not in (out / "study.yaml").read_text()


def test_what_is_written_lies_beside_the_file(tmp_path, fixtures, monkeypatch):
    here, folder = tmp_path / "here", tmp_path / "studies"
    here.mkdir()
    path = written(folder, GRID)
    monkeypatch.chdir(here)
    more = ("--set", f"model.name={fixtures / 'lm'}", "--device", "cpu", "--limit", 1)
    answer = hsae("sweep", "run", path, *more)
    assert answer.code == 0, answer.err
    assert {made.name for made in (folder / "grid").iterdir()} == {"study.yaml", "runs.jsonl", "hooks.json", "cache"}
    assert not list(here.iterdir())


def test_a_changed_arm_is_made_again_and_not_mixed(grid, fixtures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    rewrite(out, records(grid))
    arms = [{**GRID["arms"][0], "hsae": {**GRID["arms"][0]["hsae"], "child_input": "input"}}, GRID["arms"][1]]
    path = written(out, GRID, arms=arms).rename(out / "study.yaml")
    assert read_results_of(out) == set()  # topk is sized by nested, whose settings are others now
    answer = run(path, out, fixtures, "--only", "nested")
    assert answer.code == 0, answer.err
    assert answer.out.count("made with other settings, is made again") == 6
    assert read_results_of(out) == {"nested"}
    assert len(read_runs(out)) == 6  # records that are not valid stay until they are replaced


def test_a_flat_arm_is_sized_by_the_present_form_of_its_match(fixtures, tmp_path):
    once = {"seeds": [0], "lr": [1e-3]}
    path, out = written(tmp_path, GRID, **once), tmp_path / "out"
    assert run(path, out, fixtures, "--only", "nested").code == 0
    smaller = {**ARMS[0], "hsae": {**ARMS[0]["hsae"], "n_parents": 8}}
    answer = run(written(tmp_path, GRID, **once, arms=[smaller, ARMS[1]]), out, fixtures, "--only", "topk")
    assert answer.code == 0, answer.err
    nested, flat = records(out)
    assert nested["atoms"] == 32
    assert flat["parameters"] == pytest.approx(nested["parameters"], rel=0.05)


def test_a_run_that_waits_for_one_that_failed_is_named(fixtures, tmp_path):
    arms = [{**ARMS[0], "lr": 1e30}, ARMS[1]]
    answer = run(written(tmp_path, GRID, seeds=[0], lr=[1e-3], arms=arms), tmp_path / "out", fixtures)
    assert answer.code == 0, answer.err
    (failed,) = records(tmp_path / "out")
    assert failed["failed"]
    assert f"{HOOKS[0]}/topk-l0_4-lr0.001-s0: not made, because nested, which sizes it, failed" in answer.out


def read_results_of(folder: Path) -> set[str]:
    try:
        return {cell.arm for cell in read_results(folder).found}
    except ValueError:
        return set()


def test_workers_make_the_same_numbers(grid, fixtures, tmp_path):
    answer = run(written(tmp_path, GRID), tmp_path / "out", fixtures, "--workers", 2, "--limit", 2)
    assert answer.code == 0, answer.err
    before = {key_of(record): record for record in records(grid)}
    for record in records(tmp_path / "out"):
        assert record["workers"] == 2
        values = [one["val"]["metrics"]["ev"]["value"] for one in (record, before[key_of(record)])]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_text_held_out_by_file_and_test_values(fixtures, tmp_path):
    texts, out = packaged_texts(60), tmp_path / "out"
    more = ["--only", "baseline", "--limit", 1]
    for name, part, field in (("train", texts[:40], "path"), ("heldout", texts[40:], "heldout_path")):
        with lzma.open(tmp_path / f"{name}.txt.xz", "wt", encoding="utf-8") as stream:
            stream.write("\n\n".join(part))
        more += ["--set", f"corpus.{field}={tmp_path / name}.txt.xz"]
    path = written(tmp_path, CONCEPTS, set={**SMOKE, "corpus.source": "text"})
    answer = run(path, out, fixtures, *more)
    assert answer.code == 0, answer.err
    (found,) = records(out)
    assert set(found["text_sha256"]) == {"train", "heldout"}
    assert str(tmp_path) not in (out / "study.yaml").read_text()
    answer = run(path, out, fixtures, *more, "--test")  # the model is there: it is only measured
    assert "has no test values, is measured again" in answer.out
    (again,) = records(out)
    assert set(again["test"]["metrics"]) == set(found["val"]["metrics"])
    assert again["seconds"]["train"] == found["seconds"]["train"] > 0  # it was not trained again
    refused(run(path, out, fixtures, "--set", "corpus.path=nowhere.txt"), "corpus.path", "nowhere.txt")


def test_an_hsae_finds_planted_trees_far_above_chance(world):
    found = {record["arm"]: record for record in records(world)}
    nested, topk, frozen, random = (found[name]["test"] for name in ("nested", "topk", "frozen", "random"))
    assert nested["edges"]["structure"]["f1"] > nested["edges"]["structure"]["chance"] + 0.25
    assert random["edges"]["forest"]["f1"] < 0.05
    assert nested["features"]["mcc"] > random["features"]["mcc"] + 0.2
    assert nested["features"]["f1"] > random["features"]["f1"] + 0.3
    assert topk["ev"] > frozen["ev"] + 0.1 > random["ev"]
    assert frozen["features"]["mcc"] < topk["features"]["mcc"] - 0.1
    assert (found["random"]["rows"], found["random"]["rows_per_second"]) == (0, None)
    assert {record["rows"] for name, record in found.items() if name != "random"} == {99_840}
    assert all(part["l0"] == pytest.approx(4, abs=0.15) for part in (nested, frozen, random))
    assert nested["two_level_bound"] == 40


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (GRID, {"colour": "red"}, ["colour", "allowed: name, about, config"]),
        (GRID, {"hooks": []}, ["hooks, world: found both or neither"]),
        (GRID, {"lr": [1e-3, 1e-3]}, ["lr", "allowed: values that differ"]),
        (GRID, {"lr": [1e-3, 1.0000001e-3]}, ["lr", "allowed: values that differ"]),
        (GRID, {"seeds": [0, 0]}, ["seeds", "values that differ"]),
        (GRID, {"arms": [{**ARMS[0], "l0": {}}]}, ["arms.nested.l0: found nothing, allowed: fields of hsae"]),
        (GRID, {"arms": [{**ARMS[0], "l0": {4: {"topk_parent": 3}}}]}, ["arms.nested.l0.4: found ", "allowed: 4"]),
        (GRID, {"arms": [{**ARMS[0], "hsae": {"gate": "soft"}}]}, ["hsae", "gate", "'soft'"]),
        (GRID, {"arms": [ARMS[0], {**ARMS[1], "match": {"params": "nobody"}}]}, ["nobody"]),
        (GRID, {"arms": [ARMS[0], {**ARMS[1], "l0": {4: {}}}]}, ["arms.topk.l0", "allowed: nothing for a flat arm"]),
        (GRID, {"arms": [{**ARMS[0], "chance": "random"}]}, ["arms.nested.chance", "allowed: null without a world"]),
        (GRID, {"config": "nothing"}, ["'nothing'", "quickstart"]),
        (GRID, {"set": {"hsae.colour": 1}}, ["hsae.colour"]),
        (CONCEPTS, {"hooks": [{"hook": "layers.1", "teacher": "nobody"}]}, ["hooks.layers.1.teacher", "permuted"]),
        (CONCEPTS, {"arms": [{"name": "one", "against": "nobody"}]}, ["arms.one.against", "'nobody'"]),
        (CONCEPTS, {"arms": [{"name": "one", "seed": 3}]}, ["arms.one.seed", "null"]),
        (WORLD, {"world": {**WORLD["world"], "trees": 30}}, ["world.trees"]),
        (WORLD, {"arms": [{"name": "a", "kind": "topk", "flat": {"k": 0}}]}, ["flat", "k"]),
        (
            WORLD,
            {"arms": [{"name": "a"}, {"name": "b", "kind": "topk", "match": {"params": "a"}}]},
            ["arms.b.match", "allowed: nothing with a world"],
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(tmp_path, base, changes, words):
    refused(hsae("sweep", "run", written(tmp_path, base, **changes), "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_are_refused_in_one_line(grid, tmp_path):
    path = written(tmp_path, GRID)
    refused(hsae("sweep", "run", tmp_path / "none.yaml"), "none.yaml", "allowed: a YAML file")
    refused(hsae("sweep", "run", path, "--only", "x*", "--out", tmp_path / "a"), "--only", "nested, topk")
    refused(
        hsae("sweep", "run", grid / "study.yaml", "--set", "seeds=[9]", "--out", grid), "--set", "seeds=[9]", "--out"
    )
    refused(hsae("sweep", "table", tmp_path / "none"), "study.yaml")
    for text in ("- a", "a: b: c", ""):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_sweep(path)


def test_a_record_that_is_none_and_records_of_other_data_are_refused(grid, tmp_path):
    (tmp_path / "study.yaml").write_text((grid / "study.yaml").read_text())
    found = records(grid)
    rewrite(tmp_path, [*found[:1], {**found[1], "data_sha256": "0" * 64}])
    refused(hsae("sweep", "table", tmp_path), "different data")
    rewrite(tmp_path, [*found[:1], {"arm": 3}])
    refused(hsae("sweep", "table", tmp_path), "line 2", "arm")


def test_rates_come_first_and_failed_ones_lose(tmp_path):
    sweep, _ = load_sweep(written(tmp_path, GRID, seeds=[3, 4, 5]))
    one, two = (RunKey("topk", HOOKS[0], 4, lr, 3) for lr in (1e-3, 3e-3))

    def of_topk(found: dict[RunKey, Any]) -> list[RunKey]:
        return [run for run in due(sweep, found) if run.arm == "topk"]

    def ev(value: float) -> dict[str, Any]:
        return {"failed": None, "val": {"metrics": {"ev": {"value": value}}}}

    assert of_topk({}) == [one, two]
    found: dict[RunKey, Any] = {one: ev(0.5), two: ev(0.6)}
    assert of_topk(found) == [two._replace(seed=4), two._replace(seed=5)]
    found[two] = {"failed": "the loss is nan"}
    assert best_trial([one, two], found) == one
    found[one] = {"failed": "the loss is nan"}
    assert of_topk(found) == []


def test_a_changed_config_is_seen_and_a_field_stated_by_the_sweep_is_as_in_the_config(tmp_path):
    config = tmp_path / "base.yaml"
    config.write_text("teacher: {init: dual}\ntraining: {lr: 1.0e-5, log_every: 10}\narms: [{name: one}]\n")

    def stated(**fields: Any) -> dict[str, Any]:
        tree = {"name": "a", "config": str(config), "hooks": ["layers.1"], "arms": [{"name": "b"}], "set": fields}
        return stated_config(Sweep.model_validate(tree), "layers.1")

    before = stated(**{"hsae.l1_child": 1e-6})
    assert before == {"teacher.init": "dual", "training.lr": 1e-5, "hsae.l1_child": 1e-6}
    config.write_text("teacher: {init: literal}\ntraining: {lr: 3.0e-3, log_every: 20}\n")
    assert stated(**{"hsae.l1_child": 1e-6}) != before
    assert stated(**{"teacher.init": "dual", "training": {"lr": 1e-5}, "hsae.l1_child": 1e-6}) == before


@pytest.mark.parametrize("measured", [{"steering": True}, {"units": ["fvu"]}])
def test_what_is_measured_is_a_setting(tmp_path, measured):
    one, other = (load_sweep(written(tmp_path, GRID, **fields))[0] for fields in ({}, measured))
    key = RunKey("nested", HOOKS[0], 4, 1e-3, 0)
    assert settings_hash(one, key) != settings_hash(other, key)


def test_workers_have_the_threads_that_were_asked_for_or_their_share_of_the_cores(monkeypatch):
    for cores, workers, most, threads in ((64, 2, 1, 1), (64, 1, 2, 2), (64, 2, 40, 32), (2, 2, 2, 1), (1, 4, 8, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert threads_each(workers, most) == threads


def test_a_worker_that_is_killed_is_one_line_at_once():
    def work() -> None:
        with worker_pool(2, print, None, "sweep", "; records are kept") as pool:
            assert list(pool.map(abs, (-1, -2))) == [1, 2]  # both are there
            pool.submit(time.sleep, 600)  # which nobody waits for
            pool.submit(os._exit, 1).result()

    with pytest.raises(OSError, match=r"^sweep: a worker was killed .*, try fewer --workers; records are kept$"):
        work()


def test_calls_that_follow_from_results_are_made_too():
    waiting = [(2,), (3,)]

    def ready() -> list[tuple[int, ...]]:
        return [waiting.pop(0)] if waiting else []

    found = []
    with worker_pool(1, print, None, "sweep") as pool:
        for result in results(pool, abs, ready):
            found.append(result)
            if result == 3:
                waiting.append((-5,))
    assert found == [2, 3, 5]


@pytest.mark.parametrize(
    ("name", "runs"),
    [("win", 2 * 34 * 2 * 3), ("evidence", 405), ("evidence-small", 60), ("synthetic", 19), ("synthetic-small", 8)],
)
def test_the_studies_of_the_repository_are_some(name, runs):
    sweep, _ = load_sweep(STUDIES / name / "study.yaml")
    keys = [key for hook in sweep.places for key in sweep.keys(hook)]
    assert (sweep.name, len(keys)) == (name, runs)
    assert len({settings_hash(sweep, key) for key in keys}) == runs


def test_the_recommended_config_and_the_defaults_are_the_arm_of_the_committed_study():
    _, configs = load_sweep(STUDIES / "win" / "study.yaml")
    config, key = configs[HOOKS[0]], RunKey("recommended", HOOKS[0], 32, 6e-3, 0)
    winner, recommended = config.arm_hsae(config.arm(key.name)), load_config("recommended")
    assert recommended.hsae == winner
    assert HSAEConfig(n_parents=winner.n_parents) == winner
    assert (recommended.training.lr, recommended.training.baseline.steps) == (key.lr, config.training.baseline.steps)
    assert recommended.training.batch_size == config.training.batch_size
    flat = config.arm_flat(config.arm(key._replace(arm="batchtopk").name))
    assert parameter_count(winner, 256) == pytest.approx(parameter_count(flat, 256), rel=0.01)
