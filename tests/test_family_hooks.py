"""`hsae run` on tiny random models of 24 families, at a block and inside one, where rows may have another width.

`make test-families` runs them all; without the marker eight of them run, chosen for what they differ in.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from running import hsae, refused
from test_families import one_thread, settings  # noqa: F401

from polytope_hsae.fileio import read_json
from polytope_hsae.phases import phase1_teacher

# Family, a module inside its second block, and the width of that module's rows; None: it has no such rows.
INSIDE: dict[str, tuple[str, int | None]] = {
    "llama": ("model.layers.1.mlp.act_fn", 64),
    "qwen3": ("model.layers.1.mlp.up_proj", 64),
    "qwen3_moe": ("model.layers.1.mlp.experts.act_fn", None),
    "gemma2": ("model.layers.1.mlp.act_fn", 64),
    "gemma3_text": ("model.layers.1.mlp.up_proj", 64),
    "gpt2": ("transformer.h.1.mlp.act", 128),
    "gptj": ("transformer.h.1.mlp.fc_in", 128),
    "codegen": ("transformer.h.1.mlp.act", 128),
    "gpt_neox": ("gpt_neox.layers.1.mlp.act", 64),
    "mistral": ("model.layers.1.mlp.act_fn", 64),
    "opt": ("model.decoder.layers.1.fc1", None),
    "phi": ("model.layers.1.mlp.activation_fn", 64),
    "bloom": ("transformer.h.1.mlp.dense_h_to_4h", 128),
    "mpt": ("transformer.blocks.1.ffn.act", 128),
    "falcon": ("transformer.h.1.mlp.act", 128),
    "olmo2": ("model.layers.1.mlp.act_fn", 64),
    "cohere": ("model.layers.1.mlp.up_proj", 64),
    "granite": ("model.layers.1.mlp.act_fn", 64),
    "gpt_oss": ("model.layers.1.mlp.experts", None),
    "mamba": ("backbone.layers.1.mixer.in_proj", 128),
    "rwkv": ("rwkv.blocks.1.feed_forward.key", 64),
    "bert": ("encoder.layer.1.intermediate.dense", 64),
    "electra": ("encoder.layer.1.intermediate.dense", 64),
    "sharded-llama": ("model.layers.1.mlp.up_proj", 64),
}
# Frequent words of the packaged text, dealt out: a random model has no hierarchy anyway.
WORDS = [
    *("event", "technology", "music", "film", "movie", "world", "work", "war", "story", "state", "material", "end"),
    *("show", "section", "energy", "star", "song", "school", "place", "people", "model", "love", "history", "year"),
    *("wife", "union", "time", "thought", "thing", "team", "sister", "series", "point", "man", "interest", "house"),
    *("gold", "figure", "door", "disc", "country", "company", "character", "chapter", "business", "area", "action"),
    "woman",
]
TREE = {f"p{p}": {f"c{p}{c}": WORDS[3 * p + c :: 12] for c in range(3)} for p in range(4)}
EMBEDDED = {"opt": 16, "electra": 16}  # width of the unembedding, where that is not 32, the blocks'
ALWAYS = ("qwen3_moe", "gemma3_text", "opt", "mpt", "mamba", "rwkv", "electra", "sharded-llama")
SMALLEST = [
    "corpus.max_tokens=5000", "corpus.context_length=64", "concepts.label=current_token", "concepts.min_test_rows=1",
    "training.batch_size=128", "hsae.n_parents=16", "training.val_rows=64",
    "training.baseline.stages=[{name: train, steps: 4}]",
    "training.teacher.stages=[{name: stabilise, steps: 2, freeze: [D, G]}, {name: adapt, steps: 2}]",
    "arms=[{name: baseline}, {name: teacher, init: teacher}]",
    "eval.lm_contexts=3", "eval.steering={target_nats: 0.3, contexts: 2, context_length: 12, max_concepts: 2}",
    "eval.latents={parents: 3, contexts: 1}",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_nouns() -> Iterator[None]:
    """Evidence draws from few words of one to eight tokens: all nouns of WordNet would take most of the time."""
    words = {f"{first}": list(range(first, first + 1 + first // 8 % 8)) for first in range(304, 3504, 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase1_teacher, "load_graphs", lambda *_: {})
        patch.setattr(phase1_teacher, "graph_tokens", lambda *_: {"noun": words})
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tree") / "tree.json"
    path.write_text(json.dumps(TREE))
    return path


def save(folder: Path, family: str) -> Path:
    if family == "sharded-llama":
        return tiny.save_family(folder, "llama", dtype=torch.float16, max_shard_size="500KB")
    return tiny.save_family(folder, family)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.families) for name in INSIDE]
)
def test_a_block_and_a_module_inside_one(family, tree, tmp_path):
    model = save(tmp_path / "model", family)
    inside, width = INSIDE[family]
    of_encoder, embedded = family in tiny.ENCODERS, EMBEDDED.get(family, 32)
    for hook, rows_of in (("layers.0", 32), (inside, width)):
        run = tmp_path / hook
        changes = settings(f"model.name={model}", f"model.hook={hook}", f"concepts.ontology={tree}", *SMALLEST)
        answer = hsae("run", "smoke", *changes, "--out", run)
        if rows_of is None:
            refused(answer, f"model.hook: '{inside}' ")
            assert [path.name for path in run.iterdir()] == ["config.yaml"]
            continue
        assert answer.code == 0, answer.err
        assert "Traceback" not in answer.err
        assert read_json(run / "activations/manifest.json")["width"] == rows_of
        arms = read_json(run / "phase4/results.json")["arms"]
        assert list(arms) == ["baseline", "teacher"]
        for metrics in arms.values():
            assert 0 < metrics["ev"]["value"] < 1
            assert all(metric["value"] is not None or metric["why"] for metric in metrics.values())
            assert metrics["purity"]["value"] is not None
            assert (metrics["steering_unreached"]["value"] is None) == of_encoder
            causal = metrics["ev_causal"]
            assert (causal["value"] is not None) == (rows_of == embedded)
            assert causal["value"] is not None or f"width {rows_of}, the unembedding's {embedded}" in causal["why"]
        assert "<html" in (run / "report.html").read_text()
