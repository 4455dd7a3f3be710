"""Evaluation: known answers of metrics, intervals and verdicts, with small fakes for store and model."""

import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score
from transformers import LlamaConfig, LlamaForCausalLM

from polytope_hsae.evaluation import reconstruction
from polytope_hsae.evaluation.bootstrap import (
    Metric,
    Units,
    bootstrap_fraction,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_units,
    paired,
)
from polytope_hsae.evaluation.concepts import (
    auroc_matrix,
    concept_metrics,
    evaluate_concepts,
    labelled_rows,
    map_concepts,
)
from polytope_hsae.evaluation.pushing import Search, evenly_spaced, solve_alpha
from polytope_hsae.evaluation.reconstruction import (
    LM_METRICS,
    evaluate_reconstruction,
)
from polytope_hsae.evaluation.row_codes import SparseActivations, row_codes
from polytope_hsae.evaluation.steering import STEERING_METRICS, evaluate_steering
from polytope_hsae.evaluation.targets import MIN_UNITS, Thresholds, assess_targets, format_targets, verdict
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.lm import edits as lm_edits
from polytope_hsae.models.codes import Codes


class FakeStore:
    """Columns and activations by split, in memory."""

    def __init__(self, **splits):
        self.splits = splits

    def column(self, split, name):
        return self.splits[split][name]

    def acts(self, split, indices):
        return self.splits[split]["acts"][indices]

    def batches(self, split, batch_size):
        acts = self.splits[split]["acts"]
        for start in range(0, len(acts), batch_size):
            yield acts[start : start + batch_size], start


class FakeConcepts:
    """Parent 0 has children 0 and 1, parent 1 children 2 and 3; tokens[fold][child] lists ids."""

    def __init__(self, tokens, parents=(0, 0, 1, 1)):
        self.tokens, self.child_parent_R = tokens, list(parents)
        self.n_parents, self.n_children = max(parents) + 1, len(parents)

    def child_tokens(self, folds=("train", "val", "test")):
        return [
            sorted(token for fold in folds for token in self.tokens[fold][child]) for child in range(self.n_children)
        ]

    def token_to_child(self, vocab_size, folds=("train", "val", "test")):
        out = torch.full((vocab_size,), -1, dtype=torch.int32)
        for child, ids in enumerate(self.child_tokens(folds)):
            out[ids] = child
        return out


class FakeSAE:
    """Latent l is relu(h_l); decodes to scale * h, or to `offset`; child 0 of parent 0 copies its parent."""

    data_scale = torch.ones(())

    def __init__(self, width, n_parents=None, n_children=0, scale=1.0, offset=None, directions=None):
        self.width, self.n_parents, self.n_children = width, n_parents or width, n_children
        self.scale, self.offset, self.directions = scale, offset, directions
        self.h = None

    def encode(self, h):
        self.h = h
        index = torch.arange(self.n_parents).expand(len(h), -1)
        value = h[:, : self.n_parents].relu()
        child_index = index[:, :1] * self.n_children
        child_value = value[:, :1] if self.n_children else value[:, :0]
        return Codes(index, value, child_index[:, : child_value.shape[1]], child_value)

    def decode(self, codes):
        return self.h * self.scale if self.offset is None else self.offset.expand_as(self.h)

    def write_directions(self):
        return torch.eye(self.n_parents, self.width) if self.directions is None else self.directions


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LanguageModel(LlamaForCausalLM(config), tiny.tokenizer(), name="tiny", has_head=True)


