"""Any saved models side by side on a finished run: equal to phase 4 where that measured them; bad input in one line."""

import shutil
from pathlib import Path

import pytest
from running import files

from polytope_hsae.config import ConfigError
from polytope_hsae.fileio import read_json
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.phases.compare import compare_models
from polytope_hsae.phases.run import Run


def test_models_are_measured_as_phase_4_measures_them(run, finished):
    before, results = files(finished), read_json(finished / "phase4/results.json")
    folders = {"phase3/teacher/model": "teacher", "phase2/flat_topk/model": "flat_topk"}
    found = compare_models(run, [finished / folder for folder in folders])
    assert files(finished) == before
    assert found["run"] == {
        **{key: results[key] for key in ("model", "hook", "label", "split")},
        "seed": results["seeds"][0],
    }
    assert list(found["models"]) == ["teacher/model", "flat_topk/model"]
    for (folder, arm), model in zip(folders.items(), found["models"].values(), strict=True):
        own = {key: metric for key, metric in results["arms"][arm].items() if not key.endswith("_own_slots")}
        assert model["metrics"] == own
        train = read_json(finished / folder / "../train.json")
        assert model["parameters"] == train["parameters"]
        assert model["path"] == str(finished / folder)
    assert [model["architecture"] for model in found["models"].values()] == ["HierarchicalSAE", "TopKSAE"]
    other = compare_models(run, [finished / "phase2/baseline/model"], "val")
    assert other["run"]["split"] == "val"
    assert other["models"]["model"]["metrics"]["ev"] != results["arms"]["baseline"]["ev"]


def test_bad_input_is_refused_in_one_line(run, finished, tmp_path):
    model = finished / "phase2/baseline/model"
    for folders, words in (
        ([], "models: found none, allowed: one folder or more"),
        ([model, finished / "phase3/../phase2/baseline/model"], "twice, allowed: folders that differ"),
        ([model, tmp_path / "nothing"], "nothing: found no config.json, allowed: the folder of a saved model"),
        ([finished / "phase2/baseline"], "baseline: found no config.json"),
        ([Path("owner/name")], "owner/name: found no config.json"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            compare_models(run, folders)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"^split: found 'train', allowed: val, test$"):
        compare_models(run, [model], "train")
    TopKSAE(TopKConfig(n_latents=8, k=2), 7).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"narrow: width: found 7, allowed: \d+, the width of the activations in "):
        compare_models(run, [tmp_path / "narrow"])
    config = tmp_path / "narrow/config.json"
    config.write_text(config.read_text().replace("TopKSAE", "Other"))
    with pytest.raises(ValueError, match="architecture: found 'Other', allowed: BatchTopKSAE, HierarchicalSAE"):
        compare_models(run, [tmp_path / "narrow"])


def test_a_run_without_phase_1_is_refused(finished, tmp_path):
    shutil.copy(finished / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="phase 1: not finished in this run folder"):
        compare_models(Run.open(tmp_path, "cpu", quiet=True), [finished / "phase2/baseline/model"])
