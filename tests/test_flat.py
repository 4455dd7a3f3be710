"""The flat autoencoders: selection, gradients, thresholds."""

import math

import numpy as np
import pytest
import torch
from dense import copied_tensors
from models import normal, total
from trainers import MemoryStore, planted_rows

from polytope_hsae.config import (
    FLAT_KINDS,
    JumpReLUConfig,
    LossOverrides,
    MatryoshkaConfig,
    StageConfig,
    TrainingConfig,
)
from polytope_hsae.data.stream import RowStream
from polytope_hsae.evaluation.row_codes import row_codes
from polytope_hsae.models.codes import firings
from polytope_hsae.models.flat import pack
from polytope_hsae.models.flops import parameter_count
from polytope_hsae.models.jumprelu import JumpReLUSAE
from polytope_hsae.models.matryoshka import MatryoshkaSAE
from polytope_hsae.models.sparsity import level_for_l0
from polytope_hsae.phases.flat_arms import MODELS
from polytope_hsae.training.trainer import HSAETrainer
from polytope_hsae.training.usage import Usage

WIDTH = 6
WITH_THRESHOLDS = ("batchtopk", "jumprelu", "matryoshka")


def make_model(kind, normalize="none", n_latents=12, k=3, **options):
    """A float64 model with random parameters and unit decoder rows."""
    model = MODELS[kind](FLAT_KINDS[kind](n_latents=n_latents, k=k, **options), WIDTH, normalize).double()
    with torch.no_grad():
        tensors = model.tensors()
        named = [name for name in ("E", "b_E", "D", "b_dec", "log_threshold") if name in tensors]
        for seed, (name, tensor) in enumerate((name, tensors[name]) for name in named):
            scale = {"b_E": 0.2, "b_dec": 0.2, "log_threshold": 0.3}.get(name, 1.0)
            tensor.copy_(scale * normal(*tensor.shape, seed=10 + seed))
    model.normalize_decoder_weights()
    return model


def reads_rows(model):
    """Let the logits be the rows themselves (as many latents as the width)."""
    with torch.no_grad():
        model.E.copy_(torch.eye(WIDTH))
        model.b_E.zero_()
        model.b_dec.zero_()
    return model


# -- packing


def test_kept_logits_are_packed_with_distinct_indices():
    logits = torch.tensor([[1.0, 4.0, -2.0, 3.0], [5.0, 0.5, 2.0, -1.0], [-1.0, -2.0, -3.0, -4.0]])
    keep = torch.tensor([[True, True, False, True], [False, False, True, False], [False] * 4])
    index, value = pack(logits, keep)
    assert index.shape == (3, 3)
    assert index[0].tolist() == [1, 3, 0]
    assert value.tolist() == [[4, 3, 1], [2, 0, 0], [0, 0, 0]]
    assert index[1, 0] == 2
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert pack(logits, torch.zeros_like(keep))[1].tolist() == [[0], [0], [0]]
    assert pack(logits[:0], keep[:0])[0].shape == (0, 1)


@pytest.mark.parametrize("target", [0.25, 2, 6.5])
def test_the_level_of_an_l0_is_exact(target):
    batches = [normal(40, 50, seed=1), normal(7, 50, seed=2) + 9, normal(33, 50, seed=3)]  # one batch has the largest
    level = level_for_l0(lambda: batches, target)
    assert sum(int((batch > level).sum()) for batch in batches) == round(target * 80)
    assert level_for_l0(lambda: batches, 50) == -math.inf


@pytest.mark.parametrize("kind", sorted(FLAT_KINDS))
def test_tied_latents_have_one_tensor(kind):
    model = make_model(kind, tied=True)
    assert model.E is model.D
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(model.config, WIDTH)
    assert parameter_count(make_model(kind).config, WIDTH) - parameter_count(model.config, WIDTH) == 12 * WIDTH
    x = normal(8, WIDTH, seed=1)
    free = make_model(kind)
    free.load_state_dict({**model.state_dict(), "E": model.D.detach()})
    for each in (model, free):
        each(x).x_hat.pow(2).sum().backward()
    torch.testing.assert_close(model.D.grad, free.D.grad + free.E.grad)