@pytest.fixture(scope="module")
def ids(lm):
    """Contexts sampled from the model, so that ablating it costs cross-entropy."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (6, 1), generator=generator)
    for _ in range(9):
        probs = lm.model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], dim=1)
    return ids


# bootstrap


def evaluate_language_model(sae, *args, **kwargs):
    """One model through the function that takes several."""
    return reconstruction.evaluate_language_model({"arm": sae}, *args, **kwargs)["arm"]


def test_mean_interval_matches_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    metric = bootstrap_mean(values, n=4000, seed=3, chance=0.0)
    low, high = metric.ci95
    half = 1.96 * values.std() / 20
    assert metric.value == pytest.approx(values.mean())
    assert metric.n == 400
    assert metric.chance == 0.0
    assert (metric.value - low, high - metric.value) == pytest.approx((half, half), rel=0.1)
    assert bootstrap_mean(values, n=4000, seed=3) == bootstrap_mean(values, n=4000, seed=3)
    assert bootstrap_mean(values, n=4000, seed=4).ci95 != metric.ci95


def test_ratio_is_pooled_and_not_a_mean_of_ratios():
    metric = bootstrap_ratio([1.0, 9.0], [1.0, 99.0], n=200)
    assert metric.value == pytest.approx(0.1)
    assert metric.ci95[0] == pytest.approx(9 / 99)
    assert metric.ci95[1] == pytest.approx(1.0)


def test_many_resamples_of_many_units_are_drawn_in_blocks(monkeypatch):
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_mean(values, n=300, seed=5)
    monkeypatch.setattr("polytope_hsae.evaluation.bootstrap._DRAWS_AT_ONCE", 700)
    assert bootstrap_mean(values, n=300, seed=5).ci95 == pytest.approx(whole.ci95, abs=1e-12)


def test_paired_comparison_uses_the_same_resamples():
    rng = np.random.default_rng(2)
    size, loss = rng.integers(1, 50, 80), rng.random(80) * 10
    first, second = Units.ratio(loss, size), Units.ratio(0.7 * loss, size)
    reduction = paired(first, second, "relative_reduction", seed=1)
    assert reduction.value == pytest.approx(0.3)
    assert reduction.ci95 == pytest.approx((0.3, 0.3))
    assert paired(first, second, "ratio").value == pytest.approx(0.7)
    assert paired(first, second, "relative_change").value == pytest.approx(-0.3)
    difference = paired(first, second, "difference", seed=1)
    expected = bootstrap_units(Units.ratio(-0.3 * loss, size), seed=1)
    assert difference.ci95 == pytest.approx(expected.ci95)


def test_units_without_a_value_are_left_out_of_both_arms():
    first, second = Units.mean([1.0, math.nan, 3.0, 5.0]), Units.mean([2.0, 2.0, math.nan, 9.0])
    both = paired(first, second)
    assert both.value == pytest.approx(2.5)
    assert both.n == 2
    assert bootstrap_units(first).n == 3
    assert bootstrap_units(first).value == pytest.approx(3.0)
    with pytest.raises(ValueError, match="the same units in both arms"):
        paired(first, Units.mean([1.0] * 4, keys=[0, 1, 2, 4]))
    with pytest.raises(ValueError, match="three equal lengths"):
        Units.ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="found 0 resamples"):
        bootstrap_mean([1.0, 2.0], n=0)


def test_metrics_without_value_or_interval_say_why():
    assert bootstrap_mean([]).to_json() == {
        "value": None,
        "ci95": None,
        "chance": None,
        "n": 0,
        "why": "no units with a value",
    }
    assert bootstrap_ratio([1.0, 2.0], [0.0, 0.0]).why == "the denominator is zero"
    assert bootstrap_mean([4.0]).value == 4.0
    assert "one unit" in bootstrap_mean([4.0]).why
    assert json.dumps(bootstrap_mean([1.0, 2.0]).to_json(), allow_nan=False)
    share = bootstrap_fraction(30, 100, n=2000)
    assert share.value == 0.3
    assert share.ci95 == pytest.approx((0.21, 0.39), abs=0.015)
    assert bootstrap_fraction(0, 0).value is None


# reconstruction


def reconstruction_store():
    acts = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
    acts[:, 4] = -1.0  # latent 4 is never active
    return FakeStore(test={"acts": acts, "doc": torch.tensor([7] * 10 + [3] * 13)})


def test_ev_fvu_l0_and_dead_counts():
    store, mean = reconstruction_store(), torch.full((6,), 0.1)
    acts = store.acts("test", slice(None)).double()
    result = evaluate_reconstruction(FakeSAE(6, n_children=2, scale=0.5), store, "test", mean, batch_size=5)
    fvu = float((acts / 2).square().sum() / (acts - mean).square().sum())
    metrics = {name: metric.value for name, metric in result.metrics.items()}
    assert metrics["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert metrics["ev"] == pytest.approx(1 - fvu, rel=1e-5)
    active = float((acts > 0).sum() + (acts[:, 0] > 0).sum())
    assert metrics["l0"] == pytest.approx(active / 23)
    assert metrics["dead_parents"] == pytest.approx(1 / 6)
    # five routed parents have two children each; only the first child of parent 0 is ever active
    assert metrics["dead_children"] == pytest.approx(9 / 10)
    assert result.metrics["dead_children"].n == 10
    assert result.units["ev"].keys_U.tolist() == [3, 7]
    assert result.metrics["ev"].n == 2
    other = evaluate_reconstruction(FakeSAE(6, n_children=2, scale=0.5), store, "test", mean, batch_size=23)
    assert other.metrics["ev"].value == pytest.approx(metrics["ev"], rel=1e-6)


def test_reconstruction_refuses_bad_input_and_flat_models_have_no_children():
    store, mean = reconstruction_store(), torch.zeros(6)
    sae = FakeSAE(6)
    result = evaluate_reconstruction(sae, store, "test", mean)
    assert result.metrics["ev"].value == 1.0
    assert result.metrics["dead_children"].why == "a flat model has no children"
    empty = FakeStore(test={"acts": torch.zeros(0, 6), "doc": torch.zeros(0)})
    with pytest.raises(ValueError, match="found no rows in 'test'"):
        evaluate_reconstruction(FakeSAE(6), empty, "test", mean)


@pytest.mark.parametrize("hook", [FINAL_HOOK, "model.layers.0"])
def test_lm_metrics_of_a_perfect_and_of_a_constant_reconstruction(lm, ids, hook):
    mean = lm.capture(ids, hook).acts[:, 1:].mean((0, 1))
    documents = [0, 0, 1, 1, 2, 5]
    perfect = evaluate_language_model(FakeSAE(16), lm, hook, ids, mean, documents=documents, batch_size=4)
    assert perfect.metrics["ce_recovered"].value == pytest.approx(1, abs=1e-5)
    assert perfect.metrics["delta_ce"].value == pytest.approx(0, abs=1e-5)
    assert perfect.metrics["kl"].value == pytest.approx(0, abs=1e-5)
    assert perfect.metrics["kl"].n == 4
    assert perfect.units["kl"].keys_U.tolist() == [0, 1, 2, 5]
    constant = evaluate_language_model(FakeSAE(16, offset=mean), lm, hook, ids, mean, batch_size=4)
    assert constant.metrics["ce_recovered"].value == pytest.approx(0, abs=1e-5)
    assert perfect.metrics["ev_logit"].value == pytest.approx(1, abs=1e-5)
    assert constant.metrics["ev_logit"].value == pytest.approx(0, abs=1e-5)
    for name in ("kl", "delta_ce"):
        assert constant.metrics[name].value == pytest.approx(constant.metrics[name].chance, rel=1e-5)
        assert constant.metrics[name].value > 0.01
    log_p = lm.model(input_ids=ids).logits.log_softmax(-1)
    ce = -log_p[:, 1:-1].gather(-1, ids[:, 2:, None]).mean()
    assert constant.metrics["ce_clean"].value == pytest.approx(float(ce), rel=1e-5)


def test_ev_of_the_logits_is_that_of_the_centred_unembedding_at_the_final_residual(lm, ids):
    acts = lm.capture(ids, FINAL_HOOK).acts[:, 1:-1].reshape(-1, 16)
    mean = acts.mean(0)
    found = evaluate_language_model(FakeSAE(16, scale=0.7), lm, FINAL_HOOK, ids, mean, batch_size=4)
    centred = (lm.unembedding - lm.unembedding.mean(0)).T
    near, far = ((part @ centred).square().sum() for part in (0.3 * acts, acts - mean))
    assert found.metrics["ev_logit"].value == pytest.approx(float(1 - near / far), abs=1e-5)
    assert found.metrics["ev_logit"].chance == 0


def test_ce_recovered_is_null_where_ablation_costs_nothing(lm):
    noise = torch.randint(0, 40, (6, 10), generator=torch.Generator().manual_seed(1))
    result = evaluate_language_model(FakeSAE(16), lm, FINAL_HOOK, noise, torch.zeros(16))
    assert result.metrics["delta_ce"].chance < 0, "a random model is wrong about random tokens"
    assert result.metrics["ce_recovered"].value is None
    assert "nothing to recover" in result.metrics["ce_recovered"].why
    assert "ce_recovered" not in result.units


def test_lm_metrics_count_only_real_tokens(lm, ids):
    mean = torch.zeros(16)
    mask = torch.ones_like(ids)
    mask[:3, 6:] = 0
    part = evaluate_language_model(FakeSAE(16), lm, FINAL_HOOK, ids, mean, mask_NT=mask)
    assert part.units["kl"].denominator_U.tolist() == [4, 4, 4, 8, 8, 8]
    with pytest.raises(ValueError, match="found no position to count"):
        evaluate_language_model(FakeSAE(16), lm, FINAL_HOOK, ids, mean, mask_NT=(torch.arange(10) < 2).expand_as(ids))
    with pytest.raises(ValueError, match=r"found shape \(6, 2\)"):
        evaluate_language_model(FakeSAE(16), lm, FINAL_HOOK, ids[:, :2], mean)


def test_a_model_without_a_head_gets_nulls_with_a_reason(ids):
    headless = SimpleNamespace(has_head=False)
    result = evaluate_language_model(FakeSAE(16), headless, FINAL_HOOK, ids, torch.zeros(16))
    assert tuple(result.metrics) == LM_METRICS
    assert all(m.value is None and "no output head" in m.why for m in result.metrics.values())
    steering = evaluate_steering(FakeSAE(16), headless, FINAL_HOOK, None, [0], np.zeros(1, int), ids)
    assert tuple(steering.result.metrics) == STEERING_METRICS
    assert steering.records == []
    assert all("no output head" in m.why for m in steering.result.metrics.values())


# concepts


def sparse(dense):
    dense = np.asarray(dense, dtype=np.float32)
    return SparseActivations(np.broadcast_to(np.arange(dense.shape[1]), dense.shape), dense, dense.shape[1])


def test_auroc_equals_sklearn_with_ties_and_silent_latents():
    rng = np.random.default_rng(0)
    dense = np.maximum(rng.integers(-3, 4, size=(120, 7)), 0) * 0.5
    dense[:, 5] = 0
    dense[:, 6] = rng.random(120) + 1  # never zero
    labels = rng.integers(0, 4, 120)
    found = auroc_matrix(sparse(dense), labels, 5)
    for q in range(4):
        expected = [roc_auc_score(labels == q, dense[:, latent]) for latent in range(7)]
        assert found[q] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[4]).all()
    assert found[:4, 5] == pytest.approx(0.5)


def test_sparse_codes_give_dense_columns():
    acts = SparseActivations(np.array([[3, 0], [1, 3]]), np.array([[2.0, 0.0], [1.0, 4.0]], np.float32), 5)
    assert acts.columns(np.array([3, -1, 0, 1])).tolist() == [[2, 0, 0, 0], [4, 0, 0, 1]]


def test_hand_computed_concept_metrics():
    acts = [[4, 0], [2, 2], [0, 0], [1, 3]]
    metrics = concept_metrics(np.array(acts, np.float32), np.array([0, 0, 0, 1]), np.array([4, 9]))
    values = {name: metric.value for name, metric in metrics.metrics.items()}
    # concept 0: mean latent 0 is 2 at home, 1 away; latent 1 is 3 at home, 2/3 away
    assert values["purity"] == pytest.approx((2 / 3 + 3 / (3 + 2 / 3)) / 2)
    assert values["leakage"] == pytest.approx(((0 + 0.5) / 2 + 0.25) / 2)
    assert values["leakage_all_rows"] == pytest.approx(((0 + 0.5 + 1) / 3 + 0.25) / 2)
    assert values["recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["zero_sum_rows"] == pytest.approx(1 / 4)
    assert values["purity_auroc"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.metrics["purity"].chance == 0.5
    assert metrics.metrics["recall"].chance == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.units["purity"].keys_U.tolist() == [4, 9]


def test_a_perfect_code_and_permuted_labels():
    rng = np.random.default_rng(1)
    sizes = np.array([40, 60, 100, 200, 300])
    labels = np.repeat(np.arange(5), sizes)
    planted = np.zeros((700, 5), np.float32)
    planted[np.arange(700), labels] = 1 + rng.random(700)
    perfect = concept_metrics(planted, labels, np.arange(5)).metrics
    assert [perfect[name].value for name in ("purity", "leakage", "recall", "purity_auroc")] == [1, 0, 1, 1]
    noisy = planted + np.maximum(rng.normal(size=planted.shape), 0).astype(np.float32)
    noisy[rng.random(700) < 0.3] = 0
    of_chance = ("purity", "leakage", "leakage_all_rows", "purity_auroc")
    draws = []
    for _ in range(60):
        metrics = concept_metrics(noisy, rng.permutation(labels), np.arange(5), bootstrap=1).metrics
        draws.append([metrics[name].value - metrics[name].chance for name in of_chance])
    error = np.std(draws, axis=0) / math.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0)) < 3 * error).all()
    assert metrics["purity"].chance == pytest.approx(1 / 5)
    assert metrics["leakage"].chance == pytest.approx(4 / 5)


def test_silent_latents_and_too_few_concepts():
    acts = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    metrics = concept_metrics(acts, np.array([0, 1, 1]), np.arange(2))
    assert metrics.units["purity"].numerator_U.tolist() == [0.5, 0]
    assert metrics.units["recall"].numerator_U.tolist() == [1, 0]
    silent = concept_metrics(np.zeros((3, 2), np.float32), np.array([0, 1, 1]), np.arange(2))
    assert silent.metrics["leakage"].value is None
    assert silent.metrics["leakage_all_rows"].value == 1
    assert silent.metrics["zero_sum_rows"].value == 1
    assert silent.metrics["purity"].value == 0
    single = concept_metrics(acts[:, :1], np.zeros(3, int), np.arange(1))
    assert single.metrics["purity"].why == "2 concepts are needed, 1 has enough rows"


CONCEPTS = FakeConcepts(
    {"train": [[1], [2], [3], [4]], "val": [[], [], [], []], "test": [[11], [12], [13], [14]]},
)


def label_store():
    def split(tokens):
        token = torch.tensor(tokens * 30, dtype=torch.int32)
        acts = torch.zeros(len(token), 5)
        parent = torch.where(token % 10 < 3, 3, 1)  # the planted latents of parents 0 and 1
        acts[torch.arange(len(token)), parent] = 1.0
        acts[:, 0] = 0.5
        columns = {"acts": acts, "token": token, "doc": torch.arange(len(token)) // 8}
        columns["next_token"] = torch.cat([token[1:], torch.tensor([-1], dtype=torch.int32)])
        columns["belief_concept"] = torch.where(token == 13, 2, torch.where(token == 11, 0, -1)).int()
        columns["belief_token"] = torch.where(token == 13, 13, torch.where(token == 11, 1, -1)).int()
        columns["belief_prob"] = torch.where(token == 13, 0.4, 0.2)
        return columns

    return FakeStore(train=split([1, 2, 3, 4, 11, 14]), test=split([11, 12, 13, 14, 1, 4]))


def test_labels_by_kind_and_fold():
    store = label_store()

    def rows(**options):
        found = labelled_rows(store, "test", CONCEPTS, **{"fold": "test", "vocab_size": 20} | options)
        return list(zip(found.row_N.tolist(), found.parent_N.tolist(), strict=True))

    assert rows(label="current_token")[:5] == [(0, 0), (1, 0), (2, 1), (3, 1), (6, 0)]
    assert rows(label="next_token")[:5] == [(0, 0), (1, 1), (2, 1), (5, 0), (6, 0)]
    assert rows(label="next_token")[-1] == (176, 1)  # the last row predicts nothing
    assert rows(label="belief")[:2] == [(2, 1), (8, 1)]
    # a believed token of the train fold is no test label, whatever its probability
    assert rows(label="belief", belief_threshold=0.1)[:2] == [(2, 1), (8, 1)]
    assert rows(label="belief", belief_threshold=0.1, fold="train")[:2] == [(0, 0), (6, 0)]
    with pytest.raises(ValueError, match="label: found 'tokens', allowed: current_token, next_token, belief"):
        rows(label="tokens")


def test_concepts_end_to_end_find_the_planted_latents():
    store, sae = label_store(), FakeSAE(5)
    options = {"label": "current_token", "vocab_size": 20, "batch_size": 17}
    found = evaluate_concepts(sae, store, CONCEPTS, **options)
    assert found.latent_P.tolist() == [3, 1]
    assert found.parents_Q.tolist() == [0, 1]
    assert found.rows_Q.tolist() == [60, 60]
    assert [found.result.metrics[name].value for name in ("purity", "leakage", "recall")] == [1, 0, 1]
    assert found.to_json()[1]["latent"] == 1
    assert found.to_json()[1]["purity"] == 1.0
    slots = evaluate_concepts(sae, store, CONCEPTS, mapping=np.array([0, 1]), **options)
    assert slots.result.metrics["purity"].value == pytest.approx((0.5 + 1) / 2)
    empty_slot = evaluate_concepts(sae, store, CONCEPTS, mapping=np.array([-1, 1]), **options)
    assert empty_slot.result.units["recall"].numerator_U.tolist() == [0, 1]
    assert json.dumps(empty_slot.to_json(), allow_nan=False)
    few = evaluate_concepts(sae, store, CONCEPTS, min_rows=61, **options)
    assert few.result.metrics["purity"].value is None
    assert few.parents_Q.size == 0
    lacking = "2 of 2 parents have fewer than 61 labelled rows in train or test"
    assert few.lacking == lacking
    assert few.result.metrics["purity"].why == f"2 concepts are needed, 0 have enough rows: {lacking}"
    assert found.lacking == ""
    with pytest.raises(ValueError, match="found a repeated latent"):
        evaluate_concepts(sae, store, CONCEPTS, mapping=np.array([1, 1]), **options)
    with pytest.raises(ValueError, match="one latent for each of 2 parents"):
        evaluate_concepts(sae, store, CONCEPTS, mapping=np.array([1]), **options)


def test_the_map_is_one_to_one_and_needs_rows():
    labels = np.repeat([0, 1, 2], [30, 30, 5])
    dense = np.zeros((65, 3), np.float32)
    dense[:, 0] = np.where(labels == 0, 3, np.where(labels == 1, 2, 0))  # best for 0, second best for 1
    dense[:, 1] = np.where(labels == 1, 0.1, 0)
    assert map_concepts(sparse(dense), labels, 4, min_rows=20).tolist() == [0, 1, -1, -1]
    assert map_concepts(sparse(dense[:, :1]), labels, 4, min_rows=20).tolist() == [0, -1, -1, -1]
    nothing = row_codes(FakeSAE(3), FakeStore(), "train", np.zeros(0, np.int64))
    assert nothing.parents.columns(np.arange(3)).shape == (0, 3)


# steering


def test_alpha_is_found_for_known_effects():
    functions = [
        lambda a: a,
        lambda a: 0.01 * a**2,
        lambda a: 20 * math.tanh(a / 4),
        lambda a: 1 - math.exp(-a),
        lambda a: -a,
        lambda a: 6 / (1 + math.exp(-3 * (a - 12))),
    ]
    calls: list[int] = []

    def evaluate(concepts, alphas):
        calls.extend(concepts)
        return np.array([[functions[c](a), 2 * a, 0.0] for c, a in zip(concepts, alphas, strict=True)])

    found = solve_alpha(evaluate, len(functions), Search(3.0, 0.005, 40.0, 10))
    assert np.isnan(found.alpha_G).tolist() == [False, False, False, True, True, False]
    for c in (0, 1, 2, 5):
        assert functions[c](found.alpha_G[c]) == pytest.approx(3.0, abs=0.005)
        assert found.measured_GK[c, 1] == 2 * found.alpha_G[c]
    assert np.isnan(found.measured_GK[3]).all()
    assert max(calls.count(c) for c in range(5)) <= 4, "what is solved or out of reach leaves the batch"


class LinearHead:
    """A final residual that is read by U alone; a token's row of `acts` is its residual."""

    has_head, device, in_float32 = True, torch.device("cpu"), staticmethod(contextlib.nullcontext)

    def __init__(self, unembedding, acts):
        self.unembedding, self.table = unembedding, acts
        self.vocab_size = len(unembedding)

    def capture(self, ids, hook):
        return SimpleNamespace(acts=self.table[ids])

    def logits_from_final(self, acts):
        return acts @ self.unembedding.T


