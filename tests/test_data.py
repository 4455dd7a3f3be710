"""Corpus, harvest, store and stream. A tiny model and its concepts: tests/tiny.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from polytope_hsae.config import load_config
from polytope_hsae.data.corpus import Documents, context_batches, context_ids, contexts, load_documents, split_documents
from polytope_hsae.data.harvest import harvest
from polytope_hsae.data.store import LABELS, ActivationStore
from polytope_hsae.data.stream import RowStream
from polytope_hsae.fileio import read_json, write_tensors
from polytope_hsae.lm import FINAL_HOOK
from polytope_hsae.lm.loading import load_tokenizer, tokenizer_sha256
from polytope_hsae.phases.run import load_corpus

CONTEXT = 8
THRESHOLD = 0.15
SETTINGS = {
    "context_length": CONTEXT,
    "batch_tokens": 64,
    "shard_rows": 60,
    "split": (0.6, 0.2, 0.2),
    "seed": 3,
    "belief_threshold": THRESHOLD,
}


def documents(n: int = 30, seed: int = 0) -> Documents:
    """Documents of 3 to 20 random tokens after the start token 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (n,), generator=generator)
    parts = [torch.cat([torch.tensor([0]), torch.randint(1, 60, (int(m),), generator=generator)]) for m in lengths]
    starts = torch.cat([torch.tensor([0]), (lengths + 1).cumsum(0)[:-1]])
    return Documents(torch.cat(parts).int(), starts, 0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def lm():
    return tiny.language_model("llama")


@pytest.fixture(scope="module")
def store(lm, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store") / "activations"
    return harvest(lm, documents(), tiny.concepts(), folder, **SETTINGS)


def test_token_files_are_read_or_encoded_anew(tmp_path) -> None:
    path = tmp_path / "tokens.safetensors"
    packaged, sha = tiny.packaged_tokenizer(), tokenizer_sha256("textbook-lm-9m")
    words = packaged(["w3 w4 w5", "w6 w7"], add_special_tokens=False)["input_ids"]
    stored = [[0, *ids] for ids in words]
    tensors = {
        "tokens": torch.tensor(stored[0] + stored[1], dtype=torch.int32),
        "doc_start": torch.tensor([0, len(stored[0])]),
    }
    write_tensors(path, tensors, {"tokenizer_sha256": sha})
    sizes = {"max_tokens": 100, "context_length": CONTEXT}
    same = load_documents("tokens", path, packaged, tokenizer_sha256=sha, **sizes)
    assert same.tokens.tolist() == stored[0] + stored[1]
    other = load_documents("tokens", path, tiny.tokenizer(), tokenizer_sha256="another", **sizes)
    assert other.tokens.tolist() == [0, 3, 4, 5, 0, 6, 7]
    assert same.sha256() != other.sha256()
    for metadata, says in (
        ({"tokenizer_sha256": "unknown"}, "neither the model's nor packaged"),
        (None, "lacks tokens, doc_start or the metadata"),
    ):
        write_tensors(path, tensors, metadata)
        with pytest.raises(ValueError, match=says):
            load_documents("tokens", path, packaged, tokenizer_sha256=sha, **sizes)


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        ("csv", "a.csv", "corpus.source: found 'csv', allowed: tokens, text, jsonl, parquet, hub"),
        ("text", "nowhere", "corpus.path: no such file"),
        ("text", None, "corpus.path: found null"),
        ("parquet", Path(__file__), r'parquet needs .*pip install "polytope-hsae\[data\]"'),
        ("hub", "me/words", r'hub needs .*pip install "polytope-hsae\[data\]"'),
    ],
)
def test_corpora_that_are_not_there_are_refused(monkeypatch, source, path, says) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=says):
        load_documents(source, path, tiny.tokenizer(), max_tokens=10, context_length=CONTEXT)


def test_documents_are_split_completely_and_repeatably() -> None:
    shares = (0.7, 0.2, 0.1)
    parts = split_documents(100, shares, 5)
    assert {name: part.numel() for name, part in parts.items()} == {"train": 70, "val": 20, "test": 10}
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(100))
    assert torch.equal(parts["val"], split_documents(100, shares, 5)["val"])
    assert not torch.equal(parts["val"], split_documents(100, shares, 6)["val"])
    with pytest.raises(ValueError, match="three positive fractions that sum to 1"):
        split_documents(100, (0.7, 0.2, 0.2), 5)
    with pytest.raises(ValueError, match="2 documents leave a split"):
        split_documents(2, shares, 5)


