"""Starts from data: known answers."""

import pytest
import torch
from models import factored, generator, normal
from polytope_hsae.models.start import centres, principal_rows

from polytope_hsae.models.hsae import HierarchicalSAE

WIDTH = 8


def make_model(**options):
    shape = {"n_parents": 2, "topk_parent": 1, "n_children_per_parent": 3, "subspace_dim": 2, "gate": "hard"}
    return HierarchicalSAE(factored(**{**shape, **options}), WIDTH, "none").double()


def planted(n=60):
    """Rows 5 e_0 or 5 e_1 plus one of two children of each: e_2, e_3 of the first, e_4, e_5 of the second."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    parent = torch.arange(n) % 2
    child = 2 + 2 * parent + (torch.arange(n) // 2) % 2
    size = 1 + torch.rand(n, 1, generator=generator(0), dtype=torch.float64)
    return 5 * eye[parent] + size * eye[child]


@pytest.mark.parametrize("tie", [False, True, "init"])
def test_a_planted_hierarchy_is_there_from_the_start(tie):
    ties = {"use_tied_decoders_parent": tie, "use_tied_decoders_child": tie, "tie_projectors": tie}
    model = make_model(initial_children="data", use_decoder_bias=False, **ties)
    with torch.no_grad():
        model.D.zero_()[[0, 1], [0, 1]] = 1.0
        model.E.copy_(model.D)
    model.initialize_bias(planted().split(25))
    atoms = model.atoms(torch.arange(2))
    for parent, first in ((0, 2), (1, 4)):
        span = model.Up[parent].abs() > 1e-9
        assert span.any(0).nonzero().flatten().tolist() == [first, first + 1]
        near = (atoms[parent][:, first : first + 2] > 1 - 1e-6).any(0)
        assert near.all()  # each planted child is an atom
    assert torch.equal(model.Down, model.Up)
    assert torch.equal(model.F, model.G)
    assert (model.Down is model.Up) is (tie is True)
    model.eval()
    torch.testing.assert_close(model.reconstruct(planted()), planted())


def test_parents_start_at_centred_rows():
    model = make_model(initial_router="rows", n_parents=4, topk_parent=2)
    rows = normal(9, WIDTH) + 3
    before = model.G.clone()
    model.initialize_bias([rows[:5], rows[5:]])
    expected = torch.nn.functional.normalize(rows[[0, 2, 4, 6]] - model.b_dec, dim=1)
    torch.testing.assert_close(model.D.detach(), expected)
    assert torch.equal(model.E, model.D)
    torch.testing.assert_close(model.G, before, rtol=0, atol=1e-6)  # but for unit norms in float64


def test_fewer_rows_than_parents_or_children_leave_the_rest_random():
    model = make_model(initial_router="rows", initial_children="data", n_parents=6, topk_parent=6)
    random = make_model(n_parents=6, topk_parent=6)
    rows = normal(3, WIDTH)
    rows[1] = 0
    model.initialize_bias([rows])
    assert torch.allclose(model.D[3:], random.D[3:])
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    torch.testing.assert_close(model.Up @ model.Up.mT, torch.eye(2, dtype=torch.float64).expand(6, 2, 2))
    torch.testing.assert_close(model.atoms(torch.arange(6)).norm(dim=2), torch.ones(6, 3, dtype=torch.float64))


def test_principal_rows_and_centres_by_hand():
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    spare = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert torch.equal(principal_rows(rows, spare).abs(), torch.eye(4)[:2])
    assert torch.equal(principal_rows(rows[:1], spare).abs(), torch.eye(4)[[0, 2]])
    assert torch.equal(principal_rows(rows[:0], spare).abs(), torch.eye(4)[[2, 3]])
    found = centres(torch.tensor([[2.0, 0.1], [3.0, -0.1], [0.1, -1.0]]), torch.ones(2, 2))
    expected = torch.nn.functional.normalize(torch.tensor([[5.0, 0.0], [0.1, -1.0]]), dim=1)
    torch.testing.assert_close(found, expected)


def test_starts_by_default_do_not_read_the_rows():
    model = make_model(use_decoder_bias=False)
    model.initialize_bias(iter(()))
