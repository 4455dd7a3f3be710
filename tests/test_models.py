"""Routed products, the hierarchical and the flat autoencoder: values and gradients against plain dense forms."""

import json
import math
import shutil
import warnings

import pytest
import torch
from models import SHAPE, WIDTH, config, factored, factored_sae, generator, normal, random_parameters, sae
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from polytope_hsae.config import LossOverrides
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.models.flops import parameter_count
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.models.init import ChildInit
from polytope_hsae.ops import CPU, Routing, Rows
from polytope_hsae.ops.gate.naive import gate as gated
from polytope_hsae.ops.routed.cpu import composes


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_same_gradients(value, expected, inputs, expected_inputs):
    """Outputs and every gradient under one random upstream gradient."""
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    upstream = normal(*value.shape, seed=99)
    mine = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, expected_inputs, upstream, allow_unused=True)
    for left, right, tensor in zip(mine, theirs, inputs, strict=True):
        left = torch.zeros_like(tensor) if left is None else left
        right = torch.zeros_like(tensor) if right is None else right
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)


# -- routed products


def naive_encode(x, parents, Down, F, b_F):
    rows = [torch.stack([F[p] @ (Down[p] @ x[i]) + b_F[p] for p in parents[i].tolist()]) for i in range(len(x))]
    return torch.stack(rows)


def naive_decode(index, value, Up, G):
    C = G.shape[1]
    rows = []
    for i in range(len(index)):
        row = torch.zeros(Up.shape[-1], dtype=value.dtype)
        for slot, flat in enumerate(index[i].tolist()):
            p, j = divmod(flat, C)
            row = row + value[i, slot] * (Up[p].T @ G[p, j])
        rows.append(row)
    return torch.stack(rows)


def routes(kind, B, k, P):
    if kind == "one":  # every row goes to parent 0, the other slots follow
        return torch.arange(k).expand(B, k).contiguous()
    return torch.stack([torch.randperm(P, generator=generator(i))[:k] for i in range(B)])


@pytest.mark.parametrize("s", [2, 4])  # with 4, whole atoms are made where there are pairs enough
@pytest.mark.parametrize("kind", ["random", "one"])
@pytest.mark.parametrize("B, k", [(1, 1), (1, 5), (33, 1), (33, 5), (33, 2), (150, 3)])
def test_routed_encoding_equals_a_loop(B, k, kind, s):
    P, C, d = 5, 3, 7
    given = (normal(B, d), normal(P, s, d, seed=1), normal(P, C, s, seed=2), normal(P, C, seed=3))
    parents = routes(kind, B, k, P)
    mine, theirs = leaves(*given), leaves(*given)
    x, Down, F, b_F = mine
    value = CPU.encode_children(Rows(x), Routing(parents, P), F, b_F, Down)
    assert_same_gradients(value, naive_encode(theirs[0], parents, *theirs[1:]), mine, theirs)


@pytest.mark.parametrize("s", [2, 4])
@pytest.mark.parametrize("kind", ["random", "repeated", "one"])
@pytest.mark.parametrize("B, K", [(1, 1), (1, 4), (33, 1), (33, 7), (150, 3)])
def test_routed_decoding_equals_a_loop(B, K, kind, s):
    P, C, d = 5, 3, 7
    index = torch.randint(0, P * C, (B, K), generator=generator(4))
    if kind == "repeated":  # one parent per row, the same child more than once
        index = index[:, :1] // C * C + torch.randint(0, 2, (B, K), generator=generator(5))
    elif kind == "one":
        index = index % C
    given = (normal(B, K), normal(P, s, d, seed=1), normal(P, C, s, seed=2))
    mine, theirs = leaves(*given), leaves(*given)
    codes, Up, G = mine
    value = CPU.decode_children(index, codes, G, Up)
    assert_same_gradients(value, naive_decode(index, *theirs), mine, theirs)


@pytest.mark.parametrize("B, k", [(1, 1), (33, 3), (33, 5)])
def test_weighted_row_sum_equals_a_loop(B, k):
    index = torch.randint(0, 5, (B, k), generator=generator(4))  # repeats included
    given = (normal(5, 7), normal(B, k, seed=1))
    mine, theirs = leaves(*given), leaves(*given)
    expected = torch.stack(
        [sum(theirs[1][i, j] * theirs[0][p] for j, p in enumerate(index[i].tolist())) for i in range(B)]
    )
    assert_same_gradients(CPU.decode(Routing(index, 5), mine[1], mine[0]), expected, mine, theirs)