@pytest.mark.parametrize("start_id", [0, None])
def test_contexts_cover_every_token_once(start_id: int | None) -> None:
    docs = documents()
    docs = Documents(docs.tokens, docs.starts, start_id)
    rows = contexts(docs, torch.arange(docs.n_documents), CONTEXT)
    seen = [context_ids(docs, row) for row in rows]
    assert max(ids.numel() for ids in seen) == CONTEXT
    if start_id == 0:
        assert all(int(ids[0]) == 0 for ids in seen)
        body = torch.cat([ids[1:] for ids in seen])
        assert body.tolist() == docs.tokens[docs.tokens != 0].tolist()
    places = torch.cat([torch.arange(o, o + n) for _, o, n in rows.tolist()])
    assert places.unique().numel() == places.numel()
    batches = list(context_batches(docs, rows, 40))
    assert sorted(i for members, _, _ in batches for i in members.tolist()) == list(range(len(rows)))
    for members, ids_BT, mask_BT in batches:
        assert ids_BT.numel() <= 40
        for member, ids, mask in zip(members.tolist(), ids_BT, mask_BT, strict=True):
            assert ids[mask.bool()].tolist() == seen[member].tolist()
    with pytest.raises(ValueError, match=r"corpus.context_length: found 1"):
        contexts(docs, torch.arange(3), 1)


def test_every_row_holds_what_the_model_computes(lm, store: ActivationStore) -> None:
    docs, concepts = documents(), tiny.concepts()
    tokens_of_child = concepts.child_tokens()
    beliefs = 0
    for split, doc_ids in split_documents(docs.n_documents, SETTINGS["split"], SETTINGS["seed"]).items():
        column = {name: store.column(split, name) for name in LABELS}
        acts, row = store.acts(split, torch.arange(store.n_rows(split))), 0
        for context in contexts(docs, doc_ids, CONTEXT):
            ids = context_ids(docs, context)
            captured = lm.capture(ids[None], FINAL_HOOK, logits=True)
            probs = captured.logits[0].softmax(-1)
            for t in range(1, ids.numel()):
                doc, pos = int(column["doc"][row]), int(column["pos"][row])
                assert doc == int(context[0])
                assert int(docs.tokens[docs.starts[doc] + pos]) == int(ids[t]) == int(column["token"][row])
                assert int(column["next_token"][row]) == (int(ids[t + 1]) if t + 1 < ids.numel() else -1)
                torch.testing.assert_close(acts[row], captured.acts[0, t], rtol=1e-4, atol=1e-5)
                child, token, mass = brute_force_belief(probs[t], tokens_of_child, concepts.child_parent_R)
                assert float(column["belief_prob"][row]) == pytest.approx(mass, rel=1e-4)
                assert int(column["belief_token"][row]) == token
                assert int(column["belief_concept"][row]) == (child if mass >= THRESHOLD else -1)
                beliefs += mass >= THRESHOLD
                row += 1
        assert row == store.n_rows(split)
    assert 10 < beliefs < sum(store.n_rows(split) for split in ("train", "val", "test"))


def brute_force_belief(probs: Tensor, tokens_of_child: list[list[int]], parents: list[int]) -> tuple[int, int, float]:
    mass: dict[int, float] = {}
    for child, tokens in enumerate(tokens_of_child):
        mass[parents[child]] = mass.get(parents[child], 0.0) + sum(float(probs[t]) for t in tokens)
    parent = max(mass, key=lambda p: mass[p])
    own = [child for child in range(len(parents)) if parents[child] == parent]
    child = max(own, key=lambda c: sum(float(probs[t]) for t in tokens_of_child[c]))
    return child, max((t for c in own for t in tokens_of_child[c]), key=lambda t: float(probs[t])), mass[parent]