# -- BatchTopK


def test_batchtopk_keeps_the_largest_of_the_batch():
    model = reads_rows(make_model("batchtopk", n_latents=WIDTH, k=1.5))
    x = torch.tensor([[9.0, 8, 7, 6, 0, 0], [5.0, -9, 0, 0, 0, 0], [1.0, 2, 3, 4, 0, 0], [0.1] * 6]).double()
    codes = model(x).codes
    assert codes.parent_index.shape == (4, 4)
    expected = torch.tensor([[9.0, 8, 7, 6, 0, 0], [5.0, 0, 0, 0, 0, 0], [0, 0, 0, 4.0, 0, 0], [0.0] * 6]).double()
    assert torch.equal(codes.dense_parents(WIDTH), expected)
    assert codes.l0().tolist() == [4, 1, 1, 0]
    assert model.budget.threshold.item() == 4

    few = model(torch.tensor([[2.0, -1, -1, -1, -1, -1], [-1.0] * 6, [-2.0] * 6, [-3.0] * 6]).double()).codes
    assert few.l0().tolist() == [1, 0, 0, 0]  # a negative logit is no code, whatever the budget
    assert few.parent_value.tolist() == [[2.0], [0.0], [0.0], [0.0]]
    assert model(x[:0]).x_hat.shape == (0, WIDTH)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_loss_and_gradients_equal_autograd_of_the_dense_form(kind, reduction):
    model = make_model(kind, n_latents=16, k=4, recon_reduction=reduction)
    bounds = [1, 2, 4, 8, 16] if kind == "matryoshka" else [16]
    x, t = normal(20, WIDTH), copied_tensors(model)
    r = (x - t["b_dec"]) @ t["E"].T + t["b_E"]
    if kind == "topk":
        mask = torch.zeros_like(r).scatter(1, r.topk(4, dim=1).indices, 1.0)
    else:
        mask = torch.zeros(r.numel()).scatter(0, r.flatten().topk(80).indices, 1.0).view_as(r)
        assert mask.sum(1).min() < 4 < mask.sum(1).max()
    codes, errors = mask * torch.relu(r), []
    for m in bounds:
        x_hat = t["b_dec"] + codes[:, :m] @ t["D"][:m]
        errors.append(((x - x_hat) ** 2).sum(1).mean() / (WIDTH if reduction == "mean" else 1))
    output, expected = model(x), sum(errors) / len(errors)
    torch.testing.assert_close(output.x_hat, x_hat)
    torch.testing.assert_close(model.decode(output.codes), x_hat)
    assert torch.equal(output.x_hat, output.x_hat_top)
    assert output.codes.child_index.shape == (20, 0)
    loss = total(model.loss_terms(output, LossOverrides(l1_parent=1.0)))  # which is an H-SAE's
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, tensor in model.tensors().items():
        torch.testing.assert_close(tensor.grad, t[name].grad, rtol=1e-9, atol=1e-12)


# -- JumpReLU


