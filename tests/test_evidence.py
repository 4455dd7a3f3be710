"""Known answers of the evidence: noise, true and oblique hierarchies, controls (docs/method.md §3)."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polytope_hsae.geometry import controls, evidence, statistics
from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.estimators import ConceptEstimator

WIDTH, VOCAB = 128, 3000
N_PARENTS, N_CHILDREN, N_WORDS = 20, 5, 8
CHILD_PARENT = [p for p in range(N_PARENTS) for _ in range(N_CHILDREN)]
CONTROLS = ("shuffled_rows", "pseudo_parents", "random_parent", "permuted_words")
NAMES: dict[str, Any] = {
    "parent_names": [f"p{p}" for p in range(N_PARENTS)],
    "child_names": [f"c{c}" for c in range(N_PARENTS * N_CHILDREN)],
}
# Word w of child c: tokens 2(c N_WORDS + w) and the next one, its two forms.
CHILD_WORDS = [
    [[2 * (c * N_WORDS + w), 2 * (c * N_WORDS + w) + 1] for w in range(N_WORDS)] for c in range(len(CHILD_PARENT))
]
POOL = [[token, token + 1] for token in range(0, VOCAB, 2)]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / math.sqrt(WIDTH)


def world(kind: str) -> Tensor:
    """Rows of U: parent + child + word + form, independent; `oblique` children also lean on their parent
    unequally."""
    n_children = len(CHILD_PARENT)
    words = torch.arange(VOCAB // 2)
    rows = randn(VOCAB // 2, WIDTH, seed=1).repeat_interleave(2, 0) + 0.3 * randn(VOCAB, WIDTH, seed=2)
    if kind == "noise":
        return rows
    parents = torch.linalg.qr(randn(WIDTH, N_PARENTS, seed=3))[0].T.repeat_interleave(N_CHILDREN, 0)
    lean = torch.linspace(-0.6, 0.6, N_CHILDREN, dtype=torch.float64).repeat(N_PARENTS).unsqueeze(1)
    children = 0.5 * randn(n_children, WIDTH, seed=4)
    own = parents * (1 + lean if kind == "oblique" else 1) + children
    child_of_word = words[: n_children * N_WORDS] // N_WORDS
    rows[: 2 * len(child_of_word)] += own[child_of_word].repeat_interleave(2, 0)
    return rows


def collected(
    kind: str, pool: list = POOL, n_children: int = len(CHILD_PARENT), device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """The evidence of a world's first children."""
    rows = world(kind).to(device)
    geometry = CausalGeometry(rows, metric="identity")
    owners = CHILD_PARENT[:n_children]
    options = {"permutations": 200, "bootstrap": 100, "halvings": 10, "controls": (), **options}
    names = {"parent_names": NAMES["parent_names"][: max(owners) + 1], "child_names": NAMES["child_names"][:n_children]}
    return evidence.collect_evidence(rows, geometry, CHILD_WORDS[:n_children], owners, pool, **names, **options)


@pytest.fixture(scope="module")
def hierarchy() -> dict:
    return collected("hierarchy", controls=CONTROLS)


def test_hierarchy_is_found(hierarchy: dict) -> None:
    main = hierarchy["main"]
    assert main["fraction_z_above_3"] == 1.0
    assert main["median_z"] > 8
    assert main["fraction_q_below_05"] == 1.0
    assert 0.95 < main["median_beta"] < 1.05
    assert main["beta_ci95"][0] < main["median_beta"] < main["beta_ci95"][1]
    assert main["beta_inside"] is True
    assert abs(main["omega"]) < 0.01
    assert "why" not in main
    assert main["parents"]["p"] == [1 / 201] * N_PARENTS
    assert main["angles"]["estimator"] == "mean"


def test_oblique_hierarchy_shows_in_omega_only() -> None:
    main = collected("oblique")["main"]
    assert main["fraction_z_above_3"] == 1.0
    # The shared component of child c is a_c = 1 + lean_c, so t_c = a_c times the mean of its siblings' a.
    a = 1 + torch.linspace(-0.6, 0.6, N_CHILDREN)
    t = a * (a.sum() - a) / (N_CHILDREN - 1)
    assert main["omega"] == pytest.approx(float(t.var() / t.mean() ** 2), rel=0.15)
    assert main["omega_ci95"][0] > 0.1
    assert 0.8 < main["median_beta"] < 1.25


