"""Whole models through the kernels against float64: on a GPU, or in Triton's interpreter."""

import copy

import pytest
import torch
from common import CUDA, DEVICE, assert_close, normal
from models import factored, total

from polytope_hsae import ops
from polytope_hsae.config import HSAEConfig, LossOverrides
from polytope_hsae.models.base import Part
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.models.router import Router

HARD = {"n_parents": 24, "topk_parent": 3, "gate": "hard"}
FORMS = {
    "default": HSAEConfig(n_parents=24, topk_parent=3, topk_child_total=2),
    "default, untied": HSAEConfig(n_parents=24, topk_parent=3, topk_child_total=2, use_tied_decoders_child="init"),
    "prefixes": HSAEConfig(n_parents=24, topk_parent=3, topk_child_total=2, parent_prefixes=(0.25, 0.5)),
    "published": HSAEConfig.jax_compat(n_parents=64, n_children_per_parent=8, topk_parent=6),
    "wide subspace": factored(
        n_parents=24, topk_parent=4, subspace_dim=20, child_input="input", child_budget="per_parent",
        l1_parent=1e-3, l1_child=1e-3, biorth_lambda=1e-3, recon_reduction="mean",
    ),
    "shared": factored(n_parents=64, topk_parent=5, topk_child_total=7, l1_parent=0.01, l1_child=0.01),
    "one parent": factored(n_parents=24, topk_parent=1),
    "tied": factored(
        n_parents=24, topk_parent=3, topk_child=2, child_budget="per_parent",
        tie_projectors=True, use_tied_decoders_parent=True, use_tied_decoders_child=True,
    ),
    "binary": factored(n_parents=24, topk_parent=3, magnitude="binary"),
    "batch": factored(**HARD, parent_budget="batch", child_budget="batch", l1_parent=0.01, l1_child=0.01),
    "batch of parents": factored(**HARD, parent_budget="batch", child_budget="per_parent", child_input="input"),
    "joint": factored(**HARD, parent_budget="joint", child_budget="batch", topk_child_total=5),
    "largest rate": factored(
        **HARD, parent_budget="joint", child_budget="batch", topk_child_total=5, balance_rate=0.1, rate_cap=0.2
    ),
    "smallest rate": factored(
        **{**HARD, "gate": "straight_through"}, child_input="input", child_budget="per_parent", balance_rate=0.1,
        rate_floor=0.1,
    ),
    "no bias": factored(**HARD, use_decoder_bias=False, use_encoder_bias=False),
}  # fmt: skip


def through_kernels(model):
    """The model on the device, with the kernels as its operations, in the interpreter, too."""
    model = model.to(DEVICE)
    for part in model.modules():
        if isinstance(part, Part):
            part.ops = ops.kernels("float32")
    return model


@pytest.fixture
def quiet_router(monkeypatch):
    monkeypatch.setattr(Router, "_noise", lambda *_: torch.zeros_like)


ON_A_CPU = (
    "default",
    "published",
    "wide subspace",
    "shared",
    "smallest rate",
)  # the interpreter takes seconds for each


@pytest.mark.usefixtures("quiet_router")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ON_A_CPU else pytest.mark.gpu) for name in FORMS]
)
@pytest.mark.parametrize("B", [8, pytest.param(1, marks=pytest.mark.gpu), pytest.param(200, marks=pytest.mark.gpu)])
def test_a_model_and_all_its_gradients(name, B):
    config = FORMS[name]
    model = HierarchicalSAE(config, 48, "unit_row" if name == "published" else "rms", seed=1).train()
    with torch.no_grad():  # away from the start, where reading and writing agree and some gradients vanish
        for parameter in model.parameters():
            parameter += 0.05 * normal(*parameter.shape).float()
        for bias in (model.balance.parent_bias, model.balance.child_bias):
            if bias is not None:
                bias.copy_(normal(*bias.shape).abs())
    model.normalize_decoder_weights()
    reference, mine = copy.deepcopy(model).double(), through_kernels(copy.deepcopy(model))
    h = 3 * normal(48, B).T.float()  # not contiguous
    expected, found = reference(h.double()), mine(h.to(DEVICE))
    on_BK = expected.codes.child_value > 0
    assert torch.equal(found.codes.parent_index.cpu(), expected.codes.parent_index)
    assert torch.equal(found.codes.child_value.cpu() > 0, on_BK)
    assert torch.equal(found.codes.child_index.cpu()[on_BK], expected.codes.child_index[on_BK])
    assert_close(found.x_hat, expected.x_hat, 1e-5)
    assert_close(found.x_hat_top, expected.x_hat_top, 1e-5)
    terms, terms_found = reference.loss_terms(expected, LossOverrides()), mine.loss_terms(found, LossOverrides())
    assert terms.keys() == terms_found.keys()
    for key, (weight, value) in terms.items():
        assert terms_found[key][0] == weight
        assert_close(terms_found[key][1], value, 1e-4)
    total(terms).backward()
    total(terms_found).backward()
    for (_, a), (_, b) in zip(mine.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-12:
            assert_close(a.grad, b.grad, 1e-4)
    with torch.no_grad():
        output = mine.eval()(h.to(DEVICE))
        assert_close(mine.decode_normalized(output.codes), output.x_hat, 1e-5)


def test_a_model_on_another_gpu_is_refused(monkeypatch):
    there = torch.zeros(1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"found a tensor on cuda:1, allowed: cuda:0, or torch.cuda.set_device"):
        ops.kernels("float32").enter(there, "none", there, there, None)


@pytest.mark.gpu
def test_parts_follow_the_weights_and_the_precision():
    model = HierarchicalSAE(FORMS["default"], 48)
    assert CUDA
    assert model.router.ops is ops.CPU
    model.cuda().precision = "tf32"
    assert all(part.ops is ops.kernels("tf32") for part in (model, model.router, model.child))
    assert model.double().router.ops.route is ops.NAIVE.route
    assert model.float().cpu().child.ops is ops.CPU


@pytest.mark.gpu
def test_the_same_bits_twice():
    model = HierarchicalSAE(FORMS["published"], 48, "unit_row", seed=1).cuda().train()
    model.precision = "bf16"
    h, grads = normal(3000, 48).float().cuda(), []
    for _ in range(2):
        model.zero_grad()
        total(model.loss_terms(model(h), LossOverrides())).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