def linear_case(directions):
    concepts = FakeConcepts({"train": [[0], [1], [2], [3]], "val": [[]] * 4, "test": [[4], [], [5], []]})
    unembedding = torch.zeros(8, 4)
    unembedding[[0, 1, 4], 0] = 1.0  # dimension 0 moves all of parent 0, dimension 1 all of parent 1
    unembedding[[2, 3, 5], 1] = 1.0
    unembedding[0, 2], unembedding[6, 2] = 1.0, 0.5  # one child of parent 0, and a token of no concept
    unembedding[:, 3] = torch.linspace(-1, 1, 8)
    acts = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    lm = LinearHead(unembedding, acts)
    sae = FakeSAE(4, n_parents=len(directions), directions=torch.tensor(directions))
    return lm, sae, concepts, torch.arange(24).view(8, 3)


def test_a_clean_direction_has_no_leakage_and_alpha_is_known():
    lm, sae, concepts, ids = linear_case([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    found = evaluate_steering(
        sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids, tolerance=1e-3, max_evaluations=40
    )
    for record in found.records:
        assert record["alpha"] == pytest.approx(3.0, abs=2e-3)
        assert record["effect"] == pytest.approx(3.0, abs=1e-3)
        assert record["steering_leakage"] == pytest.approx(0, abs=1e-9)
        assert record["sibling_kl"] == pytest.approx(0, abs=1e-9)
        # the other direction only lowers the target's odds; backwards it raises them, at a price
        assert record["chance_effect"] is None or record["chance_steering_leakage"] > 0.01
    assert found.result.metrics["steering_unreached"].value == 0
    assert json.dumps(found.records, allow_nan=False)


def test_leakage_and_sibling_kl_equal_a_direct_computation():
    mixed = [math.sqrt(0.5), 0, math.sqrt(0.5), 0]
    lm, sae, concepts, ids = linear_case([mixed, [0.6, 0.8, 0, 0], [0, 0, 0, 1.0]])
    found = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids, max_norms=20)
    record = found.records[0]
    before = lm.table[ids[:, -1]].double() @ lm.unembedding.T.double()
    after = before + record["alpha"] * (lm.unembedding.double() @ torch.tensor(mixed).double())
    target, rest = [0, 1, 4], [2, 3, 5, 6, 7]
    p, q = before.softmax(-1), after.softmax(-1)
    odds = [torch.log(x[:, target].sum(-1) / x[:, rest].sum(-1)).mean() for x in (p, q)]
    assert float(odds[1] - odds[0]) == pytest.approx(record["effect"], abs=1e-5)
    assert record["effect"] == pytest.approx(3.0, abs=0.02)

    def kl(a, b):
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        return float((a * (a / b).log()).sum(-1).mean())

    assert record["steering_leakage"] == pytest.approx(kl(p[:, rest], q[:, rest]), abs=1e-6)
    # child 0 of parent 0 has tokens 0 and 4, child 1 has token 1
    mass = [torch.stack([x[:, 0] + x[:, 4], x[:, 1]], -1) for x in (p, q)]
    assert record["sibling_kl"] == pytest.approx(kl(*mass), abs=1e-6)
    assert record["sibling_kl"] > 0.01
    assert record["chance_effect"] is None or record["chance_effect"] == pytest.approx(3, abs=0.02)


def test_an_example_shows_the_likeliest_next_tokens_before_and_after():
    directions = [[0.6, 0, 0.8, 0], [0, -1.0, 0, 0]]
    lm, sae, concepts, ids = linear_case(directions)
    found = evaluate_steering(
        sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids, max_norms=20, text="t{}".format
    )
    record, unreached = found.records
    assert record["example"]["context"] == [f"t{token}" for token in ids[0].tolist()]
    before = lm.table[ids[0, -1]].double() @ lm.unembedding.T.double()
    after = before + record["alpha"] * (lm.unembedding.double() @ torch.tensor(directions[0]).double())
    for key, logits in (("before", before), ("after", after)):
        shares = logits.softmax(-1)
        best = sorted(range(8), key=lambda token: -float(shares[token]))[:5]
        assert [token for token, _ in record["example"][key]] == [f"t{token}" for token in best]
        assert [share for _, share in record["example"][key]] == pytest.approx(shares[best].tolist(), rel=6e-3)
        assert sum(share for _, share in record["example"][key]) <= 1
    assert unreached["alpha"] is unreached["example"] is None
    unmapped = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([-1, 0]), ids, max_norms=20)
    assert unmapped.records[0]["example"] is None


