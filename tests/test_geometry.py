"""Causal geometry, estimators and bases against known answers (docs/method.md §3, §4)."""

import math
from pathlib import Path

import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from polytope_hsae.fileio import read_tensors, sha256_file, write_tensors
from polytope_hsae.geometry.bases import orthogonal_to, subspace_bases
from polytope_hsae.geometry.causal import CausalGeometry, Space, centred_covariance, shrink
from polytope_hsae.geometry.estimators import ActivationClassStats, ConceptEstimator

WIDTH = 24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def unembedding() -> Tensor:
    """Correlated rows with a large common mean, so that forgetting to centre or to whiten shows."""
    return randn(600, WIDTH) @ randn(WIDTH, WIDTH, seed=1) + 5 * randn(WIDTH, seed=2)


@pytest.fixture(scope="module")
def geometry(unembedding: Tensor) -> CausalGeometry:
    return CausalGeometry(unembedding)


def test_sigma_is_the_shrunk_centred_covariance(unembedding: Tensor, geometry: CausalGeometry) -> None:
    cov = torch.cov(unembedding.T, correction=0)
    torch.testing.assert_close(centred_covariance(unembedding), cov)
    sigma = 0.95 * cov + 0.05 * cov.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(geometry.sigma, sigma)
    torch.testing.assert_close(geometry.sigma_sqrt @ geometry.sigma_sqrt, sigma)
    torch.testing.assert_close(geometry.sigma_sqrt @ geometry.sigma_inv_sqrt, torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(geometry.spectrum, torch.linalg.eigvalsh(sigma))
    assert geometry.condition_number == pytest.approx(float(torch.linalg.cond(sigma)))
    assert geometry.sigma.dtype == torch.float64


def test_pairing_is_preserved_and_the_literal_mode_breaks_it(unembedding: Tensor, geometry: CausalGeometry) -> None:
    covectors, vectors = randn(7, WIDTH, seed=3), randn(5, WIDTH, seed=4)
    logits = covectors @ vectors.T
    unified = geometry.whiten(covectors, Space.COVECTOR) @ geometry.whiten(vectors, Space.VECTOR).T
    torch.testing.assert_close(unified, logits)
    literal = CausalGeometry(unembedding, literal=True)
    broken = literal.whiten(covectors, Space.COVECTOR) @ literal.whiten(vectors, Space.VECTOR).T
    assert (broken - logits).abs().max() > 0.5 * logits.abs().max()


@pytest.mark.parametrize("space", list(Space))
def test_metric_of_each_space(geometry: CausalGeometry, space: Space) -> None:
    x, y = randn(WIDTH, seed=7), randn(WIDTH, seed=8)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    matrix = {
        Space.COVECTOR: torch.linalg.inv(geometry.sigma),
        Space.VECTOR: geometry.sigma,
        Space.UNIFIED: eye,
    }[space]
    expected = x @ matrix @ y
    torch.testing.assert_close(geometry.causal_inner_product(x, y, space), expected)
    norms = (x @ matrix @ x).sqrt() * (y @ matrix @ y).sqrt()
    angle = math.degrees(math.acos(float(expected / norms)))
    assert float(geometry.causal_angle(x, y, space)) == pytest.approx(angle)
    assert float(geometry.causal_norm(geometry.normalize_causal(x, space), space)) == pytest.approx(1.0)
    torch.testing.assert_close(geometry.unwhiten(geometry.whiten(x, space), space), x)


def test_mixing_spaces_and_other_bad_inputs_are_refused(unembedding: Tensor, geometry: CausalGeometry) -> None:
    x = randn(WIDTH)
    with pytest.raises(ValueError, match="found covector and vector, allowed: one space"):
        geometry.causal_inner_product(x, x, Space.COVECTOR, Space.VECTOR)
    with pytest.raises(ValueError, match="space: found 'row', allowed: covector, vector, unified"):
        geometry.whiten(x, "row")
    with pytest.raises(ValueError, match=r"allowed: \[..., 24\]"):
        geometry.whiten(x[:5], Space.VECTOR)
    with pytest.raises(ValueError, match=r"shrinkage: found 1\.5, allowed: 0 to 1"):
        CausalGeometry(unembedding, shrinkage=1.5)
    with pytest.raises(ValueError, match="from_activation_covariance makes that one"):
        CausalGeometry(unembedding, metric="residual_covariance")
    with pytest.raises(ValueError, match="covariance is singular"):
        CausalGeometry(unembedding[:10], shrinkage=0.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        CausalGeometry(unembedding / 0)
    with pytest.raises(ValueError, match="length 0"):
        geometry.causal_angle(x, 0 * x, Space.VECTOR)


def test_comparison_metrics(unembedding: Tensor, geometry: CausalGeometry) -> None:
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(CausalGeometry(unembedding, metric="identity").sigma, eye)
    diagonal = CausalGeometry(unembedding, metric="diagonal")
    torch.testing.assert_close(diagonal.sigma, torch.diag(geometry.sigma.diagonal()))
    random = CausalGeometry(unembedding, metric="random", seed=3)
    torch.testing.assert_close(torch.linalg.eigvalsh(random.sigma), geometry.spectrum)
    assert torch.equal(random.sigma, CausalGeometry(unembedding, metric="random", seed=3).sigma)
    assert not torch.allclose(random.sigma, CausalGeometry(unembedding, metric="random", seed=4).sigma)
    assert not torch.allclose(random.sigma, geometry.sigma)
    torch.testing.assert_close(CausalGeometry.from_covariance(centred_covariance(unembedding)).sigma, geometry.sigma)


def test_residual_covariance_measures_vectors_by_the_inverse(unembedding: Tensor) -> None:
    covariance = torch.cov(unembedding.T)
    geometry = CausalGeometry.from_activation_covariance(covariance, shrinkage=0.1)
    h, inverse = randn(WIDTH, seed=9), torch.linalg.inv(shrink(covariance, 0.1))
    torch.testing.assert_close(geometry.causal_norm(h, Space.VECTOR) ** 2, h @ inverse @ h)
    assert geometry.spectrum.diff().min() >= 0
    assert (geometry.metric, geometry.shrinkage) == ("residual_covariance", 0.1)


def test_geometry_file(tmp_path: Path, geometry: CausalGeometry) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    geometry.save(paths[0])
    loaded = CausalGeometry.load(paths[0])
    loaded.to("cpu").save(paths[1])
    assert sha256_file(paths[0]) == sha256_file(paths[1])
    for name in ("sigma", "sigma_sqrt", "sigma_inv_sqrt", "spectrum"):
        assert torch.equal(getattr(loaded, name), getattr(geometry, name))
    assert (loaded.metric, loaded.shrinkage, loaded.literal) == ("causal", 0.05, False)
    tensors, metadata = read_tensors(paths[0])
    write_tensors(paths[1], {"sigma": tensors["sigma"]}, metadata)
    with pytest.raises(ValueError, match="missing sigma_inv_sqrt, sigma_sqrt, spectrum"):
        CausalGeometry.load(paths[1])
    for spectrum in (tensors["spectrum"].flip(0), -tensors["spectrum"]):
        write_tensors(paths[1], {**tensors, "spectrum": spectrum}, metadata)
        with pytest.raises(ValueError, match=r"b\.safetensors: spectrum: found \[.*, allowed: rising numbers above 0"):
            CausalGeometry.load(paths[1])


def test_mean_vectors(unembedding: Tensor, geometry: CausalGeometry) -> None:
    sets = [[3, 5], [7], [1, 2, 3]]
    whitened = (unembedding - unembedding.mean(0)) @ geometry.sigma_inv_sqrt
    expected = torch.stack([whitened[tokens].mean(0) for tokens in sets])
    estimator = ConceptEstimator(unembedding, geometry)
    torch.testing.assert_close(estimator.concept_vectors(sets), expected)
    single = ConceptEstimator(unembedding.float(), geometry).concept_vectors(sets)
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)
    assert estimator.concept_vectors([]).shape == (0, WIDTH)


@pytest.mark.parametrize("n", [2, 9, 400])
def test_lda_equals_the_pseudo_inverse_of_ledoit_wolf(unembedding: Tensor, geometry: CausalGeometry, n: int) -> None:
    rows = (unembedding - unembedding.mean(0)) @ geometry.sigma_inv_sqrt
    mean = rows[:n].mean(0)
    covariance = torch.from_numpy(LedoitWolf().fit(rows[:n].numpy()).covariance_)
    direction = torch.linalg.pinv(covariance) @ mean
    direction = direction / direction.norm()
    vector = ConceptEstimator(unembedding, geometry, "lda").concept_vectors([list(range(n))])[0]
    torch.testing.assert_close(vector, (direction @ mean) * direction)


def test_lda_in_one_dimension_is_the_mean() -> None:
    rows = torch.tensor([[1.0], [3.0], [-4.0]], dtype=torch.float64)
    estimator = ConceptEstimator(rows, CausalGeometry(rows, metric="identity"), "lda")
    torch.testing.assert_close(estimator.concept_vectors([[0, 1]]), torch.tensor([[2.0]], dtype=torch.float64))


def test_estimator_refuses_bad_sets(unembedding: Tensor, geometry: CausalGeometry) -> None:
    with pytest.raises(ValueError, match="set 1: found 0, allowed: at least 1"):
        ConceptEstimator(unembedding, geometry).concept_vectors([[1], []])
    with pytest.raises(ValueError, match="set 0: found 1, allowed: at least 2"):
        ConceptEstimator(unembedding, geometry, "lda").concept_vectors([[1]])
    with pytest.raises(ValueError, match="without spread"):
        ConceptEstimator(unembedding, geometry, "lda").concept_vectors([[1, 1]])
    with pytest.raises(ValueError, match="found ids 3 to 600, allowed: 0 to 599"):
        ConceptEstimator(unembedding, geometry).concept_vectors([[3, 600]])
    with pytest.raises(ValueError, match="estimator: found 'median', allowed: mean, lda"):
        ConceptEstimator(unembedding, geometry, "median")


def test_bases_keep_the_energy_and_complete_orthogonally_to_the_parent() -> None:
    parents = randn(2, WIDTH, seed=10)
    directions = torch.linalg.qr(randn(WIDTH, 3, seed=11))[0].T
    # Squared singular values 9, 4 and 1: 0.85 of 14 needs the first two.
    deltas = torch.cat([torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64) * directions, randn(1, WIDTH)])
    bases = subspace_bases(parents, deltas, [0, 0, 0, 1], 6, 0.85, seed=0)
    torch.testing.assert_close(bases @ bases.transpose(1, 2), torch.eye(6, dtype=torch.float64).expand(2, 6, 6))
    kept = directions[:2] @ bases[0].T @ bases[0]
    torch.testing.assert_close(kept, directions[:2])
    assert (directions[2] @ bases[0].T).norm() < 0.9
    for parent, rank in ((0, 2), (1, 1)):
        torch.testing.assert_close(bases[parent, rank:] @ parents[parent], torch.zeros(6 - rank, dtype=torch.float64))
    assert torch.equal(bases, subspace_bases(parents, deltas, [0, 0, 0, 1], 6, 0.85, seed=0))
    assert not torch.allclose(bases, subspace_bases(parents, deltas, [0, 0, 0, 1], 6, 0.85, seed=1))
    with pytest.raises(ValueError, match="subspace_dim: found 24, allowed: 1 to 23"):
        subspace_bases(parents, deltas, [0, 0, 0, 1], WIDTH, 0.85, seed=0)
    with pytest.raises(ValueError, match=r"energy: found 0\.0"):
        subspace_bases(parents, deltas, [0, 0, 0, 1], 4, 0.0, seed=0)


