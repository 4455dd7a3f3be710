"""Known answers of intervals, reconstruction and concept metrics, with small fakes for store and model."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeConcepts, FakeSAE, Store, language_model, sampled_ids, sparse
from sklearn.metrics import roc_auc_score

from polytope_hsae.evaluation import reconstruction
from polytope_hsae.evaluation.bootstrap import (
    Units,
    bootstrap_fraction,
    bootstrap_mean,
    bootstrap_units,
    paired,
)
from polytope_hsae.evaluation.concepts import (
    ConceptData,
    auroc_matrix,
    concept_metrics,
    evaluate_concepts,
    labelled_rows,
    map_concepts,
)
from polytope_hsae.evaluation.reconstruction import LM_METRICS, evaluate_reconstruction
from polytope_hsae.evaluation.row_codes import SparseActivations, row_codes
from polytope_hsae.evaluation.steering import STEERING_METRICS, Steered, evaluate_steering
from polytope_hsae.lm import FINAL_HOOK


@pytest.fixture(scope="module")
def lm():
    return language_model()


@pytest.fixture(scope="module")
def ids(lm):
    return sampled_ids(lm)


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
    metric = bootstrap_units(Units.ratio([1.0, 9.0], [1.0, 99.0]), n=200)
    assert metric.value == pytest.approx(0.1)
    assert metric.ci95[0] == pytest.approx(9 / 99)
    assert metric.ci95[1] == pytest.approx(1.0)


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
    assert bootstrap_units(Units.ratio([1.0, 2.0], [0.0, 0.0])).why == "the denominator is zero"
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
    return Store(test={"acts": acts, "doc": torch.tensor([7] * 10 + [3] * 13)})


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
    empty = Store(test={"acts": torch.zeros(0, 6), "doc": torch.zeros(0)})
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
    steering = evaluate_steering(FakeSAE(16), headless, FINAL_HOOK, None, Steered([0], np.zeros(1, int)), ids)
    assert tuple(steering.result.metrics) == STEERING_METRICS
    assert steering.records == []
    assert all("no output head" in m.why for m in steering.result.metrics.values())


# concepts


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
    assert values["no_fire_rate"] == pytest.approx(1 / 4)
    assert values["purity_auroc"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.metrics["purity"].chance == 0.5
    assert metrics.metrics["recall"].chance == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.units["purity"].keys_U.tolist() == [4, 9]


def test_silent_latents_and_too_few_concepts():
    acts = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    metrics = concept_metrics(acts, np.array([0, 1, 1]), np.arange(2))
    assert metrics.units["purity"].numerator_U.tolist() == [0.5, 0]
    assert metrics.units["recall"].numerator_U.tolist() == [1, 0]
    silent = concept_metrics(np.zeros((3, 2), np.float32), np.array([0, 1, 1]), np.arange(2))
    assert silent.metrics["leakage"].value is None
    assert silent.metrics["leakage_all_rows"].value == 1
    assert silent.metrics["no_fire_rate"].value == 1
    assert silent.metrics["purity"].value == 0


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

    return Store(train=split([1, 2, 3, 4, 11, 14]), test=split([11, 12, 13, 14, 1, 4]))


def test_labels_by_kind_and_fold():
    store = label_store()

    def rows(**options):
        words = options.pop("words", None)
        found = labelled_rows(ConceptData(store, CONCEPTS, vocab_size=20, **options), "test", words)
        return list(zip(found.row_N.tolist(), found.parent_N.tolist(), strict=True))

    assert rows(label="current_token")[:5] == [(0, 0), (1, 0), (2, 1), (3, 1), (6, 0)]
    assert rows(label="next_token")[:5] == [(0, 0), (1, 1), (2, 1), (5, 0), (6, 0)]
    assert rows(label="next_token")[-1] == (176, 1)  # the last row predicts nothing
    assert rows(label="belief")[:2] == [(2, 1), (8, 1)]
    # a believed token of the train fold is no test label, whatever its probability
    assert rows(label="belief", belief_threshold=0.1)[:2] == [(2, 1), (8, 1)]
    assert rows(label="belief", belief_threshold=0.1, words="train")[:2] == [(0, 0), (6, 0)]
    with pytest.raises(ValueError, match="label: found 'tokens', allowed: current_token, next_token, belief"):
        rows(label="tokens")


def test_concepts_end_to_end_find_the_planted_latents():
    store, sae = label_store(), FakeSAE(5)
    data = ConceptData(store, CONCEPTS, "current_token", 20)
    found = evaluate_concepts(sae, data)
    assert found.latent_P.tolist() == [3, 1]
    assert found.parents_Q.tolist() == [0, 1]
    assert found.rows_Q.tolist() == [60, 60]
    assert [found.result.metrics[name].value for name in ("purity", "leakage", "recall")] == [1, 0, 1]
    assert found.to_json()[1]["latent"] == 1
    assert found.to_json()[1]["purity"] == 1.0
    slots = evaluate_concepts(sae, data, np.array([0, 1]))
    assert slots.result.metrics["purity"].value == pytest.approx((0.5 + 1) / 2)
    empty_slot = evaluate_concepts(sae, data, np.array([-1, 1]))
    assert empty_slot.result.units["recall"].numerator_U.tolist() == [0, 1]
    assert json.dumps(empty_slot.to_json(), allow_nan=False)
    few = evaluate_concepts(sae, replace(data, min_rows=61))
    assert few.result.metrics["purity"].value is None
    assert few.parents_Q.size == 0
    lacking = "2 of 2 parents have fewer than 61 labelled rows in train or test"
    assert few.lacking == lacking
    assert few.result.metrics["purity"].why == f"2 concepts are needed, 0 have enough rows: {lacking}"
    assert found.lacking == ""
    with pytest.raises(ValueError, match="found a repeated latent"):
        evaluate_concepts(sae, data, np.array([1, 1]))
    with pytest.raises(ValueError, match="one latent for each of 2 parents"):
        evaluate_concepts(sae, data, np.array([1]))


def test_the_map_is_one_to_one_and_needs_rows():
    labels = np.repeat([0, 1, 2], [30, 30, 5])
    dense = np.zeros((65, 3), np.float32)
    dense[:, 0] = np.where(labels == 0, 3, np.where(labels == 1, 2, 0))  # best for 0, second best for 1
    dense[:, 1] = np.where(labels == 1, 0.1, 0)
    assert map_concepts(sparse(dense), labels, 4, min_rows=20).tolist() == [0, 1, -1, -1]
    assert map_concepts(sparse(dense[:, :1]), labels, 4, min_rows=20).tolist() == [0, -1, -1, -1]
    nothing = row_codes(FakeSAE(3), Store(), "train", np.zeros(0, np.int64))
    assert nothing.parents.columns(np.arange(3)).shape == (0, 3)