def test_an_inner_hook_has_the_same_beliefs_and_no_head_has_none(lm, store: ActivationStore, tmp_path) -> None:
    inner = harvest(lm, documents(), tiny.concepts(), tmp_path / "inner", hook="model.layers.0", **SETTINGS)
    assert torch.equal(inner.column("train", "belief_concept"), store.column("train", "belief_concept"))
    assert not torch.allclose(inner.acts("train", torch.arange(5)), store.acts("train", torch.arange(5)))
    half = {**SETTINGS, "dtype": "bfloat16"}
    off = harvest(lm, documents(), None, tmp_path / "off", belief=False, **half)
    assert set(off.column("test", "belief_concept").tolist()) == {-1}
    assert set(off.column("test", "belief_prob").tolist()) == {0.0}
    assert off.manifest["belief"] is False
    torch.testing.assert_close(
        off.acts("train", torch.arange(9)), store.acts("train", torch.arange(9)).bfloat16().float()
    )


KILLED = """
import os, signal, sys
import test_data, tiny
from polytope_hsae.data.harvest import harvest
def kill(done, total):
    if done > total * 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
harvest(tiny.language_model("llama"), test_data.documents(), tiny.concepts(), sys.argv[1], progress=kill,
        **test_data.SETTINGS)
"""


def test_a_killed_harvest_goes_on_with_the_same_bytes(lm, store: ActivationStore, tmp_path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / ".train-00001.safetensors.0a0a0a0a.tmp").write_bytes(b"left by a kill")
    with pytest.raises(ValueError, match="the harvest is not complete"):
        ActivationStore.open(tmp_path)
    finished = read_json(tmp_path / "manifest.json")["shards"][0]["file"]
    before = (tmp_path / finished).stat().st_mtime_ns
    harvest(lm, documents(), tiny.concepts(), tmp_path, **SETTINGS)
    assert files(tmp_path) == files(store.folder)
    assert (tmp_path / finished).stat().st_mtime_ns == before
    harvest(lm, documents(), tiny.concepts(), tmp_path, progress=lambda *at: pytest.fail("harvested again"), **SETTINGS)
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()


def test_a_harvest_of_other_settings_is_refused(lm, store: ActivationStore, tmp_path) -> None:
    beyond = Documents(torch.tensor([0, 1, tiny.VOCAB], dtype=torch.int32), torch.tensor([0]), 0)
    huge = tiny.language_model("llama")
    huge.model.model.norm.weight.data.fill_(1e6)
    other_start = Documents(documents().tokens, documents().starts, None)
    for model, docs, change, says in (
        (lm, documents(), {"hook": "model.layers.1"}, f"with hook '{FINAL_HOOK}', asked for 'model.layers.1'"),
        (lm, documents(), {"seed": 4}, "harvested with seed 3, asked for 4"),
        (lm, documents(), {"dtype": "int8"}, "data.dtype: found 'int8'"),
        (lm, documents(seed=9), {}, "documents_sha256"),
        (lm, other_start, {}, "harvested with start_id 0, asked for None"),
        (lm, beyond, {}, rf"corpus: found token 64, allowed: 0 to {tiny.VOCAB - 1}, what tiny-llama"),
        (huge, documents(), {"dtype": "float16"}, "float16 cannot hold the activations"),
    ):
        folder = tmp_path / "huge" if model is huge else store.folder
        with pytest.raises(ValueError, match=says):
            harvest(model, docs, tiny.concepts(), folder, **{**SETTINGS, **change})


def test_broken_shards_are_refused_by_file_name(lm, tmp_path) -> None:
    """Those of a run: tests/test_bad_input.py."""
    with pytest.raises(ValueError, match=r"no manifest\.json, not an activation store"):
        ActivationStore.open(tmp_path)
    store = harvest(lm, documents(), tiny.concepts(), tmp_path, **SETTINGS)
    path = tmp_path / "val-00000.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"val-00000\.safetensors: the shard is missing or truncated"):
        harvest(lm, documents(), tiny.concepts(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"val-00000\.safetensors: not a complete safetensors file"):
        store.acts("val", torch.tensor([0]))


def test_rows_come_in_the_order_asked_for_and_moments_are_exact(store: ActivationStore) -> None:
    n = store.n_rows("train")
    whole = torch.cat([acts for acts, _ in store.batches("train", 37)])
    assert whole.shape == (n, store.width)
    assert whole.dtype == torch.float32
    assert [start for _, start in store.batches("train", 37)] == list(range(0, n, 37))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:70]
    order[3] = order[4]
    assert torch.equal(store.acts("train", order), whole[order])
    assert store.acts("train", order[:0]).shape == (0, store.width)
    mean, square = store.moments("train", batch_size=31)
    torch.testing.assert_close(mean, whole.double().mean(0))
    assert square == pytest.approx(float((whole.double() - whole.double().mean(0)).square().sum(1).mean()))
    with pytest.raises(ValueError, match=rf"allowed: 0 to {n - 1}"):
        store.acts("train", torch.tensor([n]))
    with pytest.raises(ValueError, match="split: found 'dev', allowed: train, val, test"):
        store.n_rows("dev")
    with pytest.raises(ValueError, match="column: found 'acts'"):
        store.column("train", "acts")
    with pytest.raises(ValueError, match="batch_size: found 0"):
        next(store.batches("train", 0))