def test_empty_batches_and_empty_codes():
    none = torch.zeros(0, 2, dtype=torch.int64)
    Down, F, b_F = normal(5, 2, 7), normal(5, 3, 2), normal(5, 3)
    routes = Routing(none, 5)
    assert CPU.encode_children(Rows(normal(0, 7)), routes, F, b_F, Down).shape == (0, 2, 3)
    assert CPU.decode_children(none, normal(0, 2), F, Down).shape == (0, 7)
    assert CPU.decode(routes, normal(0, 2), normal(5, 7)).shape == (0, 7)
    no_children = torch.zeros(4, 0, dtype=torch.int64)
    assert torch.equal(CPU.decode_children(no_children, normal(4, 0), F, Down), torch.zeros(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_have_the_gradients_of_a_linear_layer_whatever_share_of_them_counts(share, bias):
    x, weight, b, upstream = normal(30, 7), normal(40, 7, seed=1), normal(40, seed=2), normal(30, 40, seed=3)
    upstream = upstream * (torch.rand(30, 40, generator=generator(5)) < share)
    mine, theirs = leaves(x, weight, b), leaves(x, weight, b)
    out = CPU.linear(Rows(mine[0]), mine[1], mine[2] if bias else None)
    expected = torch.nn.functional.linear(theirs[0], theirs[1], theirs[2] if bias else None)
    assert torch.equal(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out, mine[: 2 + bias], upstream),
        torch.autograd.grad(expected, theirs[: 2 + bias], upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor of the work inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("C, s", [(4, 8), (8, 4)])  # atoms made first; through the subspaces
def test_no_tensor_grows_with_rows_and_width_and_slots_together(C, s):
    B, k, P, d = 64, 8, 16, 256
    assert composes(B * k, P, C, s) == (s >= C)
    x, Down, F, Up, G, b_F = leaves(
        normal(B, d), normal(P, s, d), normal(P, C, s), normal(P, s, d), normal(P, C, s), normal(P, C)
    )
    parent = routes("random", B, k, P)
    with Largest() as largest:
        pre = CPU.encode_children(Rows(x), Routing(parent, P), F, b_F, Down)
        value, place = pre.flatten(1).topk(k, dim=1)
        index = (parent.unsqueeze(2) * C + torch.arange(C)).flatten(1).gather(1, place)
        CPU.decode_children(index, value, G, Up).square().sum().backward()
    assert largest.numbers <= P * max(C, s) * d < B * k * d


# -- gate, noise, temperature


def dense_soft_mask(logits, mask, temperature):
    soft = torch.softmax(logits / temperature, dim=1) * mask
    return soft if mask[0].sum() == 1 else soft / soft.sum(1, keepdim=True)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_binary_router_gradient_is_that_of_the_soft_mask_alone(k):
    B, P, d = 9, 8, 6
    config = factored(
        n_parents=P,
        topk_parent=k,
        n_children_per_parent=2,
        subspace_dim=2,
        magnitude="binary",
        child_input="input",
        child_budget="per_parent",
        top_level_beta=0.0,
        use_decoder_bias=False,
    )
    model = HierarchicalSAE(config, d, "none").double().eval()
    model.router_temperature = 0.7
    x = normal(B, d)
    _, value, logits = model.encode_parent(x)
    assert torch.equal(value, torch.ones(B, k, dtype=torch.float64))

    upstream = normal(B, P, seed=5)
    index = logits.topk(k, dim=1).indices
    mine = torch.autograd.grad((value * upstream.gather(1, index)).sum(), (model.E, model.b_E))
    E, b_E = leaves(model.E, model.b_E)
    dense = x @ E.T + b_E
    mask = torch.zeros(B, P, dtype=torch.float64).scatter(1, index, 1.0)
    theirs = torch.autograd.grad((dense_soft_mask(dense, mask, 0.7) * upstream).sum(), (E, b_E))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        assert left.abs().max() > 1e-3


@pytest.mark.parametrize("magnitude", ["relu", "binary"])
def test_a_hard_gate_passes_no_gradient_through_the_choice(magnitude):
    config = factored(
        n_parents=6, topk_parent=2, n_children_per_parent=2, subspace_dim=2, gate="hard", magnitude=magnitude
    )
    model = HierarchicalSAE(config, 6).double()
    x = normal(5, 6)
    index, value, logits = model.encode_parent(x)
    assert torch.equal(index, logits.topk(2, dim=1).indices)  # no noise, in training mode either
    if magnitude == "binary":
        assert not value.requires_grad
    else:
        assert torch.equal(value, torch.relu(logits.gather(1, index)))


@pytest.mark.parametrize("child_budget", ["per_parent", "shared"])
def test_parents_and_children_are_encoded_one_after_the_other(child_budget):
    model = factored_sae(child_input="residual", child_budget=child_budget).eval()
    random_parameters(model)
    x = normal(11, WIDTH)
    codes, rows = model.encode(x), x - model.b_dec
    parent, value, _ = model.encode_parent(rows)
    left = rows - torch.einsum("bk,bkd->bd", value, model.D[parent])
    index, child, pre = model.encode_children(left, parent, value)
    assert pre.shape == (11, 3, 4)
    for found, expected in zip((parent, value, index, child), codes[:4], strict=True):
        torch.testing.assert_close(found, expected)


def test_the_gate_is_exactly_one_forward():
    logits = 50 * normal(40, 3)
    assert torch.equal(gated(logits.requires_grad_(), 0.3), torch.relu(logits))


def selection_frequencies(logits_P, kind, scale, draws=4000):
    """How often each parent is the one chosen of rows that are all the same, where the logits are the rows."""
    P = len(logits_P)
    model = factored_sae(P, n_parents=P, topk_parent=1, router_noise=kind, router_temp_start=0.8)
    with torch.no_grad():
        model.E.copy_(torch.eye(P))
    index, _, logits = model.encode_parent((scale * logits_P).expand(draws, -1), generator(0))
    assert torch.equal(logits[0], scale * logits_P)
    return torch.bincount(index[:, 0], minlength=P) / draws


def test_relative_noise_does_not_see_the_scale_of_the_logits_and_absolute_noise_does():
    logits = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    relative = selection_frequencies(logits, "relative", 1.0)
    assert torch.equal(relative, selection_frequencies(logits, "relative", 10.0))
    absolute = selection_frequencies(logits, "absolute", 1.0)
    # Gumbel noise times tau makes the choice a draw from softmax(r / tau).
    torch.testing.assert_close(absolute.double(), torch.softmax(logits / 0.8, 0), rtol=0, atol=0.025)
    torch.testing.assert_close(
        relative.double(), torch.softmax(logits / logits.std(correction=0) / 0.8, 0), rtol=0, atol=0.025
    )
    assert selection_frequencies(logits, "absolute", 10.0)[3] > 0.99 > relative[3] + 0.2


def test_one_parent_has_no_noise_to_choose_by():
    model = factored_sae(n_parents=1, topk_parent=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index, value, _ = model.encode_parent(normal(3, WIDTH), generator(1))
    assert index.tolist() == [[0]] * 3
    assert value.isfinite().all()


def test_temperature_runs_over_all_stages_together():
    model = HierarchicalSAE(factored(router_temp_start=1.5, router_temp_end=0.7), 16)
    assert model.router_temperature == 1.5
    values = []
    for step in range(100):
        model.update_router_temperature(step, 100)
        values.append(model.router_temperature)
    assert values == pytest.approx([1.5 - 0.8 * step / 100 for step in range(100)])


# -- the hierarchical autoencoder against a dense implementation


LOSSES = {
    "top_level_beta": 0.3,
    "l1_parent": 0.05,
    "l1_child": 0.07,
    "biorth_lambda": 0.02,
    "causal_ortho_lambda": 0.4,
}


def copied_tensors(model):
    """The model's tensors as leaves of their own; tied ones stay one leaf."""
    copies = {}
    return {name: copies.setdefault(id(t), t.detach().clone().requires_grad_()) for name, t in model.tensors().items()}


def largest(scores, n):
    """Numbers of the n largest entries of a list, in falling order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:n]


def of_batch(scores, n):
    """1 at the n largest positive entries of all."""
    mask = torch.zeros(scores.numel(), dtype=torch.float64)
    mask[largest(scores.flatten().tolist(), n)] = 1.0
    return mask.view_as(scores) * (scores > 0)


def dense_atoms(t):
    return torch.einsum("pcs,psd->pcd", t["G"], t["Up"]) if "Up" in t else t["G"]


def dense_forward(t, config, x, temperature):
    """The model of method.md section 1 with dense masks: (x_hat, x_hat_top, a [B,P], c [B,P,C])."""
    B, P, C = len(x), config.n_parents, config.n_children_per_parent
    centred = x - t["b_dec"] if "b_dec" in t else x
    r = centred @ t["E"].T + t["b_E"]
    mask = torch.zeros(B, P, dtype=torch.float64)
    for i in range(B):
        mask[i, largest(r[i].tolist(), config.topk_parent)] = 1.0
    if config.parent_budget != "per_row":
        mask = of_batch(r, B * config.topk_parent)
    gate = mask
    if config.gate == "straight_through":
        soft = dense_soft_mask(r, mask, temperature)
        gate = mask + soft - soft.detach()
    a = gate * (torch.relu(r) if config.magnitude == "relu" else torch.ones_like(r))
    top = a @ t["D"]
    child_input = centred
    if config.child_input == "residual":
        child_input = centred - top
    reads = torch.einsum("pcs,psd->pcd", t["F"], t["Down"]) if "Down" in t else t["F"]
    q = torch.einsum("bd,pcd->bpc", child_input, reads) + t["b_F"]
    child_mask = torch.zeros(B, P, C, dtype=torch.float64)
    if config.child_budget == "batch":
        child_mask = of_batch(q * (mask * a > 0).unsqueeze(2), B * config.active_children)
    for i in range(B if config.child_budget != "batch" else 0):
        routed = [p for p in range(P) if mask[i, p] > 0 and a[i, p] > 0]
        if config.child_budget == "per_parent":
            for p in routed:
                child_mask[i, p, largest(q[i, p].tolist(), config.topk_child)] = 1.0
        else:
            pairs = [(p, j) for p in routed for j in range(C)]
            for n in largest([q[i, p, j].item() for p, j in pairs], config.active_children):
                child_mask[i, pairs[n][0], pairs[n][1]] = 1.0
    c = child_mask * (torch.relu(q) if config.magnitude == "relu" else torch.ones_like(q))
    atoms = dense_atoms(t)
    base = t["b_dec"] if "b_dec" in t else torch.zeros(x.shape[1], dtype=torch.float64)
    return base + top + torch.einsum("bpc,pcd->bd", c, atoms), base + top, a, c


def dense_loss(t, config, x, temperature, sigma):
    x_hat, x_top, a, c = dense_forward(t, config, x, temperature)
    B, d = x.shape
    per = d if config.recon_reduction == "mean" else 1
    loss = ((x - x_hat) ** 2).sum() / B / per + config.top_level_beta * ((x - x_top) ** 2).sum() / B / per
    loss = loss + (config.l1_parent * a.sum() + config.l1_child * c.sum()) / B
    for read, write in ((t["E"][None], t["D"][None]), (t["F"], t["G"])):
        n = read.shape[1]
        if config.use_offdiag_biorth:
            unit = [rows / rows.norm(dim=-1, keepdim=True) for rows in (read, write)]
            product = unit[0] @ unit[1].mT
            off = product[:, ~torch.eye(n, dtype=torch.bool)]
            loss = loss + config.biorth_lambda * (off**2).mean()
        else:
            loss = loss + config.biorth_lambda * ((read @ write.mT - torch.eye(n, dtype=torch.float64)) ** 2).sum()
    inner = [
        t["D"][p] @ sigma @ dense_atoms(t)[p, j]
        for p in range(config.n_parents)
        for j in range(config.n_children_per_parent)
    ]
    return loss + config.causal_ortho_lambda * torch.stack([v**2 for v in inner]).mean()


@pytest.mark.parametrize("child_input", ["input", "residual"])
@pytest.mark.parametrize("tie", [False, True, "init"])
@pytest.mark.parametrize("magnitude", ["relu", "binary"])
@pytest.mark.parametrize("budget", [("per_parent", None), ("shared", None), ("shared", 5)])
def test_loss_and_all_gradients_equal_a_dense_implementation(child_input, budget, tie, magnitude):
    root = normal(WIDTH, WIDTH, seed=8)
    sigma = root @ root.T + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    x = normal(11, WIDTH, seed=3)
    for bias, gate in ((True, "straight_through"), (False, "hard"), (False, "straight_through")):
        model = factored_sae(
            **LOSSES,
            child_input=child_input,
            child_budget=budget[0],
            topk_child_total=budget[1],
            magnitude=magnitude,
            gate=gate,
            use_decoder_bias=bias,
            use_tied_decoders_parent=tie,
            use_tied_decoders_child=tie,
            tie_projectors=tie,
            use_offdiag_biorth=gate == "hard",
            recon_reduction="mean" if bias else "sum",
        ).eval()
        model.set_metric(sigma)
        random_parameters(model)
        model.update_router_temperature(3, 10)
        mine = sum(weight * value for weight, value in model.loss_terms(model(x), LossOverrides()).values())
        copies = copied_tensors(model)
        theirs = dense_loss(copies, model.config, x, model.router_temperature, sigma)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        mine.backward()
        theirs.backward()
        for name, tensor in model.tensors().items():
            got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            expected = torch.zeros_like(tensor) if copies[name].grad is None else copies[name].grad
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_the_dense_implementation_meets_closed_parents():
    """The comparison above would mean less if every selected parent were open and every row used all its children."""
    model = factored_sae(child_budget="shared").eval()
    random_parameters(model)
    codes = model(normal(11, WIDTH, seed=3)).codes
    assert 0 < (codes.parent_value == 0).sum() < codes.parent_value.numel()
    assert 0 < (codes.child_value == 0).sum() < codes.child_value.numel()


@pytest.mark.parametrize("noise", ["relative", "absolute"])
def test_training_noise_changes_the_choice_and_not_the_value(noise):
    model = factored_sae(router_noise=noise)
    model.router_temperature = 2.0
    x = normal(64, WIDTH)
    index, value, logits = model.encode_parent(x, generator(4))
    assert torch.equal(value, torch.relu(logits.gather(1, index)))
    again, _, _ = model.encode_parent(x, generator(4))
    other, _, _ = model.encode_parent(x, generator(5))
    assert torch.equal(index, again)
    assert not torch.equal(index, other)
    gumbel = -torch.empty_like(logits).exponential_(generator=generator(4)).log()
    scale = logits.std(dim=1, keepdim=True, correction=0) if noise == "relative" else 1.0
    noisy = logits + 2.0 * scale * gumbel
    assert torch.equal(index, noisy.topk(3, dim=1).indices)


@pytest.mark.parametrize("budget", ["per_parent", "shared"])
@pytest.mark.parametrize("k, topk_child, C", [(1, 1, 1), (6, 4, 4), (3, 2, 4)])
def test_codes_contract(budget, k, topk_child, C):
    model = factored_sae(child_budget=budget, topk_parent=k, topk_child=topk_child, n_children_per_parent=C).eval()
    random_parameters(model)
    h = normal(40, WIDTH, seed=2)
    output = model(h)
    codes = model.encode(h)
    B, K = 40, k * topk_child
    assert codes.parent_index.shape == codes.parent_value.shape == (B, k)
    assert codes.child_index.shape == codes.child_value.shape == (B, K)
    assert codes.parent_index.dtype == codes.child_index.dtype == torch.int64
    assert (codes.parent_value >= 0).all()
    assert (codes.child_value >= 0).all()
    for row in range(B):
        parents = codes.parent_index[row].tolist()
        children = codes.child_index[row].tolist()
        assert len(set(parents)) == k
        assert len(set(children)) == K
        opened = {p for p, a in zip(parents, codes.parent_value[row].tolist(), strict=True) if a > 0}
        owners = [flat // C for flat in children]
        assert set(owners) <= set(parents)
        assert all(p in opened for p, c in zip(owners, codes.child_value[row].tolist(), strict=True) if c > 0)
        if budget == "per_parent":
            assert all(owners.count(p) == topk_child for p in parents)
    torch.testing.assert_close(model.decode(codes), output.x_hat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.reconstruct(h), output.x_hat, rtol=1e-12, atol=1e-12)
    assert torch.equal(codes.l0(), (codes.parent_value > 0).sum(1) + (codes.child_value > 0).sum(1))
    dense = codes.dense_parents(model.n_parents)
    assert torch.equal(dense.gather(1, codes.parent_index), codes.parent_value)
    assert dense.sum().item() == pytest.approx(codes.parent_value.sum().item())
    atoms = model.atoms(torch.arange(model.n_parents))
    torch.testing.assert_close(atoms[2, C - 1], model.Up[2].T @ model.G[2, C - 1])


def test_known_answer_by_hand():
    """Two parents along the axes; the second opens one child along the third axis."""
    config = factored(
        n_parents=2, topk_parent=1, n_children_per_parent=2, subspace_dim=1, use_decoder_bias=False, gate="hard"
    )
    model = HierarchicalSAE(config, 3, "none").eval()
    with torch.no_grad():
        model.E.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
        model.D.copy_(model.E)
        model.Down.copy_(torch.tensor([[[0.0, 0, 1]], [[0.0, 0, 1]]]))
        model.Up.copy_(model.Down)
        model.F.copy_(torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]]))
        model.G.copy_(model.F)
    codes = model.encode(torch.tensor([[0.5, 2.0, -3.0], [-1.0, -2.0, 4.0]]))
    assert codes.parent_index.tolist() == [[1], [0]]
    assert codes.parent_value.tolist() == [[2.0], [0.0]]
    assert codes.child_index[0].tolist() == [1 * 2 + 1]
    assert codes.child_value.tolist() == [[3.0], [0.0]]  # the second row's parent is silent, and so is its child
    assert model.decode(codes).tolist() == [[0.0, 2.0, -3.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("normalize", ["rms", "unit_row", "none"])
@pytest.mark.parametrize("kind", ["hierarchical", "flat"])
def test_codes_and_reconstructions_speak_raw_activations(kind, normalize):
    if kind == "flat":
        model = TopKSAE(TopKConfig(n_latents=9, k=3), WIDTH, normalize).double().eval()
    else:
        model = sae(normalize=normalize).eval()
    random_parameters(model)
    mean, scale = normal(WIDTH, seed=7), 2.5
    model.set_normalization(mean, scale)
    h = 3 + 2 * normal(8, WIDTH)
    norms = h.norm(dim=1, keepdim=True) + 1e-6
    x = {"rms": (h - mean) / scale, "unit_row": h / norms, "none": h}[normalize]
    output = model(h)
    torch.testing.assert_close(output.x, x)
    expected = {"rms": output.x_hat * scale + mean, "unit_row": output.x_hat * norms, "none": output.x_hat}[normalize]
    torch.testing.assert_close(model.reconstruct(h), expected)
    norms_of_rows = model.write_directions().norm(dim=1)
    torch.testing.assert_close(norms_of_rows, torch.ones_like(norms_of_rows))


def test_evaluation_has_no_noise():
    model = factored_sae().eval()
    h = normal(30, WIDTH)
    first = model(h, generator(0))
    state = torch.get_rng_state()
    second = model(h)
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first.codes[:4], second.codes[:4], strict=True):
        assert torch.equal(left, right)
    assert torch.equal(first.codes.parent_index, first.router_logits.topk(3, dim=1).indices)


def test_an_empty_batch():
    for model in (sae().eval(), TopKSAE(TopKConfig(n_latents=9, k=3), WIDTH).double()):
        assert model.reconstruct(torch.zeros(0, WIDTH, dtype=torch.float64)).shape == (0, WIDTH)


@pytest.mark.parametrize("shape", [(4, WIDTH + 1), (WIDTH,), (2, 3, WIDTH)])
def test_rows_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=rf"encode: found rows of shape .*, allowed: \[B, {WIDTH}\]"):
        sae().encode(torch.zeros(shape, dtype=torch.float64))


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"hsae\.subspace_dim: found 6, allowed: at most the residual width 5"):
        factored_sae(subspace_dim=6).eval()
    with pytest.raises(ValueError, match="k: found 10, allowed: at most n_latents = 9"):
        TopKConfig(n_latents=9, k=10)


def test_the_seed_decides_the_start():
    one, same, other = factored_sae(seed=1).eval(), factored_sae(seed=1).eval(), factored_sae(seed=2).eval()
    assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in same.tensors().items())
    assert not torch.equal(one.D, other.D)
    torch.testing.assert_close(one.Up @ one.Up.mT, torch.eye(2, dtype=torch.float64).expand(6, 2, 2), atol=1e-6, rtol=0)


def test_the_bias_starts_at_the_median_in_normalised_coordinates():
    h = torch.tensor([[1.0, 1, 0, 0, 0], [3.0, 1, 0, 0, 0], [1.0, 3, 0, 0, 0], [3.0, 3, 0, 0, 0]]).double()
    model = sae(normalize="rms").eval()
    model.set_normalization(torch.ones(WIDTH, dtype=torch.float64), 2.0)
    model.initialize_bias([h])
    torch.testing.assert_close(model.b_dec.detach(), torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5]).double())
    sae(use_decoder_bias=False).initialize_bias([h])  # nothing to do


# -- cost of a step


def routed_flops(op):
    """Counts two operations for every number of every weight row that an embedding_bag product reads."""

    def count(first_shape, second_shape, *rest, out_shape=None, **options):
        if op is torch.ops.aten._embedding_bag_per_sample_weights_backward:  # rows, weights, indices
            return 2 * second_shape[1] * rest[0][0]
        return 2 * first_shape[1] * second_shape[0]  # weights, indices

    return count


AS_BAGS = [
    torch.ops.aten._embedding_bag,
    torch.ops.aten._embedding_bag_forward_only,
    torch.ops.aten._embedding_bag_per_sample_weights_backward,
]


def step_flops(P, budget):
    """(counted operations of forward and backward, those of the logits) under balanced routing.

    Parents stand on a circle and row i points at the middle of parents i k to i k + k - 1, so these are its largest.
    """
    B, k, C, s, d = 512, 4, 4, 3, 16
    config = factored(
        n_parents=P, topk_parent=k, n_children_per_parent=C, subspace_dim=s, child_budget=budget, l1_parent=0.1
    )
    model = HierarchicalSAE(config, d, "none").eval()
    angle = 2 * math.pi * torch.arange(P, dtype=torch.float64) / P
    middle = 2 * math.pi * (torch.arange(B, dtype=torch.float64) * k + (k - 1) / 2) / P
    x = torch.randn(B, d, generator=generator(0))
    with torch.no_grad():
        model.E.zero_()
        model.E[:, 0], model.E[:, 1] = angle.cos(), angle.sin()
        x[:, 0], x[:, 1] = middle.cos(), middle.sin()
    with FlopCounterMode(display=False, custom_mapping={op: routed_flops(op) for op in AS_BAGS}) as counter:
        output = model(x)
        loss = sum(weight * value for weight, value in model.loss_terms(output, LossOverrides()).values())
        loss.backward()
    expected = (torch.arange(B)[:, None] * k + torch.arange(k)) % P
    assert torch.equal(output.codes.parent_index.sort(1).values, expected.sort(1).values)
    assert (output.codes.parent_value > 0).all()
    routed = 3 * 2 * B * k * (2 * s * d + C * s)  # children, forward and backward
    parents = 5 * 2 * B * k * d  # what parents write, and the gradient of their logits
    return counter.get_total_flops(), 2 * B * P * d, routed + parents


@pytest.mark.parametrize("budget", ["per_parent", "shared"])
def test_operations_of_a_step_do_not_grow_with_the_parents(budget):
    for P in (256, 512, 1024, 2048, 4096):
        total, logits, routed = step_flops(P, budget)
        assert 0.75 * routed <= total - logits <= routed


# -- the flat autoencoder


def test_flat_gradients_equal_autograd_of_the_dense_form():
    model = TopKSAE(TopKConfig(n_latents=9, k=3), WIDTH, "none").double()
    random_parameters(model)
    x = normal(12, WIDTH)
    output = model(x)
    (loss,) = [value for _, value in model.loss_terms(output, LossOverrides(l1_parent=1.0)).values()]
    t = copied_tensors(model)
    r = (x - t["b_dec"]) @ t["E"].T + t["b_E"]
    mask = torch.zeros_like(r).scatter(1, r.topk(3, dim=1).indices, 1.0)
    x_hat = t["b_dec"] + (mask * torch.relu(r)) @ t["D"]
    expected = ((x - x_hat) ** 2).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, tensor in model.tensors().items():
        torch.testing.assert_close(tensor.grad, t[name].grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(output.x_hat, output.x_hat_top)
    assert output.codes.child_index.shape == (12, 0)
    torch.testing.assert_close(model.decode(model.encode(x)), output.x_hat)


# -- the teacher


class Roots:
    """Square roots of a metric, as a geometry has them."""

    def __init__(self, d, seed=6):
        root = normal(d, d, seed=seed)
        self.sigma = root @ root.T / d + 0.2 * torch.eye(d, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.sigma)
        self.sigma_sqrt = vectors @ values.sqrt().diag() @ vectors.T
        self.sigma_inv_sqrt = vectors @ values.rsqrt().diag() @ vectors.T


def child_inits(names, d=WIDTH, s=2, n=3):
    made = {}
    for number, name in enumerate(names):
        up = normal(s, d, seed=20 + number)
        G = normal(n, s, seed=40 + number)
        G = G / (G @ up).norm(dim=1, keepdim=True)
        made[name] = ChildInit(torch.linalg.pinv(up).T, up, G / G.square().sum(1, keepdim=True), G)
    return made


def test_a_teacher_goes_in_by_name_and_fills_the_first_parents_only():
    roots, names = Roots(WIDTH), ["bird", "fish", "tool"]
    vectors = {name: 3 * normal(WIDTH, seed=i) for i, name in enumerate(names)}
    children = child_inits(names)
    model, before = factored_sae().eval(), factored_sae().eval()
    model.b_E.data.fill_(0.5)
    model.initialize_from_teacher(vectors, {name: children[name] for name in reversed(names)}, roots)
    for row, name in enumerate(names):
        ell = vectors[name]
        write = roots.sigma_inv_sqrt @ ell
        torch.testing.assert_close(model.D[row], write / write.norm())
        torch.testing.assert_close(model.E[row], roots.sigma_sqrt @ ell * write.norm() / (ell @ ell))
        assert (model.E[row] @ model.D[row]).item() == pytest.approx(1)
        child = children[name]
        torch.testing.assert_close(model.Up[row], child.up)
        torch.testing.assert_close(model.Down[row], child.down)
        torch.testing.assert_close(model.F[row, :3], child.F)
        torch.testing.assert_close(model.G[row, :3], child.G)
        assert model.atoms(torch.tensor([row])).norm(dim=-1)[0].tolist() == pytest.approx([1] * 4)
    assert model.b_E.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    for name in ("E", "D", "Down", "Up", "F", "G"):
        torch.testing.assert_close(model.tensors()[name][3:], before.tensors()[name][3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_metric", ["euclidean", "causal"])
@pytest.mark.parametrize("seed_projectors", [True, False])
def test_a_teacher_keeps_the_unit_of_codes_whatever_the_norm(norm_metric, seed_projectors):
    """Scaling D and the atoms to unit norm scales E and F inversely: E_p.D_p and F_pc.G_pc keep their values."""
    roots, names = Roots(WIDTH), ["bird", "fish"]
    model = factored_sae(norm_metric=norm_metric).eval()
    model.set_metric(roots.sigma)
    model.initialize_from_teacher(
        {name: normal(WIDTH, seed=i) for i, name in enumerate(names)},
        child_inits(names),
        roots,
        seed_projectors=seed_projectors,
    )
    assert (model.E * model.D).sum(1)[:2].tolist() == pytest.approx([1, 1], abs=1e-9)
    torch.testing.assert_close((model.F * model.G).sum(-1)[:2, :3], torch.ones(2, 3, dtype=torch.float64))
    metric = roots.sigma if norm_metric == "causal" else torch.eye(WIDTH, dtype=torch.float64)
    atoms = model.atoms(torch.arange(2))
    torch.testing.assert_close(
        torch.einsum("pcd,de,pce->pc", atoms, metric, atoms), torch.ones(2, 4, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "off, kept",
    [
        ("seed_parent", ("E", "D", "b_E")),
        ("seed_child", ()),
        ("seed_projectors", ("Down", "Up")),
    ],
)
def test_each_part_of_a_teacher_can_be_left_out(off, kept):
    names = ["bird", "fish"]
    model, before = factored_sae().eval(), factored_sae().eval()
    model.initialize_from_teacher(
        {name: normal(WIDTH, seed=i) for i, name in enumerate(names)}, child_inits(names), Roots(WIDTH), **{off: False}
    )
    if off == "seed_child":  # G is scaled to unit atoms of the new projectors and F inversely
        for name in ("F", "G"):
            directions = torch.nn.functional.cosine_similarity(getattr(model, name), getattr(before, name), dim=-1)
            torch.testing.assert_close(directions, torch.ones_like(directions))
        torch.testing.assert_close((model.F * model.G).sum(-1), (before.F * before.G).sum(-1), rtol=0, atol=1e-6)
    changed = {name for name, tensor in model.tensors().items() if (tensor - before.tensors()[name]).abs().max() > 1e-6}
    assert changed == {"E", "D", "Down", "Up", "F", "G"} - set(kept)


def test_the_literal_form_reads_and_writes_along_one_unit_vector():
    vectors = {"bird": 4 * normal(WIDTH), "fish": normal(WIDTH, seed=1)}
    for tie in (True, "init"):
        model = factored_sae(use_tied_decoders_parent=tie).eval()
        model.initialize_from_teacher(vectors, child_inits(vectors))
        for row, vector in enumerate(vectors.values()):
            torch.testing.assert_close(model.D[row], vector / vector.norm())
            torch.testing.assert_close(model.E[row], model.D[row])
        assert (model.E is model.D) == (tie is True)


def test_teachers_that_do_not_fit_are_refused():
    names = [f"c{i}" for i in range(7)]
    vectors = {name: normal(WIDTH, seed=i) for i, name in enumerate(names)}
    with pytest.raises(ValueError, match=r"hsae\.n_parents: found 6, allowed: at least the teacher's 7 parents"):
        factored_sae().eval().initialize_from_teacher(vectors, child_inits(names))
    with pytest.raises(ValueError, match=r"teacher: found \['c1', 'x'\] in one of"):
        factored_sae().eval().initialize_from_teacher(
            {name: vectors[name] for name in ("c0", "c1")}, child_inits(["c0", "x"])
        )
    tied = factored_sae(use_tied_decoders_parent=True).eval()
    with pytest.raises(ValueError, match=r"hsae\.use_tied_decoders_parent: found true, allowed: false or init"):
        tied.initialize_from_teacher({"c0": vectors["c0"]}, child_inits(["c0"]), Roots(WIDTH))


# -- files


def saved_models():
    tied = {"use_tied_decoders_parent": True, "use_tied_decoders_child": True, "tie_projectors": True}
    return {
        "default": HierarchicalSAE(config(), WIDTH),
        "factored": HierarchicalSAE(factored(**SHAPE), WIDTH),
        "tied, causal, without bias": HierarchicalSAE(
            factored(**SHAPE, **tied, use_decoder_bias=False, causal_ortho_lambda=0.1), WIDTH, "unit_row"
        ),
        "literal penalty": HierarchicalSAE(
            factored(**SHAPE, causal_orth_form="literal", causal_ortho_lambda=0.1), WIDTH, "none"
        ),
        "flat": TopKSAE(TopKConfig(n_latents=9, k=3), WIDTH),
    }


@pytest.mark.parametrize("name", list(saved_models()))
def test_saving_and_loading_is_exact(name, tmp_path):
    model = saved_models()[name]
    random_parameters(model)
    model.set_normalization(torch.arange(WIDTH) / 3, 1.7)
    if isinstance(model, HierarchicalSAE):
        model.set_metric(Roots(WIDTH).sigma)
        model.freeze(["G", "D"])  # what a frozen stage keeps beside the parameters is not part of the model
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    model.save_pretrained(tmp_path / "again")  # over an old one
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "again")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.normalize == model.normalize
    assert not loaded.training
    model.freeze(())
    state, again = model.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    h = torch.randn(7, WIDTH, generator=generator(0))
    assert torch.equal(loaded.reconstruct(h), model.eval().reconstruct(h))
    if name.startswith("tied"):
        assert loaded.E is loaded.D
        assert loaded.F is loaded.G
        assert loaded.Down is loaded.Up


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    HierarchicalSAE(config(), WIDTH).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_error(name, cls=SparseAutoencoder):
    with pytest.raises(ValueError, match=": ") as error:
        cls.from_pretrained(name)
    return one_line(error)


def edit_header(folder, **changes):
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**header, **changes}))


def test_loading_another_architecture(folder):
    message = load_error(folder, TopKSAE)
    assert message.endswith("config.json: architecture: found 'HierarchicalSAE', allowed: TopKSAE")
    edit_header(folder, architecture="Transformer")
    kinds = "BatchTopKSAE, HierarchicalSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE"
    assert f"found 'Transformer', allowed: {kinds}" in load_error(folder)
    (folder / "config.json").write_text("[1, 2]")
    assert load_error(folder).endswith("config.json: found [1, 2], allowed: input should be a valid dictionary")


def test_loading_a_header_that_is_broken(folder):
    good = (folder / "config.json").read_text()
    for changes, words in (
        ({"config": {**SHAPE, "n_parrots": 3}}, "n_parrots"),
        ({"config": {**SHAPE, "topk_parent": 7}}, "topk_parent: found 7, allowed: at most n_parents = 6"),
        ({"normalize": "l2"}, "normalize: found 'l2', allowed: rms, unit_row, none"),
        ({"width": "wide"}, "width"),
        ({"width": -1}, "width"),
    ):
        (folder / "config.json").write_text(good)
        edit_header(folder, **changes)
        message = load_error(folder)
        assert words in message, message
        assert str(folder / "config.json") in message
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in load_error(folder)


def test_loading_when_files_are_missing(folder):
    shutil.copytree(folder, folder.parent / "b")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in load_error(folder)
    (folder.parent / "b" / "config.json").unlink()
    assert "config.json: no such file, allowed: a folder written by save_pretrained" in load_error(folder.parent / "b")
    assert "no such folder, allowed: a saved model's folder or a hub id" in load_error(folder.parent / "nowhere")


def test_pickles_are_refused_by_name(folder, monkeypatch):
    tensors = folder / "model.safetensors"
    pickled = folder / "pytorch_model.bin"
    torch.save({"E": torch.zeros(2)}, pickled)
    monkeypatch.chdir(folder)
    for name in (pickled, "pytorch_model.bin", "./pytorch_model.bin"):
        message = load_error(name)
        assert message.endswith("pytorch_model.bin: found a .bin file, allowed: .safetensors (pickles are never read)")
    monkeypatch.chdir(folder.parent)
    assert "found a .bin file" in load_error("model/pytorch_model.bin")  # one slash: not a hub id when it is a file
    shutil.copy(pickled, tensors)
    assert "model.safetensors: not a complete safetensors file" in load_error(folder)
    tensors.unlink()
    assert "pytorch_model.bin: found a .bin file" in load_error(folder)


def test_loading_a_truncated_or_misshapen_file(folder):
    tensors = folder / "model.safetensors"
    whole = tensors.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        assert "model.safetensors: not a complete safetensors file" in load_error(folder)
    HierarchicalSAE(config(n_parents=7), WIDTH).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "model.safetensors", tensors)
    message = load_error(folder)
    assert "D: found float32 [7, 5], allowed: float32 or float64 or float16 or bfloat16 [6, 5]" in message
    assert str(tensors) in message


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(name, **options):
        assert name == "owner/name"
        raise OSError("no route to host\nreally")

    monkeypatch.setattr("polytope_hsae.models.base.snapshot_download", fail)
    reason = "not a folder here, and the hub does not give it (no route to host really)"
    assert load_error("owner/name") == f"owner/name: {reason}"


def test_codes_of_a_flat_model_have_no_children():
    codes = Codes(
        torch.tensor([[3, 1]]),
        torch.tensor([[0.0, 2.0]]),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 0),
    )
    assert codes.l0().tolist() == [1]
    assert codes.dense_parents(4).tolist() == [[0, 2, 0, 0]]


@pytest.mark.parametrize("form", ["factored", "direct"])
@pytest.mark.parametrize("tie", [False, "init", True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_from_the_shape_are_the_models(form, tie, bias):
    config = factored(
        n_parents=7,
        topk_parent=2,
        n_children_per_parent=3,
        subspace_dim=4,
        children=form,
        use_tied_decoders_parent=tie,
        use_tied_decoders_child=tie,
        tie_projectors=tie if form == "factored" else False,
        use_encoder_bias=bias,
        use_decoder_bias=bias,
    )
    model = HierarchicalSAE(config, 9)
    assert parameter_count(config, 9) == sum(parameter.numel() for parameter in model.parameters())