def test_unreached_and_unmapped_concepts_have_no_leakage():
    lm, sae, concepts, ids = linear_case([[-1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    found = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids)
    assert [record["alpha"] is None for record in found.records] == [True, False]
    assert found.result.metrics["steering_unreached"].value == 0.5
    assert found.result.metrics["steering_leakage"].n == 1
    unmapped = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([-1, 1]), ids)
    assert [record["steering_leakage"] is None for record in unmapped.records] == [True, False]
    assert np.isnan(unmapped.result.units["steering_leakage"].numerator_U).tolist() == [True, False]
    none = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([-1, -1]), ids)
    assert none.result.metrics["steering_leakage"].why == "no units with a value"
    assert none.result.metrics["steering_unreached"].value == 1
    stuck = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0], np.array([0, 1]), ids)
    assert stuck.result.metrics["steering_leakage"].why == "no units with a value"
    assert stuck.result.metrics["steering_unreached"].value == 1
    capped = evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids, max_concepts=1)
    assert [record["parent"] for record in capped.records] == [0]
    with pytest.raises(ValueError, match=r"found shape \(8, 1\)"):
        evaluate_steering(sae, lm, FINAL_HOOK, concepts, [0, 1], np.array([0, 1]), ids[:, :1])


def test_steering_at_an_inner_hook_agrees_with_the_final_hook(lm, ids):
    # the final norm's output is the final residual: both paths must give the same numbers
    concepts = FakeConcepts({"train": [[1], [2], [3], [4]], "val": [[]] * 4, "test": [[5], [6], [7], [8]]})
    target_V2 = torch.zeros(40, 2)
    target_V2[[1, 2, 5, 6], 0] = target_V2[[3, 4, 7, 8], 1] = 1.0
    directions = torch.nn.functional.normalize((torch.linalg.pinv(lm.unembedding) @ target_V2).T, dim=-1)
    sae = FakeSAE(16, n_parents=2, directions=directions)
    runs = [
        evaluate_steering(sae, lm, hook, concepts, [0, 1], np.array([0, 1]), ids, per_forward=per_forward)
        for hook, per_forward in ((FINAL_HOOK, 8), ("model.norm", 8), ("model.norm", 1))
    ]
    for other in runs[1:]:
        for first, second in zip(runs[0].records, other.records, strict=True):
            assert first["alpha"] is not None
            assert second["alpha"] == pytest.approx(first["alpha"], rel=1e-4)
            assert second["steering_leakage"] == pytest.approx(first["steering_leakage"], rel=1e-3)


