"""hsae study: runs, resuming, what a changed arm does, and a table from the files alone."""

import json
import lzma
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import Answer, files, hsae, refused
from tiny import save_family

from polytope_hsae.config import ConfigError, HSAEConfig, load_config
from polytope_hsae.data.corpus import Documents, shortened
from polytope_hsae.fileio import write_json
from polytope_hsae.models.flops import parameter_count
from polytope_hsae.study.data import of_each_document
from polytope_hsae.study.plan import RunKey, load_study, model_config, stated_config
from polytope_hsae.study.results import read_results
from polytope_hsae.study.run import best_trial, due, n_runs
from polytope_hsae.study.workers import results, threads_each, worker_pool

HOOK = "final_residual_pre_unembed"
TINY: dict[str, Any] = {
    "name": "tiny",
    "config": "smoke",
    "set": {
        "run.threads": 1,
        "corpus.max_tokens": 4000,
        "hsae.causal_ortho_lambda": 0,
        "concepts.min_test_rows": 2,
    },
    "hooks": [HOOK],
    "steps": 6,
    "batch_size": 128,
    "seeds": [0, 1],
    "l0": [4],
    "lr": [1e-3, 3e-3],
    "measure": {"contexts": 2, "usage_rows": 1024, "probe_rows": 4000},
    "arms": [
        {
            "name": "nested",
            "kind": "hsae",
            "size": {"atoms": 64},
            "hsae": {"n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"},
            "l0": {4: {"topk_parent": 2, "topk_child_total": 2}},
        },
        {"name": "topk", "kind": "topk", "size": {"params": "nested"}},
    ],
}

WORDS = {
    "animal": {"pet": ["dog", "cat", "horse"], "wild": ["wolf", "lion", "bear"], "water": ["fish", "whale", "shark"]},
    "body": {"limb": ["hand", "arm", "leg"], "face": ["eye", "nose", "mouth"], "inside": ["heart", "brain", "blood"]},
    "place": {
        "town": ["city", "village", "street"],
        "nature": ["river", "hill", "sea"],
        "house": ["room", "door", "wall"],
    },
}


def written(folder: Path, **changes: Any) -> Path:
    """The tiny study's file with some fields replaced."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def run(path: Path, out: Path, fixtures: Path, *more: object) -> Answer:
    """`hsae study run` with a tiny language model, on the CPU."""
    places = ("--set", f"model.name={fixtures / 'lm'}", "--set", f"concepts.ontology={fixtures / 'words.yaml'}")
    shared = ("--cache", fixtures / "cache", "--device", "cpu")
    return hsae("study", "run", path, "--out", out, *places, *shared, *more)


def with_arm(place: int, **changes: Any) -> list[dict[str, Any]]:
    """The tiny study's arms with some fields of one replaced."""
    return [{**arm, **(changes if number == place else {})} for number, arm in enumerate(TINY["arms"])]


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Path:
    """A tiny language model, a small tree of words, and the activations that all studies here share."""
    folder = tmp_path_factory.mktemp("fixtures")
    save_family(folder / "lm", "llama")
    (folder / "words.yaml").write_text(yaml.safe_dump(WORDS))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, fixtures) -> Path:
    """The folder of a finished tiny study. Read only."""
    folder = tmp_path_factory.mktemp("study")
    answer = run(written(folder), folder / "out", fixtures)
    assert answer.code == 0, answer.err
    return folder / "out"


def records(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}


