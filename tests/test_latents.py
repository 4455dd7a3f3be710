"""What latents.json says: planted codes and words, with answers computed by plain loops, and a finished run's file."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fakes import Store
from models import factored

from polytope_hsae.config import LatentsConfig
from polytope_hsae.data import vocabulary
from polytope_hsae.data.vocabulary import TokenTexts, Words, significant
from polytope_hsae.evaluation.latents import UNNAMED, Lexicon, Names, describe_latents
from polytope_hsae.fileio import read_json
from polytope_hsae.geometry.causal import CausalGeometry, Space
from polytope_hsae.lm import FINAL_HOOK
from polytope_hsae.lm.loading import load_tokenizer
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE


class Rows(Store):
    """A store of the test split, read five rows at a time."""

    def __init__(self, acts, token, doc=None, pos=None):
        n = len(acts)
        doc, pos = ([0] * n if doc is None else doc), (range(n) if pos is None else pos)
        labels = {"token": token, "doc": doc, "pos": list(pos)}
        super().__init__(test={"acts": acts, **{name: torch.tensor(column) for name, column in labels.items()}})

    def batches(self, split, batch_size):
        return super().batches(split, 5)


class Mirror:
    """A lexicon that answers with the direction itself, and tokens as t0, t1, …"""

    text = staticmethod("t{}".format)

    def reads(self, encoder_Ld, n):
        return [[["reads", value] for value in row[:n]] for row in encoder_Ld.tolist()]

    def writes(self, decoder_Ld, n):
        return [[["writes", value] for value in row[:n]] for row in decoder_Ld.tolist()]


# -- codes: where latents fire

DOC = [0] * 5 + [1] * 5 + [2] * 3
POS = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 7]  # a gap before the last row
TOKEN = [7, 8, 9, 7, 8, 7, 9, 9, 8, 7, 4, 4, 9]
PARENT = {  # codes by row, of three parents of which the last is silent
    0: {1: 2.0, 2: 5.0, 6: 3.0, 12: 4.0},
    1: {row: 1.0 for row in range(10)},
}
CHILD = {0: {2: 1.5, 12: 2.5}, 1: {6: 0.12345}, 2: {4: 1.0, 9: 1.0}}  # by p * 2 + j
OPTIONS = LatentsConfig(parents=3, contexts=4, window=2, words=3)


def planted():
    """An H-SAE of 3 parents with 2 children each whose codes on row r are those of PARENT and CHILD."""
    config = factored(n_parents=3, topk_parent=2, n_children_per_parent=2, subspace_dim=2)
    sae = HierarchicalSAE(config, 4, seed=3).eval()
    dense_P, dense_R = torch.zeros(13, 3), torch.zeros(13, 6)
    for dense, codes in ((dense_P, PARENT), (dense_R, CHILD)):
        for latent, by_row in codes.items():
            for row, value in by_row.items():
                dense[row, latent] = value

    def encode(h):
        row = h[:, 0].long()
        index = torch.arange(6).expand(len(row), -1)
        return Codes(index[:, :3], dense_P[row], index, dense_R[row])

    sae.encode = encode
    return sae


def described(names=None, options=OPTIONS):
    store = Rows(torch.arange(13.0)[:, None].expand(13, 4), TOKEN, DOC, POS)
    return describe_latents(planted(), store, "test", Mirror(), names or Names({}, {}), options)


def test_usage_and_shares_of_planted_codes():
    found = described()
    assert (found["architecture"], found["n_parents"], found["n_children"]) == ("HierarchicalSAE", 3, 2)
    assert found["usage"] == [significant(4 / 13), significant(10 / 13), 0]
    assert [parent["latent"] for parent in found["parents"]] == [0, 1]  # the silent one has nothing to say
    first = found["parents"][0]
    assert (first["share"], first["mean_value"]) == (significant(4 / 13), 3.5)
    assert [child["index"] for child in first["children"]] == [0, 1]
    assert [child["share_of_parent"] for child in first["children"]] == [0.5, 0.25]
    assert [child["share_of_parent"] for child in found["parents"][1]["children"]] == [0.2, 0]


def test_tokens_that_a_latent_fires_on():
    """Mean code over all rows of a token; tokens with fewer than three rows are left out."""
    by_token = {token: [row for row in range(13) if TOKEN[row] == token] for token in TOKEN}
    for latent, found in zip((0, 1), described()["parents"], strict=True):
        means = {
            token: sum(PARENT[latent].get(row, 0) for row in rows) / len(rows)
            for token, rows in by_token.items()
            if len(rows) >= 3
        }
        best = sorted((token for token in means if means[token]), key=lambda token: (-means[token], token))
        assert found["fires_on"] == [[f"t{t}", significant(means[t]), len(by_token[t])] for t in best[:3]]
    assert described()["parents"][0]["children"][0]["fires_on"] == [["t9", 1.0, 4]]
    assert described(options=LatentsConfig(words=1))["parents"][0]["fires_on"] == [["t9", 3.0, 4]]


def test_contexts_come_from_distinct_documents_first():
    first, second = described()["parents"]
    assert [(c["doc"], c["pos"]) for c in first["contexts"]] == [(0, 3), (2, 7), (1, 2), (0, 2)]
    windows = [(c["tokens"], c["values"]) for c in first["contexts"]]
    assert windows[0] == (["t7", "t8", "t9", "t7", "t8"], [0, 2, 5, 0, 0])
    assert windows[1] == (["t9"], [4])  # what stands before it in the store does not stand before it in the document
    assert windows[2] == (["t7", "t9", "t9", "t8"], [0, 3, 0, 0])  # the rows before are another document's
    assert windows[3] == (["t7", "t8", "t9", "t7"], [0, 2, 5, 0])
    # equal codes: the earlier row, and one document after the other
    assert [(c["doc"], c["pos"]) for c in second["contexts"]] == [(0, 1), (1, 1), (0, 2), (0, 3)]
    child = first["children"][0]
    assert [(c["doc"], c["pos"]) for c in child["contexts"]] == [(2, 7), (0, 3)]  # two of a child
    assert first["children"][1]["contexts"][0]["values"] == [0, 0.123, 0, 0]
    assert len(described(options=LatentsConfig(contexts=1))["parents"][0]["contexts"]) == 1


def test_named_parents_are_always_described_and_then_the_most_used():
    name = {**UNNAMED, "concept": 5, "mapped": True, "purity": 0.25}
    found = described(Names({2: name}, {2: [8, None]}), LatentsConfig(parents=2))["parents"]
    assert [parent["latent"] for parent in found] == [1, 2]
    assert {key: found[0][key] for key in UNNAMED} == UNNAMED
    assert {key: found[1][key] for key in UNNAMED} == name
    silent = found[1]
    assert (silent["share"], silent["mean_value"], silent["fires_on"], silent["contexts"]) == (0, None, [], [])
    assert [(child["concept"], child["share_of_parent"]) for child in silent["children"]] == [(8, None), (None, None)]
    assert [p["latent"] for p in described(Names({2: name, 0: name}, {}), LatentsConfig(parents=1))["parents"]] == [
        0,
        2,
    ]


def test_flat_models_have_no_children():
    flat = TopKSAE(TopKConfig(n_latents=6, k=2), 4).eval()
    store = Rows(torch.randn(13, 4, generator=torch.Generator().manual_seed(0)), TOKEN, DOC, POS)
    found = describe_latents(flat, store, "test", Mirror(), Names({}, {}), OPTIONS)
    assert found["n_children"] == 0
    assert len(found["parents"]) == 3
    assert all(parent["children"] == [] for parent in found["parents"])
    active_NP = flat.encode(store.acts("test", slice(None))).dense_parents(6) > 0
    assert found["usage"] == [significant(float(share)) for share in active_NP.double().mean(0)]


# -- words


def naive(ids, rows, directions, metric, count):
    """Causal cosines word by word; `metric` [d, d] measures the rows, its inverse the directions."""
    lengths = [float(torch.sqrt(row @ metric @ row)) for row in rows]
    least = float(np.quantile(lengths, 0.25))
    answers = []
    for direction in directions:
        size = float(torch.sqrt(direction @ torch.linalg.inv(metric) @ direction))
        scores = {
            token: float(row @ direction) / (max(length, least) * size)
            for token, row, length in zip(ids, rows, lengths, strict=True)
        }
        answers.append(sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:count])
    return answers


def same(found, expected):
    assert [[token for token, _ in best] for best in found] == [[token for token, _ in best] for best in expected]
    for best, answer in zip(found, expected, strict=True):
        assert [score for _, score in best] == pytest.approx([score for _, score in answer], abs=6e-4)


@pytest.fixture
def unembedding():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.tensor([3.0, 2, 1, 1, 0.3])
    )
    rows[11] = rows[3]  # two tokens of one row: the smaller comes first
    rows[20:25] *= 1e-3  # tokens that were never trained
    return rows


@pytest.mark.parametrize("scores_at_once", [1 << 24, 20])
def test_words_are_ranked_by_causal_cosine(unembedding, monkeypatch, scores_at_once):
    monkeypatch.setattr(vocabulary, "_SCORES", scores_at_once)
    geometry = CausalGeometry(unembedding)
    mean = unembedding.double().mean(0)
    centred = unembedding.double() - mean
    directions = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).double()
    directions[2] = geometry.sigma.inverse() @ centred[3]
    words = Words(torch.arange(40), unembedding, mean, geometry, Space.COVECTOR)
    found = words.top(directions, 4)
    same(found, naive(range(40), centred, directions, geometry.sigma.inverse(), 4))
    assert [token for token, _ in found[2]][:2] == [3, 11]
    assert found[2][0][1] == pytest.approx(1, abs=1e-5)


class Numbered:
    """Token 7 is ` 7`."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def convert_ids_to_tokens(self, token):
        return f"\u2581{token}"