def test_steering_at_an_inner_hook_runs_the_last_token_and_measures_the_same(lm, ids, monkeypatch):
    concepts = FakeConcepts({"train": [[1], [2], [3], [4]], "val": [[]] * 4, "test": [[5], [6], [7], [8]]})
    directions = torch.nn.functional.normalize(torch.stack([lm.unembedding[:4].sum(0), lm.unembedding[5]]), dim=-1)
    sae = FakeSAE(16, n_parents=2, directions=directions)
    options = {"max_norms": 50, "target_nats": 0.5}
    lengths = []
    handle = lm._modules["model.layers.1"].register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    runs = []
    for plain in (lm_edits._is_plain, lambda cache, length: False):
        monkeypatch.setattr(lm_edits, "_is_plain", plain)
        lengths.clear()
        found = evaluate_steering(sae, lm, "model.layers.0", concepts, [0, 1], np.array([0, 1]), ids, **options)
        runs.append(found.records)
        prefix = ids.shape[1] - 1  # it runs once for all contexts, and once for the examples'
        assert lengths.count(prefix) == 2
        assert set(lengths) - {prefix} == ({1} if len(runs) == 1 else {ids.shape[1]})
    handle.remove()
    assert any(record["alpha"] is not None for record in runs[0])
    for cached, full in zip(*runs, strict=True):
        examples = cached.pop("example"), full.pop("example")
        assert (None in examples) == (cached["alpha"] is None)
        if None not in examples:
            shares = [[share for _, share in example["after"]] for example in examples]
            assert shares[0] == pytest.approx(shares[1], rel=1e-2)
        for name, value in full.items():
            assert cached[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), name
        assert cached["effect"] is None or abs(cached["effect"] - 0.5) <= 0.02