def test_orthogonal_to_a_dependent_set() -> None:
    taken = randn(2, WIDTH)
    taken = torch.cat([taken, taken[:1] * 2])
    fresh = orthogonal_to(randn(WIDTH - 2, WIDTH, seed=12), taken)
    torch.testing.assert_close(fresh @ fresh.T, torch.eye(WIDTH - 2, dtype=torch.float64))
    torch.testing.assert_close(fresh @ taken.T, torch.zeros(WIDTH - 2, 3, dtype=torch.float64))


def test_activation_statistics_equal_the_direct_ones() -> None:
    acts, labels = randn(300, WIDTH) + 1000, torch.arange(300) % 5 - 1
    acts = acts + labels.unsqueeze(1)
    stats = ActivationClassStats(5, WIDTH)  # class 4 never occurs
    for start in range(0, 300, 70):
        stats.update(acts[start : start + 70], labels[start : start + 70])
    stats.update(acts[:0], labels[:0])
    mean = acts.mean(0)
    torch.testing.assert_close(stats.mean(), mean)
    assert stats.counts.tolist() == [60, 60, 60, 60, 0]
    assert stats.total == 300
    expected = torch.stack([acts[labels == c].mean(0) - mean for c in range(4)] + [torch.zeros_like(mean)])
    torch.testing.assert_close(stats.class_differences(), expected)
    both = acts[(labels == 0) | (labels == 2)].mean(0) - mean
    torch.testing.assert_close(stats.parent_differences([0, 1, 0, 1, 1], 2)[0], both)
    residual = torch.cat([acts[labels == c] - acts[labels == c].mean(0) for c in range(-1, 4)])
    torch.testing.assert_close(stats.within_covariance(), residual.T @ residual / 300)