def model(unembedding, has_head=True):
    return SimpleNamespace(
        has_head=has_head,
        unembedding=unembedding,
        vocab_size=len(unembedding),
        width=unembedding.shape[1],
        tokenizer=Numbered(len(unembedding) - 2),
        named=torch.arange(len(unembedding)) < len(unembedding) - 2,
    )


def numbers(lists):
    return [[(int(text.removeprefix(" ")), score) for text, score in best] for best in lists]


def test_words_at_the_final_residual_are_unembedding_rows(unembedding):
    geometry = CausalGeometry(unembedding[:38])  # no token names the last two rows
    lexicon = Lexicon(model(unembedding), FINAL_HOOK, geometry, Rows(torch.zeros(9, 5), [1] * 9), "test", None)
    centred = unembedding[:38].double() - unembedding[:38].double().mean(0)
    inverse = torch.linalg.inv(geometry.sigma)
    covectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    expected = naive(range(38), centred, covectors.double() @ inverse, inverse, 6)
    same(numbers(lexicon.reads(covectors, 6)), expected)
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    same(numbers(lexicon.writes(vectors, 6)), naive(range(38), centred, vectors.double(), inverse, 6))
    assert numbers(lexicon.reads(centred[[8]].float(), 1))[0][0] == (8, pytest.approx(1, abs=1e-3))
    assert "next-token logits" in lexicon.how_writes
    assert "unembedding row" in lexicon.how_reads