def test_noise_gives_nulls_with_a_why() -> None:
    main = collected("noise")["main"]
    assert main["fraction_z_above_3"] <= 0.05
    assert abs(main["median_z"]) < 1
    assert main["median_beta"] is None
    assert main["omega"] is None
    assert main["why"] == "no parent with at least 3 children has z > 3"
    assert main["angles"]["passes_validation"]  # which is why the angle alone is no evidence


def test_controls_lose_the_hierarchy(hierarchy: dict) -> None:
    for control in ("shuffled_rows", "pseudo_parents"):
        assert hierarchy[control]["fraction_z_above_3"] <= 0.05, control
        assert hierarchy[control]["median_beta"] is None, control
    assert "name" not in hierarchy["pseudo_parents"]["children"]
    gaussian = collected("hierarchy", controls=("gaussian",))["gaussian"]
    assert gaussian["fraction_z_above_3"] <= 0.05


def test_every_kind_of_evidence_is_there_and_each_control_loses_what_it_must(hierarchy: dict) -> None:
    main = hierarchy["main"]
    assert main["signal"]["child_auroc"]["median"] > 0.9
    assert main["signal"]["parent_auroc"]["median"] > 0.9
    assert main["signal"]["parent_reliability"] > 0.9
    assert main["fraction_delta_q_below_05"] > 0.95
    assert main["median_dealt_z"] > 5
    assert main["polytopes"]["barycentric_accuracy"]["median"] > 0.5
    assert main["polytopes"]["hull_auroc"]["median"] > 0.9
    assert main["decision"]["hierarchy"] is True
    for control in CONTROLS:
        assert hierarchy[control]["decision"]["hierarchy"] is False, control
    shuffled, pseudo = hierarchy["shuffled_rows"], hierarchy["pseudo_parents"]
    assert abs(shuffled["signal"]["child_auroc"]["median"] - 0.5) < 0.05
    assert abs(shuffled["polytopes"]["barycentric_accuracy"]["median"] - 1 / N_CHILDREN) < 0.05
    assert abs(shuffled["polytopes"]["hull_auroc"]["median"] - 0.5) < 0.05
    assert shuffled["fraction_delta_q_below_05"] == 0
    # Pseudo-parents have real children: these differ from each other, but share nothing.
    assert pseudo["signal"]["child_auroc"]["median"] > 0.9
    assert pseudo["fraction_delta_q_below_05"] > 0.95
    assert pseudo["polytopes"]["gram_cv"]["median"] > 2 * main["polytopes"]["gram_cv"]["median"]
    # A random parent knows nothing of another's words, and every child differs from it.
    random_parent = hierarchy["random_parent"]
    assert abs(random_parent["signal"]["parent_auroc"]["median"] - 0.5) < 0.1
    assert random_parent["fraction_delta_q_below_05"] > 0.95
    assert random_parent["median_beta"] is None
    assert random_parent["why"].startswith("beta, omega")
    permuted = hierarchy["permuted_words"]
    assert permuted["fraction_delta_q_below_05"] == 0
    assert abs(permuted["median_dealt_z"]) < 1


def test_other_metrics_stand_beside_the_main_one() -> None:
    names = ("identity", "diagonal", "random", "residual_covariance")
    found = collected("hierarchy", controls=names, permutations=100, halvings=2)
    assert json.dumps(found["identity"]) == json.dumps(found["main"])  # the main metric of these tests
    for name in ("diagonal", "random"):
        assert found[name]["fraction_z_above_3"] == 1.0
        assert found[name]["median_z"] != found["main"]["median_z"]
    assert found["residual_covariance"]["why"] == "needs the covariance of activations of the final residual"
    rows = world("hierarchy")
    covariance = torch.diag(torch.linspace(1, 2, WIDTH, dtype=torch.float64))
    made = controls.variant(
        "residual_covariance",
        controls.Variant(ConceptEstimator(rows, CausalGeometry(rows, 0.0)), CHILD_WORDS),
        CHILD_PARENT,
        activation_covariance=covariance,
    )
    assert isinstance(made, controls.Variant)
    g = made.estimate.rows([3, 4])
    centred = rows[[3, 4]] - rows.mean(0)
    torch.testing.assert_close(g @ g.T, centred @ covariance @ centred.T)


