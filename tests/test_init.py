"""Where parameters start: at random."""

import pytest
import torch
from models import factored_sae, sae

from polytope_hsae.models.init import unit_he_uniform_rows, unit_rows


@pytest.mark.parametrize("make", [sae, factored_sae])
@pytest.mark.parametrize("tie", [False, True, "init"])
def test_encoders_start_at_their_decoders_unless_they_are_apart(make, tie):
    ties = {"use_tied_decoders_parent": tie, "use_tied_decoders_child": tie}
    model = make(**ties, **({"tie_projectors": tie} if make is factored_sae else {}))
    pairs = [(model.E, model.D), (model.F, model.G)]
    pairs += [(model.Down, model.Up)] if make is factored_sae else []
    for encoder, decoder in pairs:
        assert (encoder is decoder) == (tie is True)
        assert torch.equal(encoder, decoder) == (tie is not False)


@pytest.mark.parametrize("make", [sae, factored_sae])
def test_the_seed_decides_all_weights(make):
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(torch.equal(same.tensors()[name], tensor) for name, tensor in one.tensors().items())
    assert all(not torch.equal(getattr(one, name), getattr(other, name)) for name in ("E", "D", "F", "G"))


def test_unit_rows_or_he_uniform_ones():
    for make in (sae, factored_sae):
        model = make(initial="unit")
        torch.testing.assert_close(model.D.norm(dim=-1), torch.ones(6).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(model.G.norm(dim=-1), torch.ones(6, 4).double(), rtol=0, atol=1e-6)
    model = factored_sae(50, initial="he_uniform", n_parents=200)
    assert model.D.abs().max() <= (6 / 50) ** 0.5 < 1.01 * model.D.abs().max()
    torch.testing.assert_close(model.Up.norm(dim=-1), torch.ones(200, 2).double(), rtol=0, atol=1e-6)
    for rows in (unit_rows, unit_he_uniform_rows):
        found = rows((7, 3), torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(7))


def test_a_random_start_does_not_read_the_rows():
    sae(use_decoder_bias=False).initialize_bias(iter(()))
