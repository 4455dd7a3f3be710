"""Children that read, or write, rows of full width: gradients, constraints, files, FLOPs, teachers."""

import pytest
import torch
from models import SHAPE, WIDTH, factored, generator, normal, random_parameters
from test_budgets import assert_dense
from test_models import LOSSES, Roots, child_inits

from polytope_hsae.config import LossOverrides
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flops import training_flops
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.models.losses import biorth_identity

KINDS = ["factored", "direct"]


def make_model(child_decoder, **options):
    options = {**SHAPE, "gate": "hard", "child_encoder": "direct", "child_decoder": child_decoder, **options}
    return HierarchicalSAE(factored(**options), WIDTH, "none").double()


@pytest.mark.parametrize("child_decoder, tie", [("factored", False), ("factored", "init"), ("direct", True)])
@pytest.mark.parametrize("budget", ["per_parent", "shared"])
@pytest.mark.parametrize("child_input", ["residual", "input"])
def test_loss_and_all_gradients_equal_a_dense_implementation(child_decoder, tie, budget, child_input):
    options = {"child_budget": budget, "child_input": child_input, "use_tied_decoders_child": tie}
    model = make_model(child_decoder, use_offdiag_biorth=budget == "shared", **options, **LOSSES)
    random_parameters(model)
    sigma = Roots(WIDTH).sigma
    model.set_metric(sigma)
    assert_dense(model, normal(11, WIDTH, seed=3), sigma)


def test_subspaces_as_wide_as_the_rows_are_still_subspaces():
    """F and G then have one shape, and F still compares with atoms."""
    model = make_model("factored", subspace_dim=WIDTH, initial_children="data", **{**LOSSES, "causal_ortho_lambda": 0})
    model.initialize_bias([normal(60, WIDTH)])
    torch.testing.assert_close(model.F, model.atoms(slice(None)))
    random_parameters(model)
    found = model.loss_terms(model(normal(11, WIDTH, seed=3)), LossOverrides())["biorth_child"][1]
    torch.testing.assert_close(found, biorth_identity(model.F, model.atoms(slice(None))))


@pytest.mark.parametrize("child_decoder", KINDS)
def test_children_start_reading_what_they_write(child_decoder):
    model = make_model(child_decoder)
    assert set(model.tensors()) == {"E", "b_E", "D", "F", "b_F", "G", "b_dec"} | (
        {"Up"} if child_decoder == "factored" else set()
    )
    torch.testing.assert_close(model.child_readers(slice(None)), model.atoms(slice(None)))
    assert model.F.shape == (6, 4, WIDTH)


@pytest.mark.parametrize("metric", ["euclidean", "causal"])
@pytest.mark.parametrize("child_decoder", KINDS)
def test_atoms_keep_their_norm(child_decoder, metric):
    model = make_model(child_decoder, norm_metric=metric, project_gradient=True)
    random_parameters(model)
    sigma = Roots(WIDTH).sigma if metric == "causal" else torch.eye(WIDTH, dtype=torch.float64)
    model.set_metric(sigma)
    model.normalize_decoder_weights()
    atoms = model.atoms(slice(None))
    torch.testing.assert_close(((atoms @ sigma) * atoms).sum(2), torch.ones(6, 4, dtype=torch.float64))
    (atoms * normal(6, 4, WIDTH)).sum().backward()
    model.project_gradients()
    before = model.child_norms().sum().item()
    with torch.no_grad():
        model.G += 1e-5 * model.G.grad
    assert model.child_norms().sum().item() == pytest.approx(before, abs=1e-8)


@pytest.mark.parametrize("child_decoder", KINDS)
def test_saving_and_loading_is_exact(child_decoder, tmp_path):
    model = make_model(child_decoder, use_tied_decoders_child=child_decoder == "direct").float()
    random_parameters(model)
    model.save_pretrained(tmp_path / "model")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert (loaded.F is loaded.G) is (child_decoder == "direct")
    h = torch.randn(7, WIDTH, generator=generator(0))
    assert torch.equal(loaded.reconstruct(h), model.eval().reconstruct(h))
    torch.testing.assert_close(model.decode(model.encode(h)), model(h).x_hat)


@pytest.mark.parametrize("child_decoder", KINDS)
def test_a_teacher_reads_and_writes_as_in_the_factored_form(child_decoder):
    names = ["a", "b"]
    vectors = {name: normal(WIDTH, seed=number) for number, name in enumerate(names)}
    model, factored = make_model(child_decoder), make_model("factored", child_encoder="factored")
    for each in (model, factored):
        each.initialize_from_teacher(vectors, child_inits(names), Roots(WIDTH))
    first = slice(0, 2)
    torch.testing.assert_close(model.child_readers(first)[:, :3], factored.child_readers(first)[:, :3])
    torch.testing.assert_close(model.atoms(first)[:, :3], factored.atoms(first)[:, :3])


@pytest.mark.parametrize("child_decoder", KINDS)
def test_a_start_from_data_reads_what_it_writes(child_decoder):
    model = make_model(child_decoder, initial_children="data", initial_router="rows")
    before = model.F.clone()
    model.initialize_bias([normal(60, WIDTH)])
    torch.testing.assert_close(model.F, model.atoms(slice(None)))
    assert not torch.equal(model.F, before)


def test_flops_by_hand():
    shape = {"n_parents": 10, "topk_parent": 2, "n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"}
    parents = 2 * 10 * 5 + 2 * (10 + 10) + 2 * 3 * 10
    encode = 2 * 3 * 10 + 2 * (10 + 10)  # 2 parents' 3 rows of width 5; gradients of 2 rows and of their input
    direct = factored(**shape, child_encoder="direct", child_decoder="direct")
    assert training_flops(direct, 5) == parents + encode + 3 * 2 * 10
    half = factored(**shape, child_encoder="direct")
    assert training_flops(half, 5) == parents + encode + 3 * (2 * 8 + 2 * 40)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"child_decoder": "direct"}, "child_decoder: found direct, allowed: factored unless child_encoder is direct"),
        (
            {"child_encoder": "direct", "use_tied_decoders_child": True},
            "use_tied_decoders_child: found true, allowed: false or init unless child_encoder and child_decoder agree",
        ),
        (
            {"child_encoder": "direct", "tie_projectors": True},
            "tie_projectors: found true, allowed: false or init unless child_encoder is factored",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factored(**options)
