"""Clashes of config, model and text: one line before the harvest, and again in phases 2 to 4 run alone."""

import json
from collections import namedtuple

import pytest
import tiny
import torch
from running import SMOKE, hsae, refused
from safetensors.torch import load_file, save_file

from polytope_hsae.config import ConfigError, load_config
from polytope_hsae.data.corpus import Documents
from polytope_hsae.data.harvest import harvest, planned_rows
from polytope_hsae.phases import preflight

FREE = namedtuple("FREE", "total used free")


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


ACT = "model.layers.2.mlp.act_fn"
OTHER = "[{name: baseline, hsae: {n_parents: 2, topk_parent: 2, topk_child_total: 2, n_children_per_parent: 2}}, "
OTHER += "{name: flat, kind: topk, flat: {k: 30}, match: {params: baseline}}]"


@pytest.mark.parametrize(
    "changes, words",
    [
        (["hsae.subspace_dim=99999"], ["hsae.subspace_dim: found 99999, allowed: at most the width 256"]),
        (["hsae.subspace_dim=256", "arms=[{name: t, init: teacher}]"], ["found 256, allowed: at most 255, the width"]),
        (["training.batch_size=99999"], ["training.batch_size: found 99999, allowed: 1 to ", "(the rows of train)"]),
        (["hsae.n_parents=5"], ["hsae.n_parents: found 5, allowed: at least the teacher's 8 parents"]),
        (["hsae.n_parents=2000000000", "arms=[{name: baseline}]"], ["found 2000000000 (baseline", "what fits"]),
        (["corpus.context_length=999"], ["corpus.context_length: found 999, allowed: at most 512"]),
        (["model.hook=layers.9"], ["model.hook: found 'layers.9', allowed: layers.-6 to layers.5"]),
        (["model.hook=layers.x"], ["model.hook: no module 'layers.x'", "close matches: "]),
        (["model.hook=lm_head"], ["model.hook: found 'lm_head', the output head, whose rows are logits; allowed: "]),
        (["model.hook=model"], ["model.hook: 'model' gives BaseModelOutputWithPast, allowed: a tensor (1, 4) + "]),
        (["eval.steering.layers=[layers.9]"], ["eval.steering.layers: found 'layers.9', allowed: layers.-6 to"]),
        ([f"eval.steering.layers=[{ACT}]"], [f"eval.steering.layers: found {ACT} of width ", "allowed: width 256"]),
        ([f"arms={OTHER}"], ["arms.flat.flat.k: found 30, allowed: at most n_latents = "]),
        (["corpus.max_tokens=256", "corpus.split=[0.01, 0.01, 0.98]"], ["corpus.split: ", "empty"]),
    ],
)  # fmt: skip
def test_clashes_are_said_before_the_harvest(tmp_path, changes, words):
    answer = hsae("run", *SMOKE, *sets(*changes), "--out", tmp_path / "run")
    refused(answer, *words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_disk_without_room_and_memory_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: FREE(10**9, 10**9, 10**6))
    answer = hsae("run", *SMOKE, "--out", tmp_path / "run")
    refused(
        answer, "corpus.max_tokens: found 5,9", "rows of width 256, 6.3 MB of float32", "allowed: the 1.0 MB free on"
    )
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "memory_of", lambda device: 10**6)
    answer = hsae("run", *SMOKE, "--set", f"model.hook={ACT}", "--out", tmp_path / "run")
    refused(answer, f"model.hook: found '{ACT}' of width ", "of statistics, allowed: what fits into 1.0 MB")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_store_that_is_partly_there_needs_the_rest(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "activations"
    bytes_of_row = 16 * 2 + preflight.LABEL_BYTES
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: FREE(0, 0, 50 * bytes_of_row))
    preflight.require_disk(folder, 50, 16, "float16")  # nothing is there yet, not even the run folder
    with pytest.raises(ConfigError, match=r"51 rows of width 16, 3\.3 KB of float16 to be written"):
        preflight.require_disk(folder, 51, 16, "float16")
    folder.mkdir(parents=True)
    (folder / "train-00000.safetensors").write_bytes(b"0" * bytes_of_row)
    preflight.require_disk(folder, 51, 16, "float16")


@pytest.mark.parametrize("start_id", [None, 0])
def test_rows_are_known_before_the_harvest(tmp_path, start_id):
    starts = torch.tensor([0, 9, 30, 55, 58])
    documents = Documents(torch.randint(1, 60, (64,), dtype=torch.int32), starts, start_id)
    members = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]), "test": torch.tensor([3, 4])}
    store = harvest(
        tiny.language_model(), documents, None, tmp_path / "store", context_length=8, belief=False, members=members
    )
    rows = {split: store.n_rows(split) for split in members}
    assert planned_rows(documents, members, 8) == rows
    assert sum(rows.values()) < 64
    with pytest.raises(ValueError, match="corpus: the documents of val give no rows"):
        planned_rows(documents, {**members, "val": torch.tensor([], dtype=torch.int64)}, 8)


def test_a_precision_that_cannot_hold_the_rows(tmp_path):
    folder = tiny.save_family(tmp_path / "large", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e9
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changes = sets(f"model.name={folder}", "model.hook=layers.1", "data.dtype=float16")
    refused(
        hsae("run", *SMOKE, *changes, "--out", tmp_path / "run"),
        "data.dtype: found float16, which cannot hold the rows at layers.1, allowed: a wider one",
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_module_that_runs_twice_is_refused_before_the_harvest(tmp_path):
    """A harvest would end each pass at its first run; edits in phase 4 see both."""
    lm = tiny.language_model()
    layers = lm.model.model.layers
    layers[1].mlp.act_fn = layers[0].mlp.act_fn
    with pytest.raises(ConfigError, match=r"model.hook: 'model.layers.0.mlp.act_fn' ran 2 times in a pass"):
        preflight.hook_width(lm, "model.layers.0.mlp.act_fn", "float32")
    assert preflight.hook_width(lm, "model.layers.0.mlp.up_proj", "float32") == 32
    assert preflight.hook_width(lm, "layers.-1", "float32") == tiny.WIDTH


def test_a_rotation_needs_an_even_width():
    arms = "arms=[{name: teacher, init: teacher, teacher: {rotate_deg: 30}}]"
    config = load_config("smoke", [arms])
    with pytest.raises(ConfigError, match=r"teacher.rotate_deg: found 30.0, allowed: 0 at the odd width 31"):
        preflight.check_arms(config, 31, 10**12)
    preflight.check_arms(config, 32, 10**12)


def test_text_without_the_teachers_words_or_without_contexts_to_edit(tmp_path):
    nouns = {f"p{p}": {f"c{p}{c}": [f"w{9 * p + 3 * c + i}" for i in range(1, 4)] for c in range(3)} for p in range(2)}
    (tmp_path / "tree.json").write_text(json.dumps(nouns))
    model = tiny.save(tmp_path / "model")
    others = "\n\n".join(" ".join(f"w{40 + (7 * d + i) % 20}" for i in range(9)) for d in range(60))
    (tmp_path / "others.txt").write_text(others)
    changes = [f"model.name={model}", f"concepts.ontology={tmp_path}/tree.json", "corpus.source=text"]
    changes += ["corpus.max_tokens=600", "training.batch_size=8", "corpus.context_length=10", "hsae.subspace_dim=4"]
    inner = sets(*changes, f"corpus.path={tmp_path}/others.txt", "model.hook=layers.0")
    refused(
        hsae("run", *SMOKE, *inner, "--out", tmp_path / "run"),
        "concepts: found no train word of 2 parents in the train documents, allowed: one, for the teacher at layers.0",
    )