def test_merged_and_balanced_activation_statistics_equal_the_direct_ones() -> None:
    acts, labels = randn(300, WIDTH) + 1000, torch.arange(300) % 7 % 5 - 1  # classes -1, 0: twice the rows
    owner = [0, 1, 0, 1, 1]  # class 4 never occurs
    classes, owners = ActivationClassStats(5, WIDTH), ActivationClassStats(2, WIDTH)
    classes.update(acts, labels)
    owners.update(acts, torch.where(labels < 0, -1, torch.tensor(owner)[labels]))
    merged = classes.merged(owner, 2)
    assert merged.counts.tolist() == owners.counts.tolist()
    torch.testing.assert_close(merged.class_differences(), owners.class_differences())
    torch.testing.assert_close(merged.within_covariance(), owners.within_covariance())
    means = torch.stack([acts[labels == c].mean(0) for c in range(4)]) - acts.mean(0)
    expected = torch.stack([(means[0] + means[2]) / 2, (means[1] + means[3]) / 2])  # not the mean over rows
    torch.testing.assert_close(classes.balanced_differences(owner, 2), expected)
    assert not classes.balanced_differences([0, 0, 0, 0, 1], 2)[1].any()


def test_activation_statistics_refuse_bad_batches() -> None:
    stats = ActivationClassStats(2, 3)
    with pytest.raises(ValueError, match="found no rows"):
        stats.mean()
    with pytest.raises(ValueError, match="labels: found -1 to 2, allowed: -1 to 1"):
        stats.update(torch.zeros(2, 3), torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"allowed: \[N, 3\] and \[N\]"):
        stats.update(torch.zeros(2, 4), torch.tensor([-1, 1]))


def test_published_names_match_by_name(unembedding: Tensor, geometry: CausalGeometry) -> None:
    estimator = ConceptEstimator(unembedding, geometry)
    tokens = {"animal": {"dog": [1, 2], "cat": [3]}, "plant": {"tree": [4, 5], "herb": [6]}}
    union = {p: [t for ids in c.values() for t in ids] for p, c in tokens.items()}
    parents = estimator.estimate_parent_vectors(union)
    reordered = {p: dict(reversed(c.items())) for p, c in reversed(tokens.items())}
    deltas = estimator.estimate_child_deltas(parents, reordered)
    expected = estimator.concept_vectors([[3]])[0] - estimator.concept_vectors([[1, 2, 3]])[0]
    torch.testing.assert_close(deltas["animal"]["cat"], expected)
    bases = estimator.estimate_child_subspace_projectors(parents, deltas, 4, energy=1.0)
    assert list(bases) == ["animal", "plant"]
    for parent, basis in bases.items():
        for delta in deltas[parent].values():
            torch.testing.assert_close(delta @ basis.T @ basis, delta)
    with pytest.raises(ValueError, match="found parent 'stone'"):
        estimator.estimate_child_deltas(parents, {"stone": {"gem": [7]}})
