"""Steering in a linear world, whose answers are known."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeConcepts, FakeSAE

from polytope_hsae.evaluation.pushing import Search, evenly_spaced, solve_alpha
from polytope_hsae.evaluation.steering import Steered, evaluate_steering
from polytope_hsae.lm import FINAL_HOOK

BOTH = Steered([0, 1], np.array([0, 1]))


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

    found = solve_alpha(evaluate, Search(), 40.0, np.full(len(functions), np.nan))
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
        sae, lm, FINAL_HOOK, concepts, BOTH, ids, search=Search(tolerance=1e-3, max_evaluations=40)
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
    found = evaluate_steering(sae, lm, FINAL_HOOK, concepts, BOTH, ids, search=Search(max_norms=20))
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
    found = evaluate_steering(sae, lm, FINAL_HOOK, concepts, BOTH, ids, search=Search(max_norms=20), text="t{}".format)
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
    unmapped = evaluate_steering(
        sae, lm, FINAL_HOOK, concepts, Steered([0, 1], np.array([-1, 0])), ids, search=Search(max_norms=20)
    )
    assert unmapped.records[0]["example"] is None


def test_unreached_and_unmapped_concepts_have_no_leakage():
    lm, sae, concepts, ids = linear_case([[-1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    found = evaluate_steering(sae, lm, FINAL_HOOK, concepts, BOTH, ids)
    assert [record["alpha"] is None for record in found.records] == [True, False]
    assert found.result.metrics["steering_unreached"].value == 0.5
    assert found.result.metrics["steering_leakage"].n == 1
    unmapped = evaluate_steering(sae, lm, FINAL_HOOK, concepts, Steered([0, 1], np.array([-1, 1])), ids)
    assert [record["steering_leakage"] is None for record in unmapped.records] == [True, False]
    assert np.isnan(unmapped.result.units["steering_leakage"].numerator_U).tolist() == [True, False]
    stuck = evaluate_steering(sae, lm, FINAL_HOOK, concepts, Steered([0], np.array([0])), ids)
    assert stuck.result.metrics["steering_leakage"].why == "no units with a value"
    assert stuck.result.metrics["steering_unreached"].value == 1
    with pytest.raises(ValueError, match=r"found shape \(8, 1\)"):
        evaluate_steering(sae, lm, FINAL_HOOK, concepts, BOTH, ids[:, :1])


def test_the_steered_concepts_are_evenly_spaced_in_file_order():
    assert evenly_spaced([3, 5, 8, 9, 12], 3) == [3, 8, 12]
    assert evenly_spaced([3, 5, 8], 3) == evenly_spaced([3, 5, 8], None) == [3, 5, 8]
    assert evenly_spaced(range(57), 20) == sorted(set(evenly_spaced(range(57), 20)))
    assert evenly_spaced(range(57), 20)[-1] == 56