def test_the_steered_concepts_are_evenly_spaced_in_file_order():
    assert evenly_spaced([3, 5, 8, 9, 12], 3) == [3, 8, 12]
    assert evenly_spaced([3, 5, 8], 3) == evenly_spaced([3, 5, 8], None) == [3, 5, 8]
    assert evenly_spaced(range(57), 20) == sorted(set(evenly_spaced(range(57), 20)))
    assert evenly_spaced(range(57), 20)[-1] == 56


# targets


def test_verdicts():
    def found(ci95, required, n=MIN_UNITS):
        return verdict(Metric(1.0, ci95, None, n), required)

    assert found((81, 99), (80, 100)) == "PASS"
    assert found((70, 79.9), (80, 100)) == "FAIL"
    assert found((101, 102), (80, 100)) == "FAIL"
    assert found((79, 99), (80, 100)) == "INCONCLUSIVE"
    assert found((10, 11), (10, None)) == "PASS"
    assert found((-1, 9), (10, None)) == "FAIL"
    assert found(None, (10, None)) == "INCONCLUSIVE"
    for n in (2, MIN_UNITS - 1):
        assert {found(ci95, (80, 100), n) for ci95 in ((81, 99), (70, 79), (79, 99))} == {"INCONCLUSIVE"}


def arms(gain, leak, fvu):
    rng = np.random.default_rng(0)
    base = {name: Units.mean(rng.random(50) * 0.02 + 0.5) for name in ("purity", "leakage", "steering_leakage")}
    base["fvu"] = Units.ratio(rng.random(90) + 3, np.full(90, 10.0))
    teacher = {
        "purity": Units.mean(base["purity"].numerator_U + gain),
        "leakage": Units.mean(base["leakage"].numerator_U * (1 - leak)),
        "steering_leakage": Units.mean(base["steering_leakage"].numerator_U * (1 - leak)),
        "fvu": Units.ratio(base["fvu"].numerator_U * (1 + fvu), np.full(90, 10.0)),
    }
    return base, teacher


