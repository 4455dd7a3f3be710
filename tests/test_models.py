"""The hierarchical autoencoder: values and gradients against plain dense forms, codes, coordinates, cost of a step."""

import math
import warnings

import pytest
import torch
from dense import LOSSES, assert_dense, copied_tensors, dense_soft_mask
from models import WIDTH, Roots, factored, factored_sae, generator, normal, random_parameters, sae, total
from torch.utils.flop_counter import FlopCounterMode

from polytope_hsae.config import LossOverrides
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.models.flops import parameter_count, training_flops
from polytope_hsae.models.hsae import HierarchicalSAE

# -- against a dense implementation


@pytest.mark.parametrize("child_input", ["input", "residual"])
@pytest.mark.parametrize("tie", [False, True, "init"])
@pytest.mark.parametrize("magnitude", ["relu", "binary"])
@pytest.mark.parametrize("budget", [("per_parent", None), ("shared", None), ("shared", 5)])
def test_loss_and_all_gradients_equal_a_dense_implementation(child_input, budget, tie, magnitude):
    sigma = Roots(WIDTH, seed=8).sigma
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
        assert_dense(model, normal(11, WIDTH, seed=3), sigma)


@pytest.mark.parametrize("tie", [False, "init", True])
@pytest.mark.parametrize("budget", ["per_parent", "shared"])
@pytest.mark.parametrize("child_input", ["residual", "input"])
def test_direct_children_equal_a_dense_implementation(tie, budget, child_input):
    options = {"child_budget": budget, "child_input": child_input, "use_tied_decoders_child": tie}
    model = factored_sae(children="direct", gate="hard", use_offdiag_biorth=budget == "shared", **options, **LOSSES)
    random_parameters(model)
    sigma = Roots(WIDTH).sigma
    model.set_metric(sigma)
    assert_dense(model, normal(11, WIDTH, seed=3), sigma)


def test_the_dense_implementation_meets_closed_parents():
    """The comparison above would mean less if every selected parent were open and every row used all its children."""
    model = factored_sae(child_budget="shared").eval()
    random_parameters(model)
    codes = model(normal(11, WIDTH, seed=3)).codes
    assert 0 < (codes.parent_value == 0).sum() < codes.parent_value.numel()
    assert 0 < (codes.child_value == 0).sum() < codes.child_value.numel()


# -- gate, noise


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
    E, b_E = (copied_tensors(model)[name] for name in ("E", "b_E"))
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


# -- codes


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


@pytest.mark.parametrize("shape", [(4, WIDTH + 1), (WIDTH,), (2, 3, WIDTH)])
def test_rows_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=rf"encode: found rows of shape .*, allowed: \[B, {WIDTH}\]"):
        sae().encode(torch.zeros(shape, dtype=torch.float64))


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
        total(model.loss_terms(output, LossOverrides())).backward()
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


def test_flops_of_direct_children_by_hand():
    shape = {"n_parents": 10, "topk_parent": 2, "n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"}
    parents = 2 * 10 * 5 + 2 * (10 + 10) + 2 * 3 * 10
    encode = 2 * 3 * 10 + 2 * (10 + 10)  # 2 parents' 3 rows of width 5; gradients of 2 rows and of their input
    direct = factored(**shape, children="direct")
    assert training_flops(direct, 5) == parents + encode + 3 * 2 * 10


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