def test_words_at_an_inner_hook_are_mean_activations(unembedding):
    generator = torch.Generator().manual_seed(6)
    tokens = [token for token in range(12) for _ in range(4 if token == 2 else 5 + token)]
    planted = torch.randn(12, 5, generator=generator)
    acts = planted[tokens] + 0.1 * torch.randn(len(tokens), 5, generator=generator)
    order = torch.randperm(len(tokens), generator=generator)
    store = Rows(acts[order], torch.tensor(tokens)[order].tolist())
    train_mean = torch.full((5,), 0.5, dtype=torch.float64)
    geometry = CausalGeometry(unembedding)
    lexicon = Lexicon(model(unembedding), "layers.1", geometry, store, "test", train_mean)
    ids = [token for token in range(12) if token != 2]  # four rows are too few
    means = torch.stack([acts[[t == token for t in tokens]].double().mean(0) for token in ids]) - train_mean
    second = means.T @ means / len(ids)
    second = 0.95 * second + 0.05 * second.trace() / 5 * torch.eye(5).double()
    encoder = torch.randn(4, 5, generator=generator)
    same(numbers(lexicon.reads(encoder, 5)), naive(ids, means, encoder.double(), torch.linalg.inv(second), 5))
    assert "mean activation" in lexicon.how_reads
    assert "logit lens" in lexicon.how_writes
    assert len(lexicon.writes(encoder, 5)[0]) == 5