def test_evidence_is_json_and_deterministic(hierarchy: dict) -> None:
    assert json.dumps(hierarchy["main"], allow_nan=False) == json.dumps(collected("hierarchy")["main"], allow_nan=False)
    json.dumps(hierarchy, allow_nan=False)
    assert hierarchy["null"] == "words"


def test_shared_parent_statistic_and_null_by_brute_force() -> None:
    rows = world("hierarchy")
    words = statistics.concept_words(CHILD_WORDS[:5] + CHILD_WORDS[5:6], [0] * 5 + [1], lambda ids: rows[ids])
    shared = statistics.shared_parent(
        words, *statistics.word_sums(POOL, lambda ids: rows[ids]), permutations=400, seed=0
    )
    vectors = [rows[[t for word in child for t in word]].mean(0) for child in CHILD_WORDS[:5]]
    pairs = [float(vectors[i] @ vectors[j]) for i in range(5) for j in range(5) if i != j]
    assert shared.s_p[0] == pytest.approx(np.mean(pairs))
    assert np.isnan(shared.s_p[1])  # one child has no pairs
    generator = np.random.default_rng(9)
    null = []
    for _ in range(400):
        drawn = generator.choice(len(POOL), 5 * N_WORDS, replace=False).reshape(5, N_WORDS)
        sets = [rows[[t for word in child for t in POOL[word]]].mean(0) for child in drawn]
        null.append(np.mean([float(sets[i] @ sets[j]) for i in range(5) for j in range(5) if i != j]))
    assert shared.z[0] == pytest.approx((shared.s_p[0] - np.mean(null)) / np.std(null), rel=0.15)


def test_pool_of_single_tokens_is_taken_token_by_token() -> None:
    result = collected("hierarchy", permutations=50)
    by_token = collected("hierarchy", list(range(VOCAB)), permutations=50, bootstrap=10)
    assert by_token["null"] == "tokens"
    # Both forms of a word are nearly one vector, so a null of unrelated tokens is too narrow.
    assert by_token["main"]["median_z"] > 1.3 * result["main"]["median_z"]


def test_concept_words_missing_from_the_pool_are_added() -> None:
    pool = POOL[len(CHILD_PARENT) * N_WORDS :]
    assert collected("hierarchy", pool, permutations=20, bootstrap=10)["pool_size"] == len(POOL)


def test_too_few_parents_for_the_pseudo_control() -> None:
    result = collected("hierarchy", n_children=10, permutations=20, bootstrap=10, controls=("pseudo_parents",))
    assert result["main"]["fraction_z_above_3"] == 1.0
    assert result["pseudo_parents"]["median_z"] is None
    assert result["pseudo_parents"]["why"] == "needs more parents than children of any one"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="controls: found 'sorted', allowed: shuffled_rows"):
        collected("noise", controls=("sorted",))
    with pytest.raises(ValueError, match="permutations: found 0"):
        collected("noise", controls=(), permutations=0)
    with pytest.raises(ValueError, match="1 without words"):
        statistics.concept_words([[], [[1]]], [0, 0], lambda ids: torch.zeros(len(ids), 2))
    with pytest.raises(ValueError, match="more parents than children"):
        controls.pseudo_parents(CHILD_WORDS[:5], [0, 0, 0, 1, 1])
    rows = torch.eye(4)
    with pytest.raises(ValueError, match="names: found 1 parents and 0 children, allowed: 1 and 1"):
        evidence.collect_evidence(rows, CausalGeometry(rows), [[[1]]], [0], [1], parent_names=["a"], child_names=[])


def test_benjamini_hochberg_known_answer() -> None:
    adjusted = statistics.benjamini_hochberg(np.array([0.04, 0.01, 0.03, 0.5]))
    np.testing.assert_allclose(adjusted, [0.16 / 3, 0.04, 0.16 / 3, 0.5])


def test_pseudo_parents_take_other_parents_children() -> None:
    owner = {child[0][0]: parent for child, parent in zip(CHILD_WORDS, CHILD_PARENT, strict=True)}
    pseudo = controls.pseudo_parents(CHILD_WORDS, CHILD_PARENT, seed=1)
    for parent in range(N_PARENTS):
        rows = [row for row, p in enumerate(CHILD_PARENT) if p == parent]
        owners = {owner[pseudo[row][0][0]] for row in rows}
        assert len(owners) == N_CHILDREN
        assert parent not in owners
    uneven = [[[c]] * (1 if c < 10 else 9) for c in range(20)]
    drawn = controls.pseudo_parents(uneven, list(range(20)), seed=0)
    assert [len(words) for words in drawn] == [len(words) for words in uneven]