def test_targets_from_two_arms():
    angle = Metric(89.0, (85.0, 93.0), None, 50)
    passed = assess_targets(angle, *arms(0.12, 0.25, 0.04))
    assert [row["name"] for row in passed] == [
        "median_angle_deg",
        "purity_gain_pp",
        "leakage_reduction",
        "steering_leakage_reduction",
        "reconstruction_parity",
    ]
    assert [row["verdict"] for row in passed] == ["PASS"] * 5
    assert [row["measured"] for row in passed] == pytest.approx([89.0, 12.0, 0.25, 0.25, 0.04])
    assert passed[1]["required"] == [10.0, None]
    assert passed[4]["required"] == [-0.05, 0.05]
    failed = assess_targets(Metric(60.0, (55.0, 65.0), None, 50), *arms(0.05, 0.1, -0.2))
    assert [row["verdict"] for row in failed] == ["FAIL"] * 5, "parity is two-sided: a better fit is no parity either"
    looser = Thresholds(purity_gain_pp=4.0, reconstruction_parity=0.3)
    verdicts = [row["verdict"] for row in assess_targets(angle, *arms(0.05, 0.1, -0.2), thresholds=looser)]
    assert verdicts == ["PASS", "PASS", "FAIL", "FAIL", "PASS"]


def test_a_handful_of_units_decides_nothing_and_says_so():
    def first(units, n):
        return {name: Units.ratio(u.numerator_U[:n], u.denominator_U[:n]) for name, u in units.items()}

    few = "12 of 14 parents have fewer than 20 labelled rows in train or test"
    angle, two = Metric(89.0, (85.0, 93.0), None, 2), [first(arm, 2) for arm in arms(0.12, 0.25, 0.04)]
    rows = assess_targets(angle, *two, few=few)
    assert [row["verdict"] for row in rows] == ["INCONCLUSIVE"] * 5
    assert [row["measured"] is None or row["ci95"] is None for row in rows] == [False] * 5
    assert [row["why"] for row in rows] == [
        "2 parents, 8 are needed for a verdict",
        f"2 concepts, 8 are needed for a verdict: {few}",
        f"2 concepts, 8 are needed for a verdict: {few}",
        f"2 reached concepts, 8 are needed for a verdict: {few}",
        "2 documents, 8 are needed for a verdict",
    ]
    enough = assess_targets(None, *(first(arm, 8) for arm in arms(0.12, 0.25, 0.04)), few=few)
    assert [row["verdict"] for row in enough[1:]] == ["PASS"] * 4
    assert not any("why" in row for row in enough[1:])