def test_jumprelu_gradients_equal_the_formulas():
    """Pseudo-derivatives of the paper: -(theta / eps) K((z - theta) / eps) of a code, -(1 / eps) K of the L0."""
    eps, B, k, weight = 0.8, 25, 3, 0.7
    model = make_model("jumprelu", bandwidth=eps, l0_weight=weight)
    x, t = normal(B, WIDTH), copied_tensors(model)
    theta = t["log_threshold"].detach().exp()
    z = (x - t["b_dec"]) @ t["E"].T + t["b_E"]
    active = z.detach() > theta
    x_hat = t["b_dec"] + (z * active) @ t["D"]
    error = ((x - x_hat) ** 2).sum(1).mean()
    l0 = active.double().sum(1).mean()
    empty = ((x - t["b_dec"].detach()) ** 2).sum(1).mean()
    expected = error + weight * (l0 / k - 1) ** 2 * empty

    of_code = (2 * (x_hat - x) / B) @ t["D"].T  # of the error, for every row and latent
    of_step = weight * empty * 2 * (l0 / k - 1) / k / B
    rectangle = ((z - theta).abs() < eps / 2).double()
    assert (rectangle * ~active).sum() > 10  # inactive latents count
    of_theta = (of_code * -(theta / eps) * rectangle - of_step / eps * rectangle).sum(0).detach()

    output = model(x)
    terms = model.loss_terms(output, LossOverrides())
    assert set(terms) == {"recon", "l0"}
    torch.testing.assert_close(output.codes.dense_parents(12), (z * active).detach())
    loss = total(terms)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name in ("E", "b_E", "D", "b_dec"):
        torch.testing.assert_close(getattr(model, name).grad, t[name].grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.log_threshold.grad, theta * of_theta, rtol=1e-9, atol=1e-12)


def test_jumprelu_keeps_what_is_above_its_own_threshold():
    model = reads_rows(make_model("jumprelu", n_latents=WIDTH)).eval()
    with torch.no_grad():
        model.log_threshold.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6]).log())
    codes = model.encode(torch.full((1, WIDTH), 3.5, dtype=torch.float64))
    assert codes.dense_parents(WIDTH).tolist() == [[3.5, 3.5, 3.5, 0, 0, 0]]
    assert codes.parent_index.shape == (1, 3)


def test_jumprelu_starts_at_the_wanted_l0_or_the_given_threshold():
    x = normal(300, WIDTH)
    model = make_model("jumprelu")
    model.initialize_bias([x])
    assert model.eval().encode(x).l0().double().mean().item() == pytest.approx(3, abs=0.01)
    assert model.log_threshold.detach().unique().numel() == 1
    model = JumpReLUSAE(JumpReLUConfig(n_latents=12, k=3, initial_threshold=0.5), WIDTH)
    model.initialize_bias([x.float()])
    assert model.log_threshold.exp().tolist() == pytest.approx([0.5] * 12)


@pytest.mark.parametrize("lr_mult, factor", [({}, 6**0.5), ({"log_threshold": 3.0}, 3.0)])
def test_thresholds_learn_at_their_own_rate(lr_mult, factor):
    model = make_model("jumprelu").float()
    stage = StageConfig(name="train", steps=4, lr_mult=lr_mult)
    config = TrainingConfig(batch_size=16, lr=0.01, warmup_steps=0, schedule="constant")
    trainer = HSAETrainer(model, RowStream(MemoryStore(planted_rows()), "train", 16, seed=0), [stage], config)
    trainer.train_step(stage)
    rates = {group["names"][0]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["E"] == rates["D"] == 0.01
    assert rates["log_threshold"] == pytest.approx(0.01 * factor)


# -- Matryoshka


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "matryoshka"])
def test_all_latents_at_once_are_the_same_as_the_picked_ones(kind, monkeypatch):
    """On a GPU a batch is trained through whole products: same error, same loss, same gradients, same firings."""
    config = FLAT_KINDS[kind](n_latents=24, k=3)
    x_Bd = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for whole in (False, True):
        model = MODELS[kind](config, 8, "none", seed=0)
        model.initialize_bias([x_Bd])
        model.train()
        monkeypatch.setattr(model, "trains_whole", lambda whole=whole: whole)
        output = model(x_Bd)
        terms = model.loss_terms(output, LossOverrides())
        loss = total(terms)
        loss.backward()
        usage = Usage(24, 0, torch.device("cpu"))
        usage.update(firings(output.codes, 24, 0))
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([output.prefix_errors, loss, output.codes.dense_parents(24), usage.idle_parent, *gradients])
        assert (output.codes.parent_index.shape == (40, 24)) == whole
    for picked, at_once in zip(*found, strict=True):
        torch.testing.assert_close(at_once, picked)


