"""Loss terms and constraints against their naive forms."""

from itertools import product

import numpy as np
import pytest
import torch
from models import config, factored_sae, normal, sae, total
from scipy.optimize import minimize

from polytope_hsae.config import HSAEConfig, LossOverrides
from polytope_hsae.models.codes import Codes, ModelOutput
from polytope_hsae.models.constraints import atom_norms, geometric_median, gram, restore_gram, row_norms
from polytope_hsae.models.hsae import freeze_decoder_weights, unfreeze_decoder_weights
from polytope_hsae.models.losses import WARMED_UP, biorth_identity, biorth_offdiag, causal_orthogonality, mean_error
from polytope_hsae.ops.orthogonality.naive import biorth_jax

PUBLISHED = {"magnitude": "leaky_offset", "gate": "hard", "use_encoder_bias": False, "use_decoder_bias": False}
SMALL = {"n_parents": 5, "topk_parent": 2, "n_children_per_parent": 4, "subspace_dim": 3}


def spd(d, seed=9):
    root = normal(d, d, seed=seed)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def naive_identity(E, D):
    total = 0.0
    for e, g in zip(E.reshape(-1, *E.shape[-2:]), D.reshape(-1, *D.shape[-2:]), strict=True):
        for i, j in product(range(len(e)), repeat=2):
            total = total + (e[i] @ g[j] - float(i == j)) ** 2
    return total


def naive_offdiag(E, D):
    squares = []
    for e, g in zip(E.reshape(-1, *E.shape[-2:]), D.reshape(-1, *D.shape[-2:]), strict=True):
        for i, j in product(range(len(e)), repeat=2):
            if i != j:
                squares.append((e[i] @ g[j] / (e[i].norm() * g[j].norm())) ** 2)
    return torch.stack(squares).mean()


