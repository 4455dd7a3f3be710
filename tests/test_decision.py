"""The parts of the decision, the four worlds, signal, differences and polytopes: known answers (docs/method.md §3)."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import WORLDS, WorldSize, draw_world, try_world

from polytope_hsae.geometry import difference, polytopes, signal, statistics
from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.decision import LARGEST_SPREAD, hierarchy_decision, partial_conjunction
from polytope_hsae.geometry.estimators import ConceptEstimator
from polytope_hsae.geometry.orthogonality import omega

SIZE = WorldSize(width=96, parents=14, children=6, words=8, background=200, permutations=200, halvings=4)


@pytest.mark.parametrize("world", WORLDS)
def test_the_decision_knows_the_worlds(world: str) -> None:
    found = [try_world(world, 0.6, SIZE, seed) for seed in range(3)]
    assert [draw["hierarchy"] for draw in found] == [world == "hierarchy"] * 3
    assert all(draw["angle_passes"] for draw in found)  # in every world, which is why it proves nothing
    refuting = {
        "noise": "shared_parent", "flat": "own_siblings", "oblique": "omega", "oblique_siblings": "kappa",
        "undivided": "difference",
    }  # fmt: skip
    if world in refuting:
        assert not any(draw["tests"][refuting[world]]["passes"] for draw in found)


def test_flat_siblings_are_only_seen_through_by_dealt_ones() -> None:
    """Against random words, sets of children with directions of their own are spread too wide; dealt ones are not."""
    z = {"words": [], "dealt": []}
    for seed in range(4):
        words, pool = draw_world("flat", 1.5, SIZE, seed)
        shared = statistics.shared_parent(words, pool, pool.new_ones(len(pool)), permutations=200)
        z["words"] += shared.z.tolist()
        z["dealt"] += statistics.dealt_siblings(words, permutations=200).z.tolist()
    assert np.std(z["words"]) > 2
    assert 0.7 < np.std(z["dealt"]) < 1.3


def test_dealt_siblings_by_brute_force() -> None:
    words, _ = draw_world("hierarchy", 0.5, replace(SIZE, parents=7, children=2), 0)
    found = statistics.dealt_siblings(words, permutations=4000)
    vectors = words.child_vectors()
    pairs = [
        float(vectors[i] @ vectors[j]) for i, j in itertools.permutations(range(2, 14), 2) if i // 2 != j // 2
    ]  # of all parents but the first
    own = float(vectors[0] @ vectors[1])
    assert found.s_p[0] == pytest.approx(own)
    assert found.z[0] == pytest.approx((own - np.mean(pairs)) / np.std(pairs), rel=0.1)
    alone = replace(words, child_parent=torch.zeros(14, dtype=torch.int64))
    assert np.isnan(statistics.dealt_siblings(alone, permutations=10).p).all()


def test_partial_conjunction_needs_half_of_the_effects() -> None:
    assert partial_conjunction(np.array([1e-6] * 4 + [0.9] * 6)) > 0.5
    assert partial_conjunction(np.array([1e-6] * 8 + [0.9] * 2)) == pytest.approx(6 * 1e-6 / 4)
    assert partial_conjunction(np.array([0.2])) == 0.2
    generator = np.random.default_rng(0)
    # At the edge of the null, one effect short of half, the level holds.
    p = [partial_conjunction(np.concatenate((np.zeros(4), generator.random(6)))) for _ in range(2000)]
    assert np.mean(np.array(p) <= 0.05) <= 0.06


def variant(**changes: list) -> dict:
    """Columns of 12 parents of 3 children that pass every test."""
    columns = {
        "p": [0.001] * 12, "dealt_p": [0.001] * 12, "omega": [0.001, -0.001] * 6, "kappa": [0.002, 0.0] * 6,
        "delta_p": [0.001] * 36, "beta": [0.95, 1.0, 1.05] * 12,
    } | changes  # fmt: skip
    parents = {key: columns[key] for key in ("p", "dealt_p", "omega", "kappa")}
    owners = [parent for parent in range(12) for _ in range(3)]
    return {
        "parents": parents,
        "children": {"parent": owners, "beta": columns["beta"], "delta_p": columns["delta_p"]},
    }


@pytest.mark.parametrize(
    ("test", "changes"),
    [
        ("shared_parent", {"p": [0.001] * 5 + [0.5] * 7}),
        ("own_siblings", {"dealt_p": [0.04] * 12}),
        ("difference", {"delta_p": [0.001] * 12 + [0.6] * 24}),
        ("beta", {"beta": [0.7] * 36}),
        ("beta", {"beta": [0.75, 1.0, 1.3] * 2 + [1.4] * 15 + [1.0] * 15}),
        ("omega", {"omega": [LARGEST_SPREAD] * 12}),
        ("kappa", {"kappa": [0.0] * 10 + [0.4] * 2}),
    ],
)
def test_every_part_can_refuse(test: str, changes: dict) -> None:
    assert hierarchy_decision(variant())["hierarchy"] is True
    found = hierarchy_decision(variant(**changes))
    assert found["hierarchy"] is False
    assert [name for name, part in found["tests"].items() if not part["passes"]] == [test]


def test_too_few_values_are_said() -> None:
    found = hierarchy_decision(variant(omega=[0.001] * 9 + [None] * 3))
    assert found["hierarchy"] is False
    assert found["why"] == "omega: found values for 9, allowed: at least 10"
    assert found["tests"]["omega"]["upper"] is None
    with pytest.raises(ValueError, match=r"alpha: found 0.7, allowed: above 0 and below 0.5"):
        hierarchy_decision(variant(), alpha=0.7)


def test_kappa_sees_groups_that_omega_cannot() -> None:
    words, _ = draw_world("oblique_siblings", 1.0, SIZE, 0)
    found = omega(words, np.full(SIZE.parents, 9.0), np.ones(SIZE.parents), halvings=4, bootstrap=10)
    # Pairs of one group, 6 of 15, share 1 + 0.81, the others 1; every child has as many of both.
    products = np.array([1.81] * 6 + [1.0] * 9)
    assert found["kappa"] == pytest.approx(products.var(ddof=1), rel=0.1)
    assert abs(found["omega"]) < 0.01


def test_difference_estimates_its_squared_length_and_its_p_is_uniform_without_one() -> None:
    words, _ = draw_world("hierarchy", 0.6, SIZE, 1)
    found = difference.nontrivial_difference(words, permutations=200)
    # l_p is the mean over 6 children, so |delta|^2 = 0.36 (1 - 1/6), with what the same words leave of the noise
    # in both halves: none.
    assert found.squared.mean() == pytest.approx(0.36 * 5 / 6, rel=0.05)
    assert (found.p <= 0.05).mean() > 0.95
    p = np.concatenate([
        difference.nontrivial_difference(draw_world("undivided", 0.6, SIZE, seed)[0], permutations=99).p
        for seed in range(3)
    ])  # fmt: skip
    assert abs((p <= 0.05).mean() - 0.05) < 3 * math.sqrt(0.05 * 0.95 / len(p))
    assert abs(p.mean() - 0.5) < 0.08


def signal_of(rows: torch.Tensor, child_words: list, child_parent: list[int]) -> signal.Signal:
    estimate = ConceptEstimator(rows, CausalGeometry(rows, metric="identity"))
    words = statistics.concept_words(child_words, child_parent, estimate.rows)
    return signal.concept_signal(estimate, words, child_words, signal.frequency_order(len(rows), None))


def test_signal_is_one_where_words_agree_and_chance_without() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 32, generator=generator, dtype=torch.float64) / math.sqrt(32)
    child_words = [[[8 * child + word] for word in range(8)] for child in range(30)]
    owners = [child // 3 for child in range(30)]
    noise = signal_of(rows, child_words, owners)
    assert abs(noise.child_auroc.mean() - 0.5) < 0.05
    assert abs(noise.parent_reliability.mean()) < 0.1
    rows[:240] += 6 * torch.eye(32, dtype=torch.float64)[torch.arange(240) // 24]
    found = signal_of(rows, child_words, owners)
    assert found.child_auroc.min() == 1.0
    assert found.parent_auroc.min() == 1.0
    assert found.parent_reliability.min() > 0.9
    single = signal_of(rows, [[[0]], *child_words[1:]], owners)
    assert np.isnan(single.child_auroc[0])
    assert np.isfinite(single.child_auroc[1:]).all()
    assert np.isfinite(single.parent_auroc).all()


def test_tokens_are_matched_in_frequency() -> None:
    counts = torch.arange(1000)
    order = signal.frequency_order(1000, counts)
    assert order[:3].tolist() == [999, 998, 997]
    tokens = [0, 500, 501, 999]
    matched = signal.matched_tokens(tokens, order, np.random.default_rng(0))
    assert matched.shape == (4, 20)
    assert not np.isin(matched, tokens).any()
    assert all(len(set(row)) == 20 for row in matched.tolist())
    assert np.abs(matched[1] - 500).max() <= 102
    assert matched[0].max() <= 201
    assert signal.frequency_order(4, None).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"counts: found shape \(3,\), allowed: \(4,\)"):
        signal.frequency_order(4, counts[:3])
    with pytest.raises(ValueError, match="vocabulary: found 1 tokens"):
        signal.matched_tokens([0, 1], np.arange(3), np.random.default_rng(0))


def brute_distance(vertices: torch.Tensor, point: torch.Tensor) -> float:
    """The least distance over all faces whose nearest point lies inside them."""
    best = math.inf
    for size in range(1, len(vertices) + 1):
        for face in itertools.combinations(range(len(vertices)), size):
            weights = (
                polytopes.barycentric(vertices[list(face)], point[None])[0] if size > 1 else torch.ones(1).double()
            )
            if (weights >= -1e-12).all():
                best = min(best, float((weights @ vertices[list(face)] - point).norm()))
    return best


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_hull_distance_equals_a_search_over_all_faces(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(5, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, spread])
    points = 0.7 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    inside = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    points = torch.cat((points, inside / inside.sum(1, keepdim=True) @ vertices, vertices))
    found = polytopes.hull_distance(vertices, points)
    expected = torch.tensor([brute_distance(vertices, point) for point in points], dtype=torch.float64)
    # 1e-9 of half a squared distance of about 20 is up to 2e-4 at distance 0, and far less away from it.
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    torch.testing.assert_close(found.square(), expected.square(), atol=1e-7, rtol=0)
    weights = polytopes.hull_weights(vertices, points)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(len(points), dtype=torch.float64))


def test_projection_to_the_simplex() -> None:
    x = np.array([[0.5, 0.5, 0.5], [2.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.9, 0.4, -5.0]])
    expected = [[1 / 3] * 3, [1, 0, 0], [0.2, 0.3, 0.5], [0.75, 0.25, 0]]
    np.testing.assert_allclose(polytopes.project_to_simplex(x), expected, atol=1e-15)


def test_a_regular_simplex_is_regular() -> None:
    gram_cv, edge_cv = polytopes.regularity(1 + torch.eye(4, 6, dtype=torch.float64))
    assert gram_cv == pytest.approx(0, abs=1e-12)
    assert edge_cv == pytest.approx(0, abs=1e-12)
    right_angle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    edges = np.array([3.0, 4.0, 5.0])
    assert polytopes.regularity(right_angle + 1)[1] == pytest.approx(edges.std() / edges.mean())


def test_barycentric_coordinates_of_known_points() -> None:
    vertices = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.4, -0.2, -0.2]], dtype=torch.float64)
    above = weights @ vertices + 0.7  # moved at right angles to the plane of the vertices
    torch.testing.assert_close(polytopes.barycentric(vertices, above), weights)