def test_a_study_leaves_one_small_file_for_every_run(done):
    found = records(done)
    assert len(found) == 6  # two arms: two rates with seed 0, the better one with seed 1
    for name, record in found.items():
        assert (done / "runs" / name).stat().st_size < 4096
        assert record["rows"] == 6 * 128
        assert record["failed"] is None
        assert 0 < record["val"]["l0"]["value"] <= 4
        assert record["usage"]["rows"] == 1024
        assert record["peak_bytes"] == {"value": None, "why": "not counted on a CPU"}
    nested = [record for record in found.values() if record["arm"] == "nested"]
    flat = [record for record in found.values() if record["arm"] == "topk"]
    assert {record["hierarchy"]["parent_given_child"]["value"] for record in nested} == {1.0}
    assert all(record["hierarchy"]["probe_min"]["value"] is None for record in flat)
    assert flat[0]["hierarchy"]["probe_min"]["why"] == "a flat model has no children"
    assert abs(flat[0]["parameters"] - nested[0]["parameters"]) < 0.02 * nested[0]["parameters"]
    assert len({record["data_sha256"] for record in found.values()}) == 1
    for arm in ("nested", "topk"):
        trials = {
            record["lr"]: record["val"]["ev"]["value"]
            for record in found.values()
            if record["arm"] == arm and record["seed"] == 0
        }
        assert set(trials) == {1e-3, 3e-3}
        chosen = {record["lr"] for record in found.values() if record["arm"] == arm and record["seed"] == 1}
        assert chosen == {max(trials, key=trials.__getitem__)}


def test_what_is_written_lies_beside_the_studys_file(tmp_path, fixtures, monkeypatch):
    here, folder = tmp_path / "here", tmp_path / "studies"
    here.mkdir(), folder.mkdir()
    path = written(folder)
    monkeypatch.chdir(here)
    places = ("--set", f"model.name={fixtures / 'lm'}", "--set", f"concepts.ontology={fixtures / 'words.yaml'}")
    answer = hsae("study", "run", path, *places, "--device", "cpu", "--limit", 1)
    assert answer.code == 0, answer.err
    assert f"records in {folder / 'tiny'}, activations in {folder / 'tiny' / 'cache'}" in answer.out
    assert {made.name for made in (folder / "tiny").iterdir()} == {"study.yaml", "runs", "cache"}
    assert len(records(folder / "tiny")) == 1
    assert not list(here.iterdir())
    again = hsae("study", "run", folder / "tiny" / "study.yaml", *places, "--device", "cpu", "--limit", 1)
    assert again.code == 0, again.err
    assert len(records(folder / "tiny")) == 2


def test_a_finished_study_is_not_run_again(done, fixtures):
    before = files(done)
    answer = run(done / "study.yaml", done, fixtures)
    assert (answer.code, files(done)) == (0, before), answer.err
    assert "6 of 6 runs are there" in answer.out


def test_a_stopped_study_goes_on_and_ends_with_the_same_numbers(done, fixtures, tmp_path):
    out = tmp_path / "out"
    path = written(tmp_path)
    assert run(path, out, fixtures, "--limit", 1).code == 0
    assert len(records(out)) == 1
    (out / "runs" / ".half.json.12345678.tmp").write_text("{")  # what a kill in the middle of a write leaves
    assert run(path, out, fixtures, "--only", "top*").code == 0
    assert {record["arm"] for record in records(out).values()} == {"nested", "topk"}
    assert run(path, out, fixtures).code == 0
    assert not list((out / "runs").glob(".*"))
    for name, record in records(done).items():
        for part in ("val", "usage", "hierarchy", "config", "settings_sha256", "data_sha256"):
            assert records(out)[name][part] == record[part]


def test_a_hook_of_another_width_than_the_unembedding(fixtures, tmp_path):
    hook = "model.layers.0.mlp.act_fn"
    answer = run(written(tmp_path, hooks=[hook], seeds=[0], lr=[1e-3]), tmp_path / "out", fixtures)
    assert answer.code == 0, answer.err
    found = records(tmp_path / "out")
    assert len(found) == 2
    assert all(record["failed"] is None and record["hook"] == hook for record in found.values())


