"""`hsae run` on tiny random models of six families, and what `hsae` says of folders that hold no such model."""

import functools
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import Answer, hsae, refused
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from polytope_hsae.data import words as words_module
from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.corpus import load_documents
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.data.wordnet import load_wordnet, single_words, word_forms
from polytope_hsae.data.words import word_tokens
from polytope_hsae.evaluation.bootstrap import Resampling
from polytope_hsae.evaluation.concepts import ConceptData, evaluate_concepts
from polytope_hsae.fileio import read_json, read_tensors
from polytope_hsae.lm import LanguageModel
from polytope_hsae.lm import loading as lm_loading
from polytope_hsae.lm.loading import tokenizer_sha256
from polytope_hsae.models.base import SparseAutoencoder

FAMILIES = (*tiny.CAUSAL_FAMILIES, "bert")
NO_HEAD = "the language model has no output head"
NEEDS_LOGITS = ("ce_recovered", "delta_ce", "kl", "ce_clean", "steering_leakage", "sibling_kl", "steering_unreached")
ARMS = ["baseline", "flat_topk", "teacher", "permuted_teacher"]
SMALL = [
    "concepts.min_test_rows=2", "geometry.permutations=100", "training.batch_size=256", "hsae.n_parents=32",
    "training.baseline.stages=[{name: train, steps: 4}]",
    "training.teacher.stages=[{name: stabilise, steps: 2, freeze: [D, G]}, {name: adapt, steps: 2}]",
    "eval.bootstrap=100", "eval.lm_contexts=4", "eval.steering={target_nats: 0.5, contexts: 2, max_concepts: 2}",
    "eval.latents.parents=4",
]  # fmt: skip


