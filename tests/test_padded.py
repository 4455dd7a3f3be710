"""Rows of the unembedding that no token names stay out of everything but the model's own distribution."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from running import hsae
from safetensors.torch import load_file, save_file
from test_families import settings
from test_family_hooks import SMALLEST, few_nouns, tree  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polytope_hsae.fileio import read_json, read_tensors
from polytope_hsae.lm import LanguageModel

PADDING = 1024


def with_holes(ids: list[int]) -> PreTrainedTokenizerFast:
    """Words with these ids; the last one is an added token, the first one special."""
    vocab = {f"w{i}": i for i in ids[:-1]}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=f"w{ids[0]}"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=f"w{ids[0]}", unk_token=f"w{ids[0]}")
    made.add_tokens(["added"])
    return made


def test_special_and_added_tokens_have_names_and_padding_has_none():
    whole = tiny.language_model()
    assert (whole.named, whole.n_named) == (slice(tiny.VOCAB), whole.vocab_size)
    assert whole.unembedding[whole.named].data_ptr() == whole.unembedding.data_ptr()  # nothing is copied
    model = tiny.model("llama")
    first = LanguageModel(model, with_holes([0, 1, 2, 3]), name="first", has_head=True)
    assert (first.named, first.n_named) == (slice(4), 4)  # 0 is special, 3 was added
    holes = LanguageModel(model, with_holes([0, 2, 5, 6]), name="holes", has_head=True)
    assert holes.named.tolist() == sorted([0, 2, 5, holes.tokenizer.convert_tokens_to_ids("added")])
    assert holes.n_named == 4
    assert torch.equal(holes.unembedding[holes.named], holes.unembedding[[*holes.named.tolist()]])


@pytest.fixture(scope="module")
def runs(tree, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """The same language model twice, the second time with 1,024 large rows more that no token names."""
    folder = tmp_path_factory.mktemp("padded")
    plain = tiny.save_family(folder / "plain" / "model", "gpt_neox")
    padded = tiny.save_family(folder / "padded" / "model", "gpt_neox")
    weights = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        extra = 0.5 + torch.randn(PADDING, weights[name].shape[1], generator=generator)
        weights[name] = torch.cat([weights[name], extra])
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    config = read_json(padded / "config.json")
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + PADDING}))
    for name in ("plain", "padded"):
        changes = settings(f"model.name={folder}/{name}/model", f"concepts.ontology={tree}", *SMALLEST)
        answer = hsae("run", "smoke", *changes, "--out", folder / name / "run")
        assert answer.code == 0, answer.err
        rows = 8 + PADDING * (name == "padded")
        assert answer.out.count(f"phase 1: no token names {rows:,} of ") == 1, answer.out
    return {name: folder / name / "run" for name in ("plain", "padded")}


def test_a_padded_vocabulary_moves_no_number_but_the_models_own(runs):
    evidences = [read_json(run / "phase1/evidence.json") for run in runs.values()]
    assert [found.pop("unnamed_rows") for found in evidences] == [8, 8 + PADDING]
    assert evidences[0] == evidences[1]
    for name in ("phase1/geometry.safetensors", "phase1/teacher.safetensors", "phase3/teacher/model/model.safetensors"):
        first, second = (read_tensors(run / name)[0] for run in runs.values())
        assert all(torch.equal(first[key], second[key]) for key in first), name
    plain, padded = (read_json(run / "phase4/results.json")["arms"] for run in runs.values())
    for arm, metrics in plain.items():
        for name in ("ev", "ev_causal", "purity", "probe_min"):
            assert padded[arm][name] == metrics[name], (arm, name)
        for key in ("value", "chance"):
            assert padded[arm]["ev_logit"][key] == pytest.approx(metrics["ev_logit"][key], abs=1e-5)
        assert padded[arm]["ce_clean"]["value"] > metrics["ce_clean"]["value"] + 0.01  # the softmax is the model's
        assert padded[arm]["ce_clean"]["chance"] == metrics["ce_clean"]["chance"]
    words = [json.dumps(read_json(run / "phase4/latents.json")) for run in runs.values()]
    assert words[0] == words[1]
