"""Paths: relative ones mean the working directory, a run can be used from any folder, and content is what counts."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from running import contents, hsae, refused
from tiny import packaged_texts

from polytope_hsae.config import load_config
from polytope_hsae.data.corpus import PACKAGED_TOKENIZER
from polytope_hsae.fileio import read_json
from polytope_hsae.provenance import dependencies
from polytope_hsae.sweep.plan import Sweep, stated_config

ONTOLOGY = {
    "animal": {"pet": ["dog", "cat", "horse"], "wild": ["wolf", "lion", "bear"], "water": ["fish", "whale", "shark"]},
    "body": {"limb": ["hand", "arm", "leg"], "face": ["eye", "nose", "mouth"], "inside": ["heart", "brain", "blood"]},
}
NAMES = {"model.name": "lm", "corpus.path": "text.txt", "concepts.ontology": "words.yaml"}
SMALL = {
    "run.threads": 1,
    "corpus.source": "text",
    "corpus.max_tokens": 3000,
    "concepts.min_test_rows": 1,
    "arms": json.dumps([{"name": "baseline"}, {"name": "teacher", "init": "teacher"}]),
}


def options(paths: dict[str, object]) -> list[str]:
    return [word for key, value in {**SMALL, **paths}.items() for word in ("--set", f"{key}={value}")]


def inputs(folder: Path) -> Path:
    """A folder with a language model, text and an ontology."""
    folder.mkdir(parents=True)
    shutil.copytree(PACKAGED_TOKENIZER, folder / "lm")
    (folder / "text.txt").write_text("\n\n".join(packaged_texts(60)))
    (folder / "words.yaml").write_text(yaml.safe_dump(ONTOLOGY))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with inputs and `run`, made there with relative paths. Read only."""
    folder = inputs(tmp_path_factory.mktemp("places") / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = hsae("run", "smoke", *options(NAMES), "--out", "run")
    assert answer.code == 0, answer.err
    return folder


def test_relative_paths_are_resolved_when_a_config_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()
    texts = {"corpus.source": "text", "corpus.heldout_path": "../held.txt"}
    words = {"concepts.prompts": "a/b.yaml", "concepts.nltk_data": "n"}
    config = load_config("smoke", [f"{key}={value}" for key, value in {**NAMES, **texts, **words}.items()])
    assert config.model.name == str(tmp_path / "lm")
    assert config.corpus.path == str(tmp_path / "text.txt")
    assert config.corpus.heldout_path == str(tmp_path.parent / "held.txt")
    of_concepts = [config.concepts.ontology, config.concepts.prompts, config.concepts.nltk_data]
    assert of_concepts == [str(tmp_path / name) for name in ("words.yaml", "a/b.yaml", "n")]
    assert config.model.title == "lm"
    assert load_config("smoke", ["concepts.exclude=out.txt"]).concepts.exclude == str(tmp_path / "out.txt")
    assert load_config("smoke", ["concepts.exclude=[dog, cat]"]).concepts.exclude == ["dog", "cat"]
    (tmp_path / "my.yaml").write_text("corpus: {source: text, path: text.txt}")
    assert load_config("my.yaml").corpus.path == str(tmp_path / "text.txt")
    assert load_config("smoke", ["corpus.source=text", "corpus.path=~/a.txt"]).corpus.path == str(Path.home() / "a.txt")


def test_names_are_no_paths():
    fields = "model.name=owner/model", "corpus.source=hub", "corpus.path=owner/data:train", "concepts.prompts=packaged"
    config = load_config("smoke", list(fields))
    assert (config.model.name, config.model.title) == ("owner/model", "owner/model")
    assert (config.corpus.path, config.concepts.prompts) == ("owner/data:train", "packaged")
    assert (config.concepts.ontology, config.concepts.nltk_data) == ("wordnet", None)
    assert dependencies(config, 1)["corpus.path"] == "owner/data:train"
    assert dependencies(config, 1)["model.name"] == "owner/model"


def test_a_run_is_used_from_another_folder(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    answer = hsae("evaluate", made / "run/phase2/baseline/model", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["run"]["model"] == "lm"
    assert hsae("report", "run").code == 0
    monkeypatch.chdir(tmp_path / "run")  # where the report's commands are typed
    answer = hsae("phase1", "config.yaml", "--set", "run.seed=1", "--out", "../run-next-seed")
    assert answer.code == 0, answer.err


def test_the_same_files_by_another_path_are_done_before(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    moved = inputs(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path / "run")
    for paths in (made, moved):
        answer = hsae("run", "smoke", *options({key: paths / name for key, name in NAMES.items()}), "--out", "run")
        assert answer.code == 0, answer.err
        assert answer.out.count("done before") == 4
        assert str(paths / "text.txt") in (tmp_path / "run/config.yaml").read_text()
    after = contents(tmp_path / "run")
    assert {name for name in after if after[name] != before[name]} == {"config.yaml"}


@pytest.mark.parametrize("field", NAMES)
def test_other_content_at_the_same_path_is_refused(made, tmp_path, monkeypatch, field):
    shutil.copytree(made / "run", tmp_path / "run")
    folder = inputs(tmp_path / "other")
    monkeypatch.chdir(folder)
    changed = folder / ("lm/config.json" if field == "model.name" else NAMES[field])
    changed.write_text(changed.read_text() + "\n")
    before = contents(tmp_path / "run")
    for command in ("run", "phase2", "phase4"):
        answer = hsae(command, "smoke", *options(NAMES), "--out", tmp_path / "run")
        refused(answer, field, "--force")
    assert contents(tmp_path / "run") == before


def test_runs_in_different_folders_have_the_same_bytes_and_no_paths(made, tmp_path, monkeypatch):
    other = inputs(tmp_path / "elsewhere" / "deeper")
    monkeypatch.chdir(other)
    assert hsae("run", "smoke", *options(NAMES), "--out", "run").code == 0
    first, second = contents(made / "run"), contents(other / "run")
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == {"config.yaml"}
    for path in (other / "run").rglob("*"):
        if path.is_file() and path.name not in ("config.yaml", "report.html"):
            assert str(tmp_path).encode() not in path.read_bytes(), path
    for name in ("activations/manifest.json", "phase4/results.json", "phase1/evidence.json"):
        assert read_json(other / "run" / name)["model"] == "lm"


def stated(config: str, fields: dict) -> dict:
    tree = {"name": "a", "config": config, "hooks": ["layers.1"], "arms": [{"name": "b"}], "set": fields}
    return stated_config(Sweep.model_validate(tree), "layers.1")


def test_paths_do_not_count_among_a_sweeps_settings():
    fields = {"concepts.prompts": "a.yaml", "concepts.exclude": "b.txt", "corpus.heldout_path": "c.txt"}
    elsewhere = {field: f"/elsewhere/{path}" for field, path in fields.items()}
    assert stated("smoke", fields) == stated("smoke", elsewhere) == stated("smoke", {})
    words = stated("smoke", {"concepts.exclude": ["dog"], "concepts.prompts": "packaged"})
    assert words == stated("smoke", {}) | {"concepts.exclude.0": "dog", "concepts.prompts": "packaged"}