def settings(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The packaged configs ask for two threads, which are slow where others use the cores; and the forms of all nouns
    are the same in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(words_module, "word_forms", functools.cache(word_forms))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer of BERT's kind."""
    return tiny.train_tokenizer()


@pytest.fixture(scope="module")
def smoke(wordpiece, tmp_path_factory) -> Callable[[str], tuple[Answer, Path]]:
    """What `hsae run smoke` said of a family's model, and its folder; one run per family. Read only."""

    @functools.cache
    def run(kind: str) -> tuple[Answer, Path]:
        folder = tmp_path_factory.mktemp(kind)
        model = tiny.save_family(folder / kind, kind, wordpiece if kind == "bert" else None)
        return hsae("run", "smoke", "--set", f"model.name={model}", "--out", folder / "run"), folder / "run"

    return run


@pytest.mark.parametrize("kind", FAMILIES)
def test_smoke_runs_on_a_model_of_any_family(smoke, kind):
    answer, run = smoke(kind)
    assert answer.code == 0, answer.err
    assert answer.err.count("\n") == (1 if kind == "bert" else 0), answer.err
    manifest = read_json(run / "activations/manifest.json")
    assert (manifest["model"], manifest["width"], manifest["complete"]) == (kind, 32, True)
    results = read_json(run / "phase4/results.json")
    assert list(results["arms"]) == ARMS
    for metrics in results["arms"].values():
        assert 0.2 < metrics["ev"]["value"] < 1
        assert metrics["l0"]["value"] == pytest.approx(8, abs=0.1)
        assert all(metric["value"] is not None or metric["why"] for metric in metrics.values())
        if kind != "bert":
            assert metrics["ce_clean"]["value"] > 5  # it knows nothing
    assert len(results["targets"]) == 5
    for name in ARMS:
        assert name in answer.out


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_random_model_has_no_evidence(smoke, kind):
    answer, run = smoke(kind)
    evidence = read_json(run / "phase1/evidence.json")
    main = evidence["main"]
    assert main["fraction_z_above_3"] <= 1 / 8
    assert (main["median_beta"], main["beta_ci95"], main["beta_inside"], main["omega"]) == (None, None, None, None)
    assert "z > 3" in main["why"]
    assert set(main["children"]["beta"]) == {None}
    assert f"median beta none ({main['why']})" in answer.out
    stand_in = "input embeddings (the model has no output head)"
    assert evidence["rows_of"] == (stand_in if kind == "bert" else "unembedding")
    targets = {target["name"]: target for target in read_json(run / "phase4/results.json")["targets"]}
    for name in ("purity_gain_pp", "leakage_reduction", "steering_leakage_reduction"):
        assert targets[name]["verdict"] != "PASS", targets[name]
        assert targets[name]["measured"] is not None or targets[name]["why"]


def test_purity_is_chance_on_random_models(smoke):
    found = [read_json(smoke(kind)[1] / "phase4/results.json")["arms"] for kind in FAMILIES]
    for name in ARMS:  # a run has four to six concepts of few rows: only all together say something
        over_chance = [arms[name]["purity"]["value"] - arms[name]["purity"]["chance"] for arms in found]
        assert abs(np.mean(over_chance)) < 0.15, (name, over_chance)


def test_an_encoder_gets_what_needs_no_logits(smoke, wordpiece):
    answer, run = smoke("bert")
    assert answer.err == (
        "warning: bert has no output head (BertForMaskedLM): its input embeddings stand in for the unembedding, "
        "and nothing that needs logits is available\n"
    )
    assert "phase 1: labels are current_token, not next_token: bert does not predict the next token\n" in answer.out
    results = read_json(run / "phase4/results.json")
    assert results["label"] == "current_token"
    for metrics in results["arms"].values():
        for name in NEEDS_LOGITS:
            assert (metrics[name]["value"], metrics[name]["why"]) == (None, NO_HEAD), name
        assert metrics["purity"]["value"] is not None
    steering = results["targets"][3]
    assert (steering["verdict"], steering["measured"], steering["why"]) == ("INCONCLUSIVE", None, NO_HEAD)
    assert read_json(run / "phase4/steering.json")["arms"] == {name: [] for name in ARMS}
    store = ActivationStore.open(run / "activations")
    assert store.manifest["belief"] is False
    assert set(store.column("train", "belief_concept").tolist()) == {-1}
    # A context starts with [CLS], which is not stored.
    assert not (store.column("train", "token") == wordpiece.cls_token_id).any()
    assert int(store.column("train", "pos").min()) == 1


# -- a parent that the corpus lacks


def test_a_parent_without_train_rows_is_left_out_of_the_teacher(tmp_path):
    model = tiny.save_family(tmp_path / "model", "llama")
    tokenizer = tiny.packaged_tokenizer()
    sizes = {"max_tokens": 3000, "context_length": 64, "tokenizer_sha256": tokenizer_sha256(str(model))}
    documents = load_documents("tokens", None, tokenizer, **sizes)
    counts = torch.bincount(documents.tokens, minlength=len(tokenizer))
    occurrences = {
        word: int(counts[ids].sum())
        for word, ids in sorted(word_tokens(tokenizer, single_words(load_wordnet("noun"))).items())
    }
    absent = [word for word, times in occurrences.items() if times == 0]
    frequent = sorted(occurrences, key=lambda word: -occurrences[word])
    tree = {"absent": _children(absent, 5), "thing": _children(frequent[:36], 4), "other": _children(frequent[36:], 3)}
    (tmp_path / "tree.json").write_text(json.dumps(tree))  # the largest parent comes first
    changes = settings(
        f"model.name={model}", "model.hook=layers.0", "corpus.max_tokens=3000", "corpus.context_length=64",
        f"concepts.ontology={tmp_path}/tree.json", "concepts.label=current_token", "concepts.split=[0.5, 0.2, 0.3]",
        "teacher.anchor=frozen", *SMALL, "concepts.min_test_rows=1",
        "arms=[{name: baseline}, {name: teacher, init: teacher}]",
    )  # fmt: skip
    run = tmp_path / "run"
    answer = hsae("phase1", "smoke", *changes, "--out", run)
    assert answer.code == 0, answer.err
    for phase in (2, 3, 4):
        assert hsae(f"phase{phase}", "smoke", *changes, "--out", run).code == 0
    assert "warning: parents without rows are left out of the teacher: absent\n" in answer.err

    teacher, metadata = read_tensors(run / "phase1/teacher.safetensors")
    assert json.loads(metadata["unseen_parents"]) == ["absent"]
    assert json.loads(metadata["parent_names"]) == ["thing", "other"]
    assert read_json(run / "phase3/teacher/train.json")["teacher_parents"] == [1, 2]
    assert read_json(run / "phase2/baseline/train.json")["teacher_parents"] == []
    sae = SparseAutoencoder.from_pretrained(run / "phase3/teacher/model")
    torch.testing.assert_close(sae.write_directions()[:2], teacher["parent.write"].float())

    # Phase 4 reads concept 1 in slot 0 and concept 2 in slot 1.
    store = ActivationStore.open(run / "activations")
    concepts = Concepts.from_json(read_json(run / "phase1/concepts.json"))
    data = ConceptData(store, concepts, "current_token", len(tokenizer), min_rows=1, resampling=Resampling(100))
    by_hand = evaluate_concepts(sae, data, np.array([-1, 0, 1]))
    metrics = read_json(run / "phase4/results.json")["arms"]["teacher"]
    assert metrics["purity_own_slots"] == by_hand.result.metrics["purity"].to_json()


def _children(words: list[str], each: int) -> dict[str, list[str]]:
    """Three children of `each` three-word groups, dealt out in turn."""
    return {f"{words[0]}-{number}": words[number : 9 * each : 3] for number in range(3)}


# -- folders and names that are refused


def configured(**changes: object) -> Callable[[Path], None]:
    """Changes fields of a folder's config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def without(pattern: str, **made: str) -> Callable[[Path], None]:
    """Deletes files, then makes others of this content."""

    def change(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()
        for name, content in made.items():
            (folder / name.replace("_dot_", ".")).write_text(content)

    return change


def _cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _a_shard_is_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    first = dict(list(weights.items())[::2])
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    place = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "model.safetensors").unlink()


def _special_tokens_only(folder: Path) -> None:
    """transformers makes a tokenizer for BERT out of nothing."""
    without("tokenizer*", vocab_dot_txt="")(folder)
    configured(model_type="bert", architectures=["BertModel"])(folder)


def _larger_tokenizer(folder: Path) -> None:
    shutil.copy(tiny.PACKAGED_TOKENIZER / "tokenizer.json", folder)


def _encoder_decoder(folder: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _sees_later_tokens(folder: Path) -> None:
    tiny.family("bert", tiny.tokenizer()).save_pretrained(folder)
    configured(architectures=["BertLMHeadModel"])(folder)


OWN_CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_fancy.FancyForCausalLM"}}


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (without("config.json"), "no config.json in"),
        (without("config.json", config_dot_json='{"model_type": "lla'), "is not valid JSON"),
        (configured(model_type="fancy"), "found model_type 'fancy', allowed: a type that transformers"),
        (configured(model_type="fancy", **OWN_CODE), "needs code of its own (auto_map)"),
        (configured(architectures=["FancyForCausalLM"], **OWN_CODE), "needs code of its own (auto_map)"),
        (configured(hidden_size="wide"), "Field 'hidden_size' expected int"),
        (configured(vocab_size=100), "embed_tokens.weight of shape (64, 16), allowed by its config.json: (100, 16)"),
        (configured(num_hidden_layers=3), "lack model.layers.2.input_layernorm.weight"),
        (without("model.safetensors"), "no model.safetensors in"),
        (without("model.safetensors", pytorch_model_dot_bin=""), "found pytorch_model.bin, allowed: safetensors"),
        (_cut_off, "model.safetensors in"),
        (_a_shard_is_missing, "1 of 2 shards are missing in"),
        (without("tokenizer*"), "no tokenizer in"),
        (_special_tokens_only, "no tokenizer in"),
        (_larger_tokenizer, "found token 16383, allowed: at most 63, the last row of its embedding"),
        (_encoder_decoder, "found an encoder-decoder (t5)"),
        (_sees_later_tokens, "is loaded as a BertLMHeadModel but sees later tokens"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, broken, says):
    folder = tiny.save(tmp_path / "my-model")
    broken(folder)
    answer = hsae("run", "smoke", "--set", f"model.name={folder}", "--out", tmp_path / "run")
    refused(answer, "model.name: ", "my-model", says)
    assert answer.out == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_hub_id_without_the_hub_is_refused_at_once(tmp_path, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(lm_loading, "getproxies", dict)
    started = time.monotonic()
    for name in ("nobody/no-such-model", "no-such-model"):
        answer = hsae("run", "smoke", "--set", f"model.name={name}", "--out", tmp_path / "run")
        refused(answer, f"model.name: no folder '{name}'", "the hub is out of reach")
    # What was downloaded before is found.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--someone--tiny"
    tiny.save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(lm_loading.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    lm = LanguageModel.load("someone/tiny")
    assert (lm.name, lm.revision, lm.width) == ("someone/tiny", commit, tiny.WIDTH)
    assert time.monotonic() - started < 20
    monkeypatch.setattr(lm_loading, "getproxies", lambda: {"https": "http://proxy"})
    assert lm_loading._hub_answers()  # the proxy will say
