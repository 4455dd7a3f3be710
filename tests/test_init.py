"""Where parameters start: at random, at the rows' median, or at a teacher."""

import pytest
import torch
from models import WIDTH, Roots, child_inits, factored_sae, normal, sae

from polytope_hsae.models.init import unit_he_uniform_rows, unit_rows

# -- random


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
    assert len(list(model.parameters())) == len(model.tensors()) - (len(pairs) if tie is True else 0)


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
    Up = factored_sae().Up
    torch.testing.assert_close(Up @ Up.mT, torch.eye(2, dtype=torch.float64).expand(6, 2, 2), atol=1e-6, rtol=0)
    model = factored_sae(50, initial="he_uniform", n_parents=200)
    assert model.D.abs().max() <= (6 / 50) ** 0.5 < 1.01 * model.D.abs().max()
    torch.testing.assert_close(model.Up.norm(dim=-1), torch.ones(200, 2).double(), rtol=0, atol=1e-6)
    for rows in (unit_rows, unit_he_uniform_rows):
        found = rows((7, 3), torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(7))


def test_the_bias_starts_at_the_median_in_normalised_coordinates():
    h = torch.tensor([[1.0, 1, 0, 0, 0], [3.0, 1, 0, 0, 0], [1.0, 3, 0, 0, 0], [3.0, 3, 0, 0, 0]]).double()
    model = sae(normalize="rms").eval()
    model.set_normalization(torch.ones(WIDTH, dtype=torch.float64), 2.0)
    model.initialize_bias([h])
    torch.testing.assert_close(model.b_dec.detach(), torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5]).double())
    sae(use_decoder_bias=False).initialize_bias(iter(()))  # reads nothing


# -- a teacher


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


def test_direct_children_of_a_teacher_read_and_writes_as_in_the_factored_form():
    names = ["a", "b"]
    vectors = {name: normal(WIDTH, seed=number) for number, name in enumerate(names)}
    model, factored = sae(use_tied_decoders_child="init"), factored_sae()
    for each in (model, factored):
        each.initialize_from_teacher(vectors, child_inits(names), Roots(WIDTH))
    first = slice(0, 2)
    torch.testing.assert_close(model.child_readers(first)[:, :3], factored.child_readers(first)[:, :3])
    torch.testing.assert_close(model.atoms(first)[:, :3], factored.atoms(first)[:, :3])


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