def test_what_has_no_words_says_why(unembedding):
    geometry, mean = CausalGeometry(unembedding), torch.zeros(5, dtype=torch.float64)
    store = Rows(torch.randn(12, 5, generator=torch.Generator().manual_seed(7)), [1] * 6 + [2] * 6)
    headless = Lexicon(model(unembedding, has_head=False), FINAL_HOOK, geometry, store, "test", mean)
    assert headless.how_writes == "Nothing: the language model has no output head."
    assert headless.writes(torch.ones(2, 5), 3) == [[], []]
    assert "mean activation" in headless.how_reads
    assert len(headless.reads(torch.ones(2, 5), 3)[0]) == 2
    wide = Rows(torch.randn(4, 7), [1, 2, 3, 4])
    inner = Lexicon(model(unembedding), "mlp", geometry, wide, "test", torch.zeros(7, dtype=torch.float64))
    assert inner.how_writes == "Nothing: rows of mlp have width 7, the unembedding's 5."
    assert inner.writes(torch.ones(1, 7), 3) == inner.reads(torch.ones(1, 7), 3) == [[]]


def test_tokens_keep_their_leading_space():
    text = TokenTexts(load_tokenizer("textbook-lm-9m"))
    for word in (" horse", "ing", " the", "<|endoftext|>", "\n"):
        (token,) = text.tokenizer.encode(word, add_special_tokens=False)
        assert text(token) == word
    assert TokenTexts(Numbered(9))(4) == " 4"
    assert TokenTexts(tiny.tokenizer())(4) == "w4"
    assert TokenTexts(SimpleNamespace(convert_ids_to_tokens=lambda token: None))(4) == "<4>"


# -- a finished run


def test_latents_of_a_finished_run_agree_with_its_other_files(finished):
    latents, results = (read_json(finished / f"phase4/{name}.json") for name in ("latents", "results"))
    steering = read_json(finished / "phase4/steering.json")["arms"]
    concepts = read_json(finished / "phase1/concepts.json")["parents"]
    assert [latents[key] for key in ("hook", "label", "split")] == [results[key] for key in ("hook", "label", "split")]
    for name, arm in latents["arms"].items():
        metrics = results["arms"][name]
        silent = sum(share == 0 for share in arm["usage"]) / arm["n_parents"]
        assert silent == pytest.approx(metrics["dead_parents"]["value"])
        mapped = {parent["concept"]: parent for parent in arm["parents"] if parent["mapped"]}
        for record in steering[name]:
            assert mapped[record["parent"]]["latent"] == record["latent"]
        for metric in ("purity", "leakage", "recall"):
            values = [parent[metric] for parent in mapped.values() if parent[metric] is not None]
            assert sum(values) / len(values) == pytest.approx(metrics[metric]["value"])
        for parent in arm["parents"]:
            assert parent["share"] == arm["usage"][parent["latent"]]
            assert (parent["contexts"] == []) == (parent["share"] == 0)

    def of_teacher(name):
        return latents["arms"][name]["parents"][: len(concepts)]

    first = 0
    for slot, (parent, concept) in enumerate(zip(of_teacher("teacher"), concepts, strict=True)):
        assert parent["latent"] == slot
        assert parent["concept"] == slot or parent["mapped"]
        rows = list(range(first, first + len(concept["children"])))
        first += len(rows)
        assert [child["concept"] for child in parent["children"]] == (rows + [None] * 6)[:6]
    for name in ("baseline", "permuted_teacher"):  # a control's slots do not hold what their names would say
        parents = latents["arms"][name]["parents"]
        assert all(parent["concept"] is None for parent in parents if not parent["mapped"])
        assert all(child["concept"] is None for parent in parents for child in parent["children"])