def test_every_epoch_visits_every_row_once_in_another_order(store: ActivationStore) -> None:
    n = store.n_rows("train")
    stream = RowStream(store, "train", 16, 7, window_rows=130)
    rows = torch.cat([stream.next_rows() for _ in range(2 * n // 16 + 1)])
    first, second = rows[:n], rows[n : 2 * n]
    for epoch in (first, second):
        assert epoch.sort().values.tolist() == list(range(n))
    assert not torch.equal(first, second)
    # Two shards of at most 60 rows fit into a window of 130: its rows come from two shards.
    bounds = torch.tensor(store.shard_bounds("train"))
    assert torch.bucketize(first[:60], bounds, right=True).unique().numel() == 2


def test_a_stream_goes_on_exactly_where_it_stopped(store: ActivationStore) -> None:
    def stream(seed: int = 7) -> RowStream:
        return RowStream(store, "train", 16, seed, window_rows=130)

    n = store.n_rows("train")
    whole = stream()
    expected = [whole.next() for _ in range(3 * n // 16)]
    assert torch.equal(expected[0], store.acts("train", stream().next_rows()))
    for stop in (0, 1, n // 16, n // 16 + 1, 2 * n // 16):
        before = stream()
        for _ in range(stop):
            before.next()
        state = json.loads(json.dumps(before.state_dict()))
        after = stream()
        after.load_state_dict(state)
        assert all(torch.equal(after.next(), batch) for batch in expected[stop:])
    assert not torch.equal(stream(8).next(), expected[0])
    with pytest.raises(ValueError, match=r"stream.seed: the checkpoint has 7, this stream has 8"):
        stream(8).load_state_dict(whole.state_dict())


def test_bad_stream_sizes_are_refused(store: ActivationStore) -> None:
    n = store.n_rows("val")
    for size in (0, n + 1):
        with pytest.raises(ValueError, match=rf"training\.batch_size: found {size}, allowed: 1 to {n}"):
            RowStream(store, "val", size, 0)
    with pytest.raises(ValueError, match="window_rows: found 0"):
        RowStream(store, "val", 1, 0, window_rows=0)


def test_held_out_documents_come_from_a_file_of_their_own_and_no_longer_than_asked(tmp_path):
    for name, n, words in (("train", 3, 50), ("heldout", 4, 90)):
        texts = [" ".join(["the horse"] * (words + i)) for i in range(n)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    paths = [f"corpus.path={tmp_path / 'train.txt'}", f"corpus.heldout_path={tmp_path / 'heldout.txt'}"]
    config = load_config("smoke", ["corpus.source=text", *paths, "corpus.heldout_document_tokens=40"])
    tokenizer = load_tokenizer("textbook-lm-9m")
    documents, members = load_corpus(config, tokenizer, None)
    assert [len(members[split]) for split in ("train", "val", "test")] == [3, 2, 2]
    assert set(members["train"].tolist()) == {0, 1, 2}
    assert documents.lengths[3:].tolist() == [40] * 4
    assert documents.lengths[:3].min() > 90
    # of one file that is divided, the val and test documents are shortened and the others are whole
    one = ["corpus.source=text", paths[0], "corpus.split=[0.34, 0.33, 0.33]", "corpus.heldout_document_tokens=40"]
    documents, members = load_corpus(load_config("smoke", one), tokenizer, None)
    assert documents.lengths[torch.cat([members["val"], members["test"]])].tolist() == [40, 40]
    assert documents.lengths[members["train"]].min() > 90
