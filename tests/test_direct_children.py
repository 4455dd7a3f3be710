"""Children that read and write rows of full width: gradients, constraints, files, FLOPs, teachers."""

import pytest
import torch
from models import WIDTH, factored, factored_sae, generator, normal, random_parameters, sae
from test_budgets import assert_dense
from test_models import LOSSES, Roots, child_inits

from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flops import training_flops

DIRECT = {"children": "direct", "gate": "hard"}


@pytest.mark.parametrize("tie", [False, "init", True])
@pytest.mark.parametrize("budget", ["per_parent", "shared"])
@pytest.mark.parametrize("child_input", ["residual", "input"])
def test_loss_and_all_gradients_equal_a_dense_implementation(tie, budget, child_input):
    options = {"child_budget": budget, "child_input": child_input, "use_tied_decoders_child": tie}
    model = factored_sae(**DIRECT, use_offdiag_biorth=budget == "shared", **options, **LOSSES)
    random_parameters(model)
    sigma = Roots(WIDTH).sigma
    model.set_metric(sigma)
    assert_dense(model, normal(11, WIDTH, seed=3), sigma)


def test_children_start_reading_what_they_write():
    model = sae()
    assert set(model.tensors()) == {"E", "b_E", "D", "F", "b_F", "G", "b_dec"}
    torch.testing.assert_close(model.child_readers(slice(None)), model.atoms(slice(None)))
    assert model.F.shape == (6, 4, WIDTH)


@pytest.mark.parametrize("metric", ["euclidean", "causal"])
def test_atoms_keep_their_norm(metric):
    model = sae(norm_metric=metric, project_gradient=True)
    random_parameters(model)
    sigma = Roots(WIDTH).sigma if metric == "causal" else torch.eye(WIDTH, dtype=torch.float64)
    model.set_metric(sigma)
    model.normalize_decoder_weights()
    atoms = model.atoms(slice(None))
    torch.testing.assert_close(((atoms @ sigma) * atoms).sum(2), torch.ones(6, 4, dtype=torch.float64))
    (atoms * normal(6, 4, WIDTH)).sum().backward()
    model.project_gradients()
    before = model.child.norms(model.norm_metric()).sum().item()
    with torch.no_grad():
        model.G.add_(1e-5 * model.G.grad)
    assert model.child.norms(model.norm_metric()).sum().item() == pytest.approx(before, abs=1e-8)


@pytest.mark.parametrize("tie", [False, True])
def test_saving_and_loading_is_exact(tie, tmp_path):
    model = sae(use_tied_decoders_child=tie).float()
    random_parameters(model)
    model.save_pretrained(tmp_path / "model")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert (loaded.F is loaded.G) is tie
    h = torch.randn(7, WIDTH, generator=generator(0))
    assert torch.equal(loaded.reconstruct(h), model.eval().reconstruct(h))
    torch.testing.assert_close(model.decode(model.encode(h)), model(h).x_hat)


def test_a_teacher_reads_and_writes_as_in_the_factored_form():
    names = ["a", "b"]
    vectors = {name: normal(WIDTH, seed=number) for number, name in enumerate(names)}
    model, factored = sae(use_tied_decoders_child="init"), factored_sae()
    for each in (model, factored):
        each.initialize_from_teacher(vectors, child_inits(names), Roots(WIDTH))
    first = slice(0, 2)
    torch.testing.assert_close(model.child_readers(first)[:, :3], factored.child_readers(first)[:, :3])
    torch.testing.assert_close(model.atoms(first)[:, :3], factored.atoms(first)[:, :3])


def test_flops_by_hand():
    shape = {"n_parents": 10, "topk_parent": 2, "n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"}
    parents = 2 * 10 * 5 + 2 * (10 + 10) + 2 * 3 * 10
    encode = 2 * 3 * 10 + 2 * (10 + 10)  # 2 parents' 3 rows of width 5; gradients of 2 rows and of their input
    direct = factored(**shape, children="direct")
    assert training_flops(direct, 5) == parents + encode + 3 * 2 * 10


def test_subspaces_that_are_tied_are_refused():
    with pytest.raises(
        ValueError, match="tie_projectors: found true, allowed: false or init unless children is factored"
    ):
        sae(tie_projectors=True)