def test_clashes_are_said_before_the_harvest(fixtures, tmp_path):
    wide = with_arm(0, hsae={**TINY["arms"][0]["hsae"], "subspace_dim": 99999})
    for changes, words in (
        ({"batch_size": 99999}, "batch_size: found 99999, allowed: 1 to "),
        ({"hooks": ["lm_head"]}, "model.hook: found 'lm_head', the output head, whose rows are logits; allowed: "),
        ({"hooks": ["layers.7"]}, "model.hook: found 'layers.7', allowed: layers.-2 to layers.1"),
        ({"arms": wide}, "hsae.subspace_dim: found 99999, allowed: at most the width 32"),
    ):
        path = written(tmp_path, **changes)
        answer = run(path, tmp_path / "out", fixtures, "--set", "corpus.max_tokens=3000", "--cache", tmp_path / "cache")
        refused(answer, words)
        assert not list(tmp_path.glob("cache/**/*.safetensors"))
        shutil.rmtree(tmp_path / "out")


def test_runs_in_worker_processes_give_the_same_numbers(done, fixtures, tmp_path):
    out = tmp_path / "out"
    answer = run(written(tmp_path), out, fixtures, "--workers", 2, "--only", f"topk-{HOOK}-4", "--limit", 1)
    assert answer.code == 0, answer.err
    found = records(out)
    assert len(found) == 1
    for name, record in found.items():
        assert record["workers"] == 2
        assert record["val"]["ev"]["value"] == pytest.approx(records(done)[name]["val"]["ev"]["value"], abs=1e-4)