def test_prefixes_are_rounded_and_counted_once():
    assert MatryoshkaSAE(MatryoshkaConfig(n_latents=5, k=2), WIDTH).bounds == [1, 2, 5]  # 0.3, 0.6, 1.25, 2.5, 5
    config = MatryoshkaConfig(n_latents=10, k=2, fractions=(0.3, 1.0))
    assert MatryoshkaSAE(config, WIDTH).bounds == [3, 10]
    for fractions in ((0.5, 0.25, 1.0), (0.5, 0.9), (0.0, 1.0), (0.5, 1.5), ()):
        with pytest.raises(ValueError, match=r"fractions: found .*, allowed: rising shares above 0, the last one 1"):
            MatryoshkaConfig(n_latents=10, k=2, fractions=fractions)


# -- calibration


@pytest.mark.parametrize("normalize", ["rms", "unit_row", "none"])
@pytest.mark.parametrize("kind", WITH_THRESHOLDS)
def test_calibration_reaches_the_wanted_l0(kind, normalize):
    model = make_model(kind, normalize).eval()
    rows = 2 + normal(900, WIDTH)
    model.set_normalization(rows.mean(0), 1.3)
    batches = list(rows.split(400))
    before = model.state_dict()["log_threshold"].clone() if kind == "jumprelu" else None
    for target in (1.0, 2.6, 5.0):
        model.calibrate(batches, target)
        assert model.encode(rows).l0().double().mean().item() == pytest.approx(target, rel=0.002)
    if before is not None:  # one factor for all
        torch.testing.assert_close(model.log_threshold - before, (model.log_threshold - before)[:1].expand(12))
    model.calibrate(batches, 12.0)  # more than there are positive logits
    codes = model.encode(rows)
    assert codes.l0().double().mean().item() == pytest.approx((model(rows).router_logits > 0).sum(1).double().mean())
    assert (codes.parent_value >= 0).all()


# -- dead latents, evaluation, training


@pytest.mark.parametrize("kind", list(MODELS))
def test_dead_latents_rebuild_the_error(kind):
    model = make_model(kind, aux_weight=0.5, aux_k=2)
    with torch.no_grad():
        model.b_E[:3] = -100.0
    x = normal(20, WIDTH)
    output = model(x)
    dead = torch.arange(12) < 5
    assert "aux_parent" not in model.loss_terms(output, LossOverrides())  # nobody is known to be dead
    assert "aux_parent" not in model.loss_terms(output, LossOverrides(aux_weight=0.0), dead)
    assert model.loss_terms(output, LossOverrides(aux_weight=0.1), dead)["aux_parent"][0] == 0.1
    weight, value = model.loss_terms(output, LossOverrides(), dead)["aux_parent"]
    chosen, index = output.router_logits[:, :5].topk(2, dim=1)
    rebuilt = (torch.relu(chosen).unsqueeze(2) * model.D[index]).sum(1)
    expected = (((x - output.x_hat).detach() - rebuilt) ** 2).sum(1).mean()
    torch.testing.assert_close(value, expected)
    assert weight == 0.5
    value.backward()
    assert model.D.grad[3:5].abs().sum() > 0
    assert model.D.grad[5:].abs().sum() == 0


def test_batches_of_different_slots_make_one_table():
    model = make_model("batchtopk").float().eval()
    model.calibrate([normal(90, WIDTH).float()], 3.0)
    rows = torch.cat([normal(45, WIDTH).float(), 3 * normal(45, WIDTH, seed=1).float()])
    table = row_codes(model, MemoryStore(rows), "train", np.arange(90), batch_size=45).parents
    widths = {model.encode(part).parent_index.shape[1] for part in rows.split(45)}
    assert len(widths) == 2
    assert table.value_Nk.shape == (90, max(widths))
    everything = model.encode(rows).dense_parents(12).detach().numpy()
    np.testing.assert_allclose(table.columns(np.arange(12)), everything, rtol=1e-5)


# -- TopK against a plainly written loop