@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (9, 4), (2, 1), (4, 3, 7), (4, 5, 5), (3, 9, 4), (2, 3, 6, 2)])
@pytest.mark.parametrize("form, naive", [(biorth_identity, naive_identity), (biorth_offdiag, naive_offdiag)])
def test_biorthogonality_equals_the_naive_form(shape, form, naive):
    E, D = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
    value, expected = form(E, D), naive(E, D)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)
    for mine, theirs in zip(torch.autograd.grad(value, (E, D)), torch.autograd.grad(expected, (E, D)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_the_jax_penalty_is_not_the_form_it_was_meant_to_be():
    """Orthonormal rows have no off-diagonal entries, and the published form still charges for them."""
    rows = torch.eye(4, 6, dtype=torch.float64)
    assert biorth_offdiag(rows, rows) == 0
    assert float(biorth_jax(rows, rows)) == pytest.approx(np.sqrt(12) / 12, rel=1e-5)
    assert biorth_jax(rows[:1], rows[:1]) == 0


def test_biorthogonality_never_builds_the_square_matrix():
    # 60,000 rows of width 2: the naive product would need 29 GB.
    E = torch.ones(60_000, 2)
    assert biorth_offdiag(E, E).item() == pytest.approx(1.0, rel=1e-4)
    assert biorth_identity(E, E).item() == pytest.approx(60_000**2 * 4 - 2 * 2 * 60_000 + 60_000, rel=1e-4)


@pytest.mark.parametrize("form", ["atom", "literal"])
@pytest.mark.parametrize("metric", [None, spd(7)])
def test_causal_orthogonality_equals_the_double_loop(form, metric):
    P, C, s, d = 3, 4, 2, 7
    D, Up, G = normal(P, d), normal(P, s, d, seed=1), normal(P, C, s, seed=2)
    M = torch.eye(d, dtype=torch.float64) if metric is None else metric
    total = 0.0
    for p, c in product(range(P), range(C)):
        atom = Up[p].T @ G[p, c]
        difference = atom if form == "atom" else atom - D[p]
        total += (D[p] @ M @ difference).item() ** 2
    assert causal_orthogonality(D, Up, G, metric, form).item() == pytest.approx(total / (P * C), rel=1e-12)


@pytest.mark.parametrize("make", [sae, factored_sae])
@pytest.mark.parametrize("form", ["atom", "literal"])
def test_a_literal_penalty_uses_the_inverse_metric_in_training_too(make, form):
    model, sigma = make(6, causal_ortho_lambda=1.0, causal_orth_form=form), spd(6)
    model.set_metric(sigma)
    value = model.loss_terms(model(normal(5, 6)), LossOverrides())["causal_orth"][1]
    metric = sigma.inverse() if form == "literal" else sigma
    expected = causal_orthogonality(model.D, model.Up, model.G, metric, form)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_reconstruction_reductions():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    x_hat = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    error = (x - x_hat).square().sum(1)
    assert mean_error(error, 2, "sum").item() == pytest.approx((5 + 0 + 25) / 3)
    assert mean_error(error, 2, "mean").item() == pytest.approx(torch.nn.functional.mse_loss(x_hat, x).item())


def output_of_known_codes():
    codes = Codes(
        torch.tensor([[0, 1], [2, 0]]),
        torch.tensor([[1.0, 2.0], [0.5, 0.0]]),
        torch.tensor([[0, 3], [4, 1]]),
        torch.tensor([[3.0, 0.0], [0.25, 0.0]]),
    )
    logits = torch.tensor([[1.0, 2.0, 0.5], [-4.0, 0.25, 0.5]])
    child_pre = torch.tensor([[[3.0, -1.0], [0.5, -2.0]], [[0.25, 0.125], [7.0, -1.0]]])
    zero = torch.zeros(2, 3)
    errors, errors_top = torch.full((2,), 3.0), torch.full((2,), 12.0)
    return ModelOutput(zero, zero + 1, zero + 2, codes, logits, errors, errors_top, child_pre)


def test_l1_is_the_sum_of_a_rows_codes():
    model = sae(l1_parent=0.1, l1_child=0.2, top_level_beta=0.5)
    terms = model.loss_terms(output_of_known_codes(), LossOverrides())
    assert {name: (weight, value.item()) for name, (weight, value) in terms.items()} == {
        "recon": (1.0, 3.0),
        "recon_top": (0.5, 12.0),
        "l1_parent": (0.1, pytest.approx(3.5 / 2)),
        "l1_child": (0.2, pytest.approx(3.25 / 2)),
    }


def test_terms_of_weight_zero_are_absent_and_a_stage_overrides_weights():
    model = sae(top_level_beta=0.1, causal_ortho_lambda=0.3)
    output = model(normal(2, 5))
    assert set(model.loss_terms(output, LossOverrides())) == {"recon", "recon_top", "causal_orth"}
    stage = LossOverrides(causal_ortho_lambda=0.0, biorth_lambda=0.7, top_level_beta=0.0, l1_child=0.2)
    terms = model.loss_terms(output, stage)
    assert {name: weight for name, (weight, _) in terms.items()} == {
        "recon": 1.0,
        "l1_child": 0.2,
        "biorth_router": 0.7,
        "biorth_child": 0.7,
    }
    assert set(terms) - {"recon"} <= set(WARMED_UP)


# -- constraints


def test_the_first_parents_rebuild_the_row_by_themselves():
    shares = (0.25, 0.5)
    model = sae(6, n_parents=8, topk_parent=4, parent_prefixes=shares, top_level_beta=0.5).eval()
    h_Bd = normal(20, 6, seed=1)
    weight, value = model.loss_terms(model(h_Bd), LossOverrides())["recon_prefixes"]
    codes_BP = model(h_Bd).codes.dense_parents(8)
    expected = sum((h_Bd - codes_BP[:, :n] @ model.D[:n] - model.b_dec).square().sum(1).mean() for n in (2, 4))
    assert (weight, value.item()) == (0.5, pytest.approx(expected.item(), rel=1e-5))
    value.backward()
    assert model.D.grad[:4].abs().sum() > 0
    assert (model.D.grad[4:] == 0).all()
    assert "recon_prefixes" not in model.loss_terms(model(h_Bd), LossOverrides(top_level_beta=0.0))
    assert HSAEConfig.model_validate(model.config.model_dump()) == model.config
    for wrong in ((0.5, 0.25), (0.0,), (1.0,)):
        with pytest.raises(ValueError, match="parent_prefixes"):
            config(parent_prefixes=wrong)


def test_norms_in_a_metric():
    M = spd(5)
    rows, Up, G = normal(4, 5), normal(3, 2, 5, seed=1), normal(3, 4, 2, seed=2)
    expected = torch.stack([(row @ M @ row).sqrt() for row in rows])
    torch.testing.assert_close(row_norms(rows, M)[:, 0], expected)
    torch.testing.assert_close(row_norms(rows, None)[:, 0], rows.norm(dim=1))
    for metric in (None, M):
        torch.testing.assert_close(atom_norms(Up, G, metric), row_norms(G @ Up, metric))


@pytest.mark.parametrize("metric", [None, spd(6)])
def test_restoring_a_gram_matrix_keeps_the_row_space(metric):
    Up, reference = normal(3, 2, 6), gram(normal(3, 2, 6, seed=1), metric)
    restored = restore_gram(Up, reference, metric)
    torch.testing.assert_close(gram(restored, metric), reference)
    both = torch.cat([Up, restored], dim=1)
    assert torch.linalg.matrix_rank(both, rtol=1e-9).tolist() == [2, 2, 2]
    torch.testing.assert_close(restore_gram(Up, gram(Up, metric), metric), Up)
    Up[1, 1] = 0
    assert restore_gram(Up, reference, metric).isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("norm_metric", ["euclidean", "causal"])
@pytest.mark.parametrize("form", ["atom", "decoder", "direct"])
@pytest.mark.parametrize("tie", [True, "init"])
def test_a_projected_gradient_changes_no_constrained_norm_at_first_order(norm_metric, form, tie):
    options = {"norm_metric": norm_metric, "gate": "hard", "causal_ortho_lambda": 0.1, "tie_projectors": tie}
    options |= {"children": "direct", "tie_projectors": False} if form == "direct" else {"normalize_child": form}
    ties = {"use_tied_decoders_parent": tie, "use_tied_decoders_child": tie}
    model, h = factored_sae(6, "rms", 3, **SMALL, **options, **ties), normal(40, 6, seed=4)
    model.set_metric(spd(6))
    model.normalize_decoder_weights()
    metric = model.norm_metric()
    norms_of_atoms = row_norms(model.atoms(slice(None)), metric)
    if form != "decoder":
        torch.testing.assert_close(norms_of_atoms, torch.ones_like(norms_of_atoms))
    total(model.loss_terms(model(h), LossOverrides())).backward()
    model.project_gradients()
    for rows, norms in ((model.D, lambda: row_norms(model.D, metric)), (model.G, lambda: model.child.norms(metric))):
        assert rows.grad.norm() > 1e-6
        with torch.no_grad():
            start, step = rows.clone(), 1e-4 * rows.grad / rows.grad.norm()
            rows.copy_(start + step)
            above = norms()
            rows.copy_(start - step)
            below = norms()
            rows.copy_(start)
        assert (above - below).abs().max() < 1e-12
    if tie is True:
        assert model.E.grad is model.D.grad


def test_geometric_median_streams():
    x = normal(31, 3)
    whole = geometric_median([x])
    torch.testing.assert_close(geometric_median(list(x.split(7))), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="found no rows"):
        geometric_median([])


def test_geometric_median_against_a_minimiser():
    x = normal(31, 3)
    x[:4] += 40  # outliers that would drag the mean by five units

    def summed_distance(point):
        return float(np.linalg.norm(x.numpy() - point, axis=1).sum())

    best = minimize(summed_distance, x.mean(0).numpy(), tol=1e-10)
    median = geometric_median([x], iterations=1000, tolerance=1e-10)
    np.testing.assert_allclose(median.numpy(), best.x, atol=1e-4)
    assert summed_distance(geometric_median([x]).numpy()) <= best.fun * (1 + 1e-6)


def test_geometric_median_known_answers():
    square = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) + 5
    torch.testing.assert_close(geometric_median([square]), torch.tensor([5.0, 5.0]).double())
    torch.testing.assert_close(geometric_median([torch.ones(3, 2)]), torch.ones(2).double())
    line = torch.tensor([[-3.0], [0.0], [1.0], [1.0], [1.0]])  # its mean, 0, is one of the points and not the median
    torch.testing.assert_close(geometric_median([line]), torch.tensor([1.0]).double(), rtol=0, atol=1e-3)


def assert_unit(model, metric=None):
    metric = metric if model.config.norm_metric == "causal" else None
    D, G, atoms = model.D.double(), model.G.double(), model.atoms(slice(None)).double()
    torch.testing.assert_close(row_norms(D, metric), torch.ones(5, 1, dtype=torch.float64), rtol=0, atol=1e-6)
    norms = row_norms(atoms, metric) if model.config.normalize_child == "atom" else row_norms(G, None)
    torch.testing.assert_close(norms, torch.ones(5, 4, 1, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_metric", ["euclidean", "causal"])
@pytest.mark.parametrize("form, tie_projectors", [*product(["atom", "decoder"], [True, "init"]), ("direct", False)])
def test_norms_hold_after_every_step_of_every_stage(norm_metric, form, tie_projectors):
    metric = spd(6)
    losses = {"causal_ortho_lambda": 0.3, "biorth_lambda": 0.1, "l1_child": 0.3}
    options = {"norm_metric": norm_metric, "tie_projectors": tie_projectors}
    options |= {"children": "direct", "gate": "hard"} if form == "direct" else {"normalize_child": form}
    model = factored_sae(6, "rms", 3, **SMALL, **losses, **options).float()
    model.set_metric(metric.float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    h = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for frozen in ({"D", "G"}, {"G"}, {"D"}, {"Up"}, {"D", "G", "Up"}, {"D", "G"}, set()):
        model.freeze(frozen)
        before = {name: tensor.detach().clone() for name, tensor in model.tensors().items()}
        for _ in range(3):
            total(model.loss_terms(model(h), LossOverrides())).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.normalize_decoder_weights()
            assert_unit(model, metric)
        tied = {"Down"} if tie_projectors is True and "Up" in frozen else set()
        for name, tensor in model.tensors().items():
            assert torch.equal(tensor, before[name]) == (name in {*frozen, *tied}), (frozen, name)


def test_norms_are_left_alone_when_the_constraint_is_off():
    model = factored_sae(normalize_decoder=False)
    with torch.no_grad():
        model.D.mul_(2.0)
        model.G.mul_(3.0)
    before = {name: tensor.detach().clone() for name, tensor in model.tensors().items()}
    model.normalize_decoder_weights()
    freeze_decoder_weights(model)
    model.normalize_decoder_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_freezing_names_exactly_what_is_frozen():
    model = factored_sae(use_tied_decoders_parent=True)
    freeze_decoder_weights(model)
    frozen = {name for name, tensor in model.tensors().items() if not tensor.requires_grad}
    assert frozen == {"D", "G", "E"}  # E is D
    model.freeze(["b_E"])
    assert {name for name, tensor in model.tensors().items() if not tensor.requires_grad} == {"b_E"}
    unfreeze_decoder_weights(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- codes, ties, auxiliary terms


def test_leaky_offset_codes_known_answer():
    logit = torch.tensor([-2.0, 0.0, 0.49, 0.5, 3.0])
    model = factored_sae(width=4, **PUBLISHED, n_parents=5, topk_parent=5).float()  # from 0.5 up
    with torch.no_grad():
        model.E.zero_()[:, 0] = logit
    index, value, _ = model.encode_parent(torch.tensor([[1.0, 0, 0, 0]]))
    assert torch.zeros(5).scatter(0, index[0], value[0]).tolist() == [0, 0, 0, 0.5, 3]
    torch.testing.assert_close(model.child.code(logit), torch.tensor([-0.02, 0.0, 0.0049, 0.5, 3.0]))
    assert sae().child.code(logit).tolist() == [0, 0, logit[2], 0.5, 3]
    assert factored_sae(magnitude="binary").child.code(logit).tolist() == [1.0] * 5


def test_the_gram_term_is_the_overlap_of_decoder_rows():
    model = sae(gram_lambda=0.3)
    weight, value = model.loss_terms(model(normal(9, 5)), LossOverrides())["gram"]
    overlaps = [(model.D[i] @ model.D[j]) ** 2 for i in range(6) for j in range(6) if i != j]
    assert weight == 0.3
    torch.testing.assert_close(value, torch.stack(overlaps).mean())
    assert "gram" in WARMED_UP
