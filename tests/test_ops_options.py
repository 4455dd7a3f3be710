"""Options of the H-SAE through the kernels against float64: on a CUDA device, or in Triton's interpreter."""

import copy

import pytest
import torch
from factored import factored
from test_ops import CUDA, DEVICE, assert_close, normal, poisoned_memory  # noqa: F401  # the last is a fixture

from polytope_hsae import ops
from polytope_hsae.config import LossOverrides
from polytope_hsae.models.hsae import HierarchicalSAE

HARD = {"n_parents": 24, "topk_parent": 3, "gate": "hard"}
OPTIONS = {
    "batch": {"parent_budget": "batch", "child_budget": "batch", "l1_parent": 0.01, "l1_child": 0.01},
    "batch of parents": {"parent_budget": "batch", "child_budget": "per_parent", "child_input": "input"},
    "joint": {"parent_budget": "joint", "child_budget": "batch", "topk_child_total": 5},
    "joint, direct and tied": {
        "parent_budget": "joint", "child_budget": "batch", "topk_child_total": 5, "budget_slots": 3.0,
        "child_encoder": "direct", "child_decoder": "direct", "use_tied_decoders_child": True,
    },
    "batch, an L1 of all codes": {
        "parent_budget": "batch", "child_budget": "batch", "l1_scope": "all", "l1_parent": 0.01, "l1_child": 0.01,
    },
    "balance": {"gate": "straight_through", "router_balance_rate": 0.1},
    "largest load, joint": {
        "parent_budget": "joint", "child_budget": "batch", "topk_child_total": 5, "router_balance_rate": 0.1,
        "router_load_max": 0.2,
    },
    "smallest load, joint": {
        "parent_budget": "joint", "child_budget": "batch", "topk_child_total": 5, "router_balance_rate": 0.1,
        "load_min": 0.1,
    },
    "smallest load, per parent": {
        "child_input": "input", "child_budget": "per_parent", "router_balance_rate": 0.1, "load_min": 0.1,
    },
    "balance of codes": {
        "magnitude": "leaky_offset", "router_balance_rate": 0.1, "child_input": "input", "child_budget": "per_parent",
        "l1_scope": "all", "l1_parent": 0.01, "l1_child": 0.01,
    },
    "direct": {"child_encoder": "direct", "child_decoder": "direct", "biorth_lambda": 0.01},
    "direct encoder": {"child_encoder": "direct", "child_budget": "per_parent", "topk_child": 2},
    "annealed": {"topk_parent_start": 6, "active_children_start": 9, "k_anneal_steps": 10},
    "no bias": {"child_input_detach": True, "use_decoder_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_model_is_the_reference(name, monkeypatch):
    monkeypatch.setattr("polytope_hsae.models.hsae.routing_noise", lambda logits, *_: torch.zeros_like(logits))
    model = HierarchicalSAE(factored(**{**HARD, **OPTIONS[name]}), 48, "rms", seed=1).train()
    with torch.no_grad():  # away from the start, where reading and writing agree and some gradients vanish
        for parameter in model.parameters():
            parameter += 0.05 * normal(*parameter.shape).float()
        if model.balance is not None:
            model.balance.copy_(0.5 * normal(24))
        if model.child_balance is not None:
            model.child_balance.copy_(normal(*model.child_balance.shape).abs())
    model.normalize_decoder_weights()
    model.update_k(3)
    reference, mine = copy.deepcopy(model).double(), copy.deepcopy(model).to(DEVICE)
    h = 3 * normal(48, 20).T.float()  # not contiguous
    expected = reference(h.double())
    terms = reference.loss_terms(expected, LossOverrides())
    sum(weight * value for weight, value in terms.values()).backward()
    if not CUDA:
        monkeypatch.setattr(ops, "uses_kernels", lambda *tensors: all(t.dtype == torch.float32 for t in tensors))
    found = mine(h.to(DEVICE))
    assert found.errors is not None  # it came through the kernels
    on_BK = expected.codes.child_value > 0
    assert torch.equal(found.codes.parent_index.cpu(), expected.codes.parent_index)
    assert torch.equal(found.codes.child_value.cpu() > 0, on_BK)
    assert torch.equal(found.codes.child_index.cpu()[on_BK], expected.codes.child_index[on_BK])
    assert_close(found.x_hat, expected.x_hat, 1e-5)
    terms_found = mine.loss_terms(found, LossOverrides())
    for key, (_, value) in terms.items():
        assert_close(terms_found[key][1], value, 1e-4)
    sum(weight * value for weight, value in terms_found.values()).backward()
    for (_, a), (_, b) in zip(mine.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-12:
            assert_close(a.grad, b.grad, 1e-4)
    with torch.no_grad():
        output = mine.eval()(h.to(DEVICE))
        assert_close(mine.decode_normalized(output.codes), output.x_hat.double().cpu(), 1e-5)