def test_workers_have_the_threads_that_were_asked_for_or_their_share_of_the_cores(monkeypatch):
    for cores, workers, most, threads in ((64, 2, 1, 1), (64, 1, 2, 2), (64, 2, 40, 32), (2, 2, 2, 1), (1, 4, 8, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert threads_each(workers, most) == threads


def test_a_changed_arm_is_made_again_and_not_mixed(done, fixtures, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = records(out)
    changed = with_arm(0, hsae={**TINY["arms"][0]["hsae"], "child_input": "input"})
    text = yaml.safe_dump({**TINY, "arms": changed})
    (out / "study.yaml").write_text(text)
    left = read_results(out)
    assert {result.cell.arm for result in left.found} == {"topk"}
    assert len(left.left_out) == 3
    answer = run(out / "study.yaml", out, fixtures)
    assert answer.code == 0, answer.err
    assert answer.out.count("made with other settings, is made again") == 3
    assert (out / "study.yaml").read_text() == text
    after = records(out)
    assert all(after[name] == before[name] for name in before if name.startswith("topk"))
    assert all(after[name]["settings_sha256"] != before[name]["settings_sha256"] for name in before if "nested" in name)
    assert len(read_results(out).found) == 2


def test_a_changed_config_is_seen_and_a_field_stated_by_the_study_is_as_in_the_config(tmp_path):
    config = tmp_path / "base.yaml"
    config.write_text("teacher: {init: dual, anchor: pull}\ntraining: {lr: 1.0e-5, log_every: 10}\n")
    before = stated_config(str(config), {"hsae.l1_child": 1e-6})
    assert before == {
        "teacher.init": "dual",
        "teacher.anchor": "pull",
        "training.lr": 1e-5,
        "hsae.l1_child": 1e-6,
    }
    config.write_text("teacher: {init: literal}\ntraining: {lr: 3.0e-3, log_every: 20}\n")
    assert stated_config(str(config), {"hsae.l1_child": 1e-6}) != before
    stated = {"teacher.init": "dual", "teacher.anchor": "pull", "training": {"lr": 1e-5}, "hsae.l1_child": 1e-6}
    assert stated_config(str(config), stated) == before
    assert stated_config(str(config), {**stated, "training.lr_end_fraction": 0.5}, ("teacher", "training.lr")) == {
        "training.lr_end_fraction": 0.5,  # another field than training.lr
        "hsae.l1_child": 1e-6,
    }
    assert stated_config(str(config), stated, ("teacher",)) == {"training.lr": 1e-5, "hsae.l1_child": 1e-6}


def test_the_table_needs_the_files_alone_and_is_deterministic(done, tmp_path):
    out = tmp_path / "elsewhere"
    shutil.copytree(done / "runs", out / "runs")
    shutil.copy(done / "study.yaml", out)
    assert hsae("study", "table", out).code == 0
    first = files(out)
    table = (out / "table.md").read_text()
    main, hierarchy, trials = (
        [line for line in part.splitlines() if line.startswith("|")] for part in table.split("\n\n| arm ")[1:]
    )
    assert [len(part) for part in (main, hierarchy, trials)] == [
        4,
        3,
        6,
    ]  # head; arms; one has a hierarchy; two rates each
    assert all(len({line.count("|") for line in part[1:]}) == 1 for part in (main, hierarchy, trials))
    first_seed = [record for record in records(out).values() if record["seed"] == 0]
    shown = {f"| {one['arm']} | {one['lr']:g} | {one['val']['ev']['value']:.4f} " for one in first_seed}
    assert len(shown) == 4
    assert all(any(line.startswith(start) for line in trials) for start in shown)
    nested = next(line for line in main if line.startswith("| nested"))
    assert nested.split("|")[2].strip() == "64"
    values = [record["val"]["ev"]["value"] for record in records(out).values() if record["arm"] == "topk"]
    assert "(topk)" in nested
    assert "no flat arm" in nested  # none has as few atoms
    assert len(values) == 3
    picture, page = ((out / name).read_text() for name in ("pareto.svg", "pareto.html"))
    assert picture.count("<svg ") == 9
    assert page.count("<figure>") == 8
    assert "http" not in page.replace("http://www.w3.org", "")
    assert hsae("study", "table", out).code == 0
    assert files(out) == first
    refused(hsae("study", "table", out, "--test"), "test values", "--test")


@pytest.mark.parametrize("l0, mark", [(3.95, ""), (3.90, " †")])
def test_a_difference_that_is_not_at_matched_l0_is_marked(done, tmp_path, l0, mark):
    for path in (done / "runs").glob("*.json"):
        found = json.loads(path.read_text())
        found["val"]["l0"]["value"] = l0 if found["arm"] == "nested" else 4.0
        write_json(tmp_path / "runs" / path.name, found)
    shutil.copy(done / "study.yaml", tmp_path)
    assert hsae("study", "table", tmp_path).code == 0
    nested = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| nested"))
    assert f"(topk){mark} |" in nested


def test_packed_runs_are_the_same_files_again(done, tmp_path):
    packed = tmp_path / "runs.jsonl"
    assert hsae("study", "pack", done, packed).code == 0
    assert len(packed.read_text().splitlines()) == 6
    assert hsae("study", "unpack", packed, tmp_path / "out").code == 0
    assert records(tmp_path / "out") == records(done)
    packed.write_text('{"arm": 3}\n')
    refused(hsae("study", "unpack", packed, tmp_path / "other"), "line 1", "arm")


def test_text_from_a_folder_and_test_values(fixtures, tmp_path):
    texts = tmp_path / "text"
    texts.mkdir()
    paragraph = "The farmer fed the horse, and the dog ran after the cat near the old house by the river.\n"
    for name, repeats in (("train", 60), ("heldout", 30)):
        with lzma.open(texts / f"{name}.txt.xz", "wt") as stream:
            stream.write("\n".join(f"{number}. {paragraph * 6}" for number in range(repeats)))
    path = written(tmp_path, arms=TINY["arms"][:1], lr=[1e-3], seeds=[0])
    answer = run(path, tmp_path / "out", fixtures, "--set", f"text={texts}", "--test")
    assert answer.code == 0, answer.err
    (record,) = records(tmp_path / "out").values()
    assert set(record["text_sha256"]) == {"train", "heldout"}
    assert record["test"]["rows"] > 0
    assert str(texts) not in (tmp_path / "out" / "study.yaml").read_text()
    assert hsae("study", "table", tmp_path / "out", "--test").code == 0
    assert "test values" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, ["steps: found 0"]),
        ({"colour": "red"}, ["colour", "allowed: name, config"]),
        ({"hooks": []}, ["hooks"]),
        ({"lr": [1e-3, 1e-3]}, ["lr", "allowed: values that differ"]),
        (
            {"lr": [1e-3, 1.0000001e-3]},
            [": lr: found [0.001, 0.0010000001]", "allowed: rates that differ in their first"],
        ),
        ({"arms": with_arm(1, lr=[2e-3, 2.0000001e-3])}, ["arms.topk.lr: found [0.002, 0.0020000001]", "six digits"]),
        ({"arms": with_arm(1, lr=[1e-3, 2e-3, 2e-3])}, ["arms.topk.lr", "six digits"]),
        ({"arms": with_arm(0, size={"atoms": 65})}, ["arms.nested.size.atoms: found 65"]),
        ({"arms": with_arm(0, size={"params": "topk"})}, ["allowed: atoms for an H-SAE"]),
        ({"arms": with_arm(0, size={})}, ["allowed: one of atoms and params"]),
        ({"arms": with_arm(0, l0={})}, ["arms.nested.l0: found nothing, allowed: fields of hsae"]),
        (
            {"arms": with_arm(0, l0={4: {"topk_parent": 3, "topk_child_total": 2}})},
            ["found 5 active latents, allowed: 4"],
        ),
        ({"arms": with_arm(0, hsae={"gate": "soft", "n_children_per_parent": 3})}, ["arms.nested", "gate", "'soft'"]),
        (
            {"l0": [4, 8], "arms": with_arm(1, size={"params": "nested"})},
            ["arms.topk.size.params: found 'nested', which has no L0 of 8, allowed: an arm with every L0"],
        ),
        ({"arms": with_arm(1, size={"params": "nobody"})}, ["size.params", "'nobody'", "allowed: nested"]),
        ({"arms": with_arm(1, flat={"colour": 1})}, ["arms.topk", "colour"]),
        ({"arms": with_arm(1, lr=[1e-3])}, ["arms.topk.lr", "allowed: 2 rates"]),
        ({"config": "nothing"}, ["'nothing'", "quickstart"]),
        ({"set": {"hsae.colour": 1}}, ["hsae.colour"]),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, changes, words):
    refused(hsae("study", "run", written(tmp_path, **changes), "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_templates_have_no_place_in_a_study(fixtures, tmp_path):
    path = written(tmp_path, set={**TINY["set"], "concepts.prompts": "packaged"})
    refused(run(path, tmp_path / "out", fixtures), "concepts.prompts: found 'packaged', allowed in a study: null")


def test_options_that_cannot_be_are_refused_in_one_line(done, fixtures, tmp_path):
    path = written(tmp_path)
    refused(hsae("study", "run", tmp_path / "none.yaml"), "none.yaml", "allowed: a YAML file")
    refused(hsae("study", "run", path, "--only", "x*", "--out", tmp_path / "a"), "--only", "nested, topk")
    refused(hsae("study", "run", path, "--set", "text=nowhere", "--out", tmp_path / "b"), "train.txt.xz")
    refused(hsae("study", "run", done / "study.yaml", "--set", "steps=9", "--out", done), "--set", "steps=9", "--out")
    refused(hsae("study", "table", tmp_path / "none"), "study.yaml")


def test_records_of_other_data_do_not_share_a_table(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    path = next((out / "runs").glob("topk*"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_sha256": "0" * 64}))
    refused(hsae("study", "table", out), "different data")
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 7}))
    refused(hsae("study", "table", out), path.name)


def test_the_study_of_the_repository_is_one():
    """Every run has a config, and every H-SAE as many parameters as the flat SAEs beside it, within 1 %."""
    study, base = load_study(Path(__file__).parents[1] / "studies" / "win" / "study.yaml")
    assert n_runs(study) == 2 * (4 * 8 + 2) * (2 + 2)
    one = RunKey("batchtopk", HOOK, 32, 0, study.lr[0])
    wanted = parameter_count(model_config(study, base, one, 256), 256)
    for arm in study.arms:
        if arm.kind == "hsae" and arm.name != "published-routing" and "-atoms" not in arm.name:
            key = one._replace(arm=arm.name, l0=max(arm.l0))
            found = parameter_count(model_config(study, base, key, 256), 256)
            assert abs(found - wanted) < 0.01 * wanted


def test_rates_come_first_and_failed_ones_lose(tmp_path):
    study, _ = load_study(written(tmp_path, seeds=[3, 4, 5]))
    assert n_runs(study) == 2 * (2 + 2)
    one, two = (RunKey("topk", HOOK, 4, 3, lr) for lr in (1e-3, 3e-3))
    assert [run for run in due(study, {}) if run.arm == "topk"] == [one, two]

    def ev(value: float) -> dict[str, Any]:
        return {"failed": None, "val": {"ev": {"value": value}}}

    found: dict[RunKey, Any] = {one: ev(0.5), two: ev(0.6)}
    assert [run for run in due(study, found) if run.arm == "topk"] == [two._replace(seed=4), two._replace(seed=5)]
    found[two] = {"failed": "the loss is nan"}
    assert best_trial([one, two], found) == one
    found[one] = {"failed": "the loss is nan"}
    assert best_trial([one, two], found) is None
    assert not [run for run in due(study, found) if run.arm == "topk"]


def test_a_worker_that_is_killed_is_one_line_at_once():
    def work() -> None:
        with worker_pool(2, print, (), "study", "; runs are kept") as pool:
            assert list(pool.map(abs, (-1, -2))) == [1, 2]  # both are there
            pool.submit(time.sleep, 600)  # which nobody waits for
            pool.submit(os._exit, 1).result()

    with pytest.raises(OSError, match=r"^study: a worker was killed .*, try fewer --workers; runs are kept$"):
        work()


def test_calls_that_follow_from_results_are_made_too():
    waiting = [(2,), (3,)]

    def ready() -> list[tuple[int, ...]]:
        return [waiting.pop(0)] if waiting else []

    found = []
    with worker_pool(1, print, (), "study") as pool:
        for result in results(pool, abs, ready):
            found.append(result)
            if result == 3:
                waiting.append((-5,))
    assert found == [2, 3, 5]


def test_a_file_that_is_no_study_is_refused(tmp_path):
    for text in ("- a", "a: b: c", ""):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_study(path)


def test_contexts_come_from_each_document_in_turn():
    rows = torch.tensor([[0, 0, 9], [0, 9, 9], [0, 18, 9], [3, 0, 9], [5, 0, 9], [5, 9, 4]])
    assert of_each_document(rows, 10)[:, :2].tolist() == [[0, 0], [3, 0], [5, 0], [0, 9], [5, 9], [0, 18]]
    assert of_each_document(rows, 4)[:, 0].tolist() == [0, 3, 5, 0]


def test_held_out_documents_are_shortened():
    documents = Documents(torch.arange(10, dtype=torch.int32), torch.tensor([0, 2, 8]), None)
    short = shortened(documents, 3)
    assert short.tokens.tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert short.starts.tolist() == [0, 2, 5]
    assert short.lengths.tolist() == [2, 3, 2]


def test_the_recommended_config_and_the_defaults_are_the_arm_of_the_committed_study():
    study, base = load_study(Path(__file__).parents[1] / "studies" / "win" / "study.yaml")
    run = RunKey("recommended", study.hooks[0], 32, 0, study.lr[1])
    winner, recommended = model_config(study, base, run, 256), load_config("recommended")
    assert recommended.hsae == winner
    assert HSAEConfig(n_parents=winner.n_parents) == winner
    assert (recommended.training.lr, recommended.training.baseline.steps) == (run.lr, study.steps)
    assert recommended.training.batch_size == study.batch_size