def test_a_missing_concept_metric_says_how_many_parents_lack_rows():
    base, teacher = arms(0.12, 0.25, 0.04)
    few = "7 of 8 parents have fewer than 20 labelled rows in train or test"
    for arm in (base, teacher):
        del arm["purity"], arm["fvu"]
    rows = {row["name"]: row for row in assess_targets(None, base, teacher, few=few)}
    assert rows["purity_gain_pp"]["why"] == f"purity was not measured for the baseline arm: {few}"
    assert rows["reconstruction_parity"]["why"] == "fvu was not measured for the baseline arm"
    no_arm = assess_targets(None, {}, teacher, few=few)
    assert {row["why"] for row in no_arm[1:]} == {"there is no baseline arm"}


def test_missing_measurements_are_inconclusive_with_a_reason():
    base, teacher = arms(0.12, 0.25, 0.0)
    del teacher["steering_leakage"]
    base["leakage"] = Units.mean([math.nan] * 50)
    rows = {row["name"]: row for row in assess_targets(None, base, teacher)}
    assert rows["median_angle_deg"]["why"] == "no angle was measured"
    assert rows["steering_leakage_reduction"]["why"] == "steering_leakage was not measured for the teacher arm"
    assert rows["leakage_reduction"]["why"] == "0 concepts, 8 are needed for a verdict"
    for name in ("median_angle_deg", "steering_leakage_reduction", "leakage_reduction"):
        assert rows[name]["measured"] is None
        assert rows[name]["verdict"] == "INCONCLUSIVE"
    assert json.dumps(list(rows.values()), allow_nan=False)
    bare = assess_targets(Metric(90.0, None, None, 9), base, teacher)[0]
    assert bare["verdict"] == "INCONCLUSIVE"
    assert bare["why"] == "no interval was given"
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(format_targets(list(rows.values())))
    text = console.export_text()
    assert "PASS" in text
    assert "INCONCLUSIVE" in text
    assert "median_angle_deg: no angle was measured" in text
    assert ">= 10" in text
    assert "50 concepts" in text  # what n counts stands beside it
    assert "90 documents" in text