def test_angles_by_hand() -> None:
    x, y = torch.eye(2, dtype=torch.float64)
    result = evidence.test_hierarchical_orthogonality(
        torch.stack([x, y]), torch.stack([-x + 3 * y, x, y + x]), [0, 1, 1]
    )
    expected = [math.degrees(math.acos(-1 / math.sqrt(10))), 90.0, 45.0]
    assert result["angles_deg"] == pytest.approx(expected)
    assert result["median_angle_deg"] == pytest.approx(90.0)
    assert result["fraction_above_threshold"] == pytest.approx(2 / 3)
    assert result["fraction_two_sided"] == pytest.approx(1 / 3)
    assert result["passes_validation"] is True
    wide = evidence.test_hierarchical_orthogonality(x[None], -x[None], [0])
    assert (wide["passes_validation"], wide["passes_two_sided"]) == (True, False)
    with pytest.raises(ValueError, match="child_parent: found 0 rows for 0 deltas"):
        evidence.test_hierarchical_orthogonality(x[None], torch.zeros(0, 2), [])


# Known answers under i.i.d. isotropic noise: nothing is there, and yet these angles come out.
NOISE_WIDTH, N_P, N_C, TRIALS = 400, 48, 12, 60


@pytest.fixture(scope="module")
def noise() -> ConceptEstimator:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * N_P * TRIALS, NOISE_WIDTH, generator=generator)
    return ConceptEstimator(rows, CausalGeometry(rows))


def token_sets() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Per trial: a parent's tokens, a child's (inside it), an unrelated parent's of the same size."""
    starts = [3 * N_P * trial for trial in range(TRIALS)]
    parents = [list(range(start, start + N_P)) for start in starts]
    unrelated = [list(range(start + N_P, start + 2 * N_P)) for start in starts]
    return parents, [tokens[:N_C] for tokens in parents], unrelated


def test_noise_known_answers(noise: ConceptEstimator) -> None:
    parents, children, unrelated = token_sets()
    r = N_C / N_P
    l_p, l_c, l_other = (noise.concept_vectors(sets) for sets in (parents, children, unrelated))
    l_rest = noise.concept_vectors([tokens[N_C:] for tokens in parents])
    tolerance = 4 / math.sqrt(NOISE_WIDTH * TRIALS)

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        return torch.cosine_similarity(a, b)

    inside = cosines(l_p, l_c - l_p)
    assert abs(float(inside.mean())) < tolerance
    assert float(inside.std()) == pytest.approx(1 / math.sqrt(NOISE_WIDTH), rel=0.35)
    assert float(cosines(l_p, l_c).mean()) == pytest.approx(math.sqrt(r), abs=tolerance)
    # Without its words the parent keeps n_p - n_c of them, and the answer is -sqrt(n_c/n_p) again.
    assert float(cosines(l_rest, l_c - l_rest).mean()) == pytest.approx(-math.sqrt(r), abs=tolerance)
    assert float(cosines(l_other, l_c - l_other).mean()) == pytest.approx(-math.sqrt(r / (1 + r)), abs=tolerance)


def test_noise_cross_fit_is_zero(noise: ConceptEstimator) -> None:
    parents, children, _ = token_sets()
    halves = [[tokens[half::2] for tokens in sets] for sets in (parents, children) for half in (0, 1)]
    p_a, p_b, _, c_b = (noise.concept_vectors(sets) for sets in halves)
    products = (p_a * (c_b - p_b)).sum(1)
    assert abs(float(products.mean())) < 4 * float(products.std()) / math.sqrt(TRIALS)
    assert float(products.std()) < 3 * math.sqrt(NOISE_WIDTH / (N_P / 2) / (N_C / 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_covariance_from_the_cpu_serves_an_unembedding_on_a_gpu() -> None:
    rows = world("hierarchy")
    options = {"permutations": 50, "bootstrap": 20, "halvings": 4, "controls": ("residual_covariance",)}
    options["activation_covariance"] = rows.T @ rows / len(rows)
    found = {device: collected("hierarchy", device=device, **options) for device in ("cpu", "cuda")}
    z = {device: evidence["residual_covariance"]["median_z"] for device, evidence in found.items()}
    assert z["cuda"] == pytest.approx(z["cpu"], rel=1e-3)
