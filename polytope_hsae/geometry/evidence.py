"""Is the hierarchy in the unembedding? The published angle, the statistics beside it, and their controls.

In d dimensions random vectors are nearly orthogonal, and a child's set inside its parent's gives exactly 90
degrees, so an angle proves nothing by itself (docs/method.md §3). Every control computes everything anew.

Shape suffixes: V vocabulary, d residual width, R children, Q parents. Vectors are in the unified coordinate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.estimators import ConceptEstimator
from polytope_hsae.geometry.statistics import (
    Z_THRESHOLD,
    ChildWords,
    Floats,
    Word,
    bootstrap_median,
    concept_words,
    omega,
    orthogonality_ratio,
    shared_parent,
    word_sums,
)

_SUMMARY = ("fraction_z_above_3", "median_z", "fraction_q_below_05", "median_beta", "omega")
CONTROLS = ("shuffled_rows", "pseudo_parents", "gaussian")


def hierarchical_orthogonality(
    parent_vectors: Mapping[str, Tensor] | Tensor,
    child_deltas: Mapping[str, Mapping[str, Tensor]] | Tensor,
    threshold_degrees: float = 80.0,
    *,
    child_parent: Sequence[int] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The published criterion: angles between l_p and delta_{c|p} in the unified coordinate, one- and
    two-sided.

    Args: dicts by parent name and child name, or tensors [Q, d] and [R, d] with `child_parent` [R].
    Returns `angles_deg` [R], `median_angle_deg` with `median_ci95` (bootstrap over parents),
    `fraction_above_threshold`, `fraction_two_sided` (threshold to 180 - threshold), `passes_validation`
    (median at or above the threshold, as published) and `passes_two_sided`. It passes for random vectors too:
    read it beside the other evidence.
    """
    if isinstance(parent_vectors, Mapping):
        assert isinstance(child_deltas, Mapping)
        names = [name for name in parent_vectors if child_deltas.get(name)]
        child_parent = [row for row, name in enumerate(names) for _ in child_deltas[name]]
        deltas = [delta for name in names for delta in child_deltas[name].values()]
        parents_Qd = torch.stack([parent_vectors[name] for name in names]) if names else torch.zeros(0, 1)
        deltas_Rd = torch.stack(deltas) if deltas else torch.zeros(0, 1)
    else:
        assert isinstance(child_deltas, Tensor)
        parents_Qd, deltas_Rd = parent_vectors, child_deltas
    if child_parent is None or len(child_parent) != len(deltas_Rd) or not len(deltas_Rd):
        found = None if child_parent is None else len(child_parent)
        raise ValueError(f"child_parent: found {found} rows for {len(deltas_Rd)} deltas, allowed: equal, at least one")
    owner_R = torch.tensor(list(child_parent), dtype=torch.int64)
    matched_Rd = parents_Qd.double()[owner_R.to(parents_Qd.device)]
    cosine_R = torch.cosine_similarity(matched_Rd, deltas_Rd.double(), dim=-1).clamp(-1, 1)
    angles = np.asarray(torch.rad2deg(torch.arccos(cosine_R)).cpu().numpy(), np.float64)
    owners = owner_R.numpy()
    median = float(np.median(angles))
    return {
        "angles_deg": angles.tolist(),
        "median_angle_deg": median,
        "median_ci95": bootstrap_median([angles[owners == p] for p in np.unique(owners)], bootstrap, seed),
        "fraction_above_threshold": float((angles >= threshold_degrees).mean()),
        "fraction_two_sided": float(((angles >= threshold_degrees) & (angles <= 180 - threshold_degrees)).mean()),
        "passes_validation": median >= threshold_degrees,
        "passes_two_sided": threshold_degrees <= median <= 180 - threshold_degrees,
    }


# The published name; it is not a test for pytest to collect.
test_hierarchical_orthogonality = hierarchical_orthogonality
test_hierarchical_orthogonality.__test__ = False  # type: ignore[attr-defined]


def pseudo_parents(child_words: ChildWords, child_parent: Sequence[int], seed: int = 0) -> list[list[Word]]:
    """Children for every row, taken from real children of other parents: the sharpest control.

    A pseudo-parent's children come from as many different parents, none of them the one it stands for, each
    chosen at random among the five whose number of tokens is closest. Raises ValueError when there are too
    few parents.
    """
    generator = np.random.default_rng(seed)
    owners = np.asarray(child_parent)
    tokens = np.array([sum(len(word) for word in words) for words in child_words])
    result: list[list[Word]] = []
    used: set[int] = set()
    for row, parent in enumerate(child_parent):
        if row == 0 or child_parent[row - 1] != parent:
            used = {int(parent)}
        open_rows = np.flatnonzero(~np.isin(owners, sorted(used)))
        if not len(open_rows):
            raise ValueError(
                f"pseudo_parents: found {len(used)} parents, allowed: more parents than children of any one"
            )
        near = open_rows[np.argsort(np.abs(tokens[open_rows] - tokens[row]), kind="stable")][:5]
        chosen = int(generator.choice(near))
        used.add(int(owners[chosen]))
        result.append([list(word) for word in child_words[chosen]])
    return result


def collect_evidence(
    unembedding: Tensor,
    geometry: CausalGeometry,
    child_words: ChildWords,
    child_parent: Sequence[int],
    pool: Sequence[Word] | Sequence[int],
    *,
    parent_names: Sequence[str],
    child_names: Sequence[str],
    estimator: str = "mean",
    permutations: int = 1000,
    halvings: int = 20,
    bootstrap: int = 1000,
    seed: int = 0,
    controls: Sequence[str] = ("shuffled_rows", "pseudo_parents"),
) -> dict[str, Any]:
    """All statistics for the real concepts (`main`) and for every control, everything estimated anew; ready
    for JSON.

    Args:
        unembedding: [V, d]; geometry: its metric.
        child_words: per child row its words, each a list of token ids; child_parent: parent row of each
        child.
        pool: first-sense nouns, each a list of token ids, or single tokens (then children are taken token by
            token too). Words of the concepts that a pool of words lacks are added to it.
        estimator: of the angles. s_p, beta and omega always use the mean: their null needs it so often.
    """
    for control in controls:
        if control not in CONTROLS:
            raise ValueError(f"controls: found {control!r}, allowed: {', '.join(CONTROLS)}")
    if len(parent_names) != len(set(child_parent)) or len(child_names) != len(child_parent):
        raise ValueError(
            f"names: found {len(parent_names)} parents and {len(child_names)} children, "
            f"allowed: {len(set(child_parent))} and {len(child_parent)}"
        )
    nouns = [[word] if isinstance(word, int) else list(word) for word in pool]
    if any(len(word) > 1 for word in nouns):
        known = {token for word in nouns for token in word}
        nouns += [list(word) for words in child_words for word in words if known.isdisjoint(word)]
    options = {"permutations": permutations, "halvings": halvings, "bootstrap": bootstrap, "seed": seed}
    out: dict[str, Any] = {
        "statistics_estimator": "mean",
        "null": "tokens" if all(len(word) == 1 for word in nouns) else "words",
        "pool_size": len(nouns),
        **options,
        "geometry": {
            "metric": geometry.metric,
            "shrinkage": geometry.shrinkage,
            "condition_number": geometry.condition_number,
            "spectrum": geometry.spectrum.tolist(),
        },
    }
    for variant in ("main", *controls):
        pseudo = variant == "pseudo_parents"
        if pseudo and len(parent_names) <= max(np.bincount(child_parent)):
            # Artifacts of small ontologies keep the control's place, without numbers.
            out[variant] = {**dict.fromkeys(_SUMMARY), "why": "needs more parents than children of any one"}
            continue
        children = pseudo_parents(child_words, child_parent, seed) if pseudo else child_words
        names = None if pseudo else child_names
        estimate = _estimator(variant, unembedding, geometry, estimator, seed)
        out[variant] = _measure(estimate, children, child_parent, nouns, names, parent_names, **options)
    return out


def _estimator(variant: str, unembedding: Tensor, geometry: CausalGeometry, method: str, seed: int) -> ConceptEstimator:
    """The estimator of a control: rows of U permuted, Gaussian rows of U's shape, or U itself."""
    generator = torch.Generator().manual_seed(seed)
    if variant == "shuffled_rows":
        # A permutation of the rows leaves their covariance, hence the geometry, as it is.
        order_V = torch.randperm(len(unembedding), generator=generator).to(unembedding.device)
        return ConceptEstimator(unembedding[order_V], geometry, method)
    if variant == "gaussian":
        noise_Vd = torch.randn(unembedding.shape, generator=generator).to(unembedding.device)
        return ConceptEstimator(noise_Vd, CausalGeometry(noise_Vd, geometry.shrinkage), method)
    return ConceptEstimator(unembedding, geometry, method)


def _measure(
    estimate: ConceptEstimator,
    child_words: ChildWords,
    child_parent: Sequence[int],
    nouns: Sequence[Word],
    child_names: Sequence[str] | None,
    parent_names: Sequence[str],
    *,
    permutations: int,
    halvings: int,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    words = concept_words(child_words, child_parent, estimate.rows)
    shared = shared_parent(words, *word_sums(nouns, estimate.rows), permutations=permutations, seed=seed)
    ratio = orthogonality_ratio(words, shared.z, bootstrap=bootstrap, seed=seed)
    spread = omega(words, shared.z, shared.s_p, halvings=halvings, bootstrap=bootstrap, seed=seed)
    child_tokens = [sorted(token for word in words for token in word) for words in child_words]
    parent_tokens: list[list[int]] = [[] for _ in parent_names]
    for tokens, parent in zip(child_tokens, child_parent, strict=True):
        parent_tokens[parent] += tokens
    parents_Qd = estimate.concept_vectors(parent_tokens)
    deltas_Rd = estimate.concept_vectors(child_tokens) - parents_Qd[list(child_parent)]
    angles = hierarchical_orthogonality(
        parents_Qd, deltas_Rd, child_parent=child_parent, bootstrap=bootstrap, seed=seed
    )
    known_z = shared.z[np.isfinite(shared.z)]
    result: dict[str, Any] = {
        "parents": {
            "name": list(parent_names),
            "n_children": torch.bincount(words.child_parent, minlength=len(parent_names)).tolist(),
            **{key: _nullable(getattr(shared, key)) for key in ("s_p", "z", "p", "q")},
            "omega": _nullable(spread.pop("omega_p")),
        },
        "children": {
            "parent": list(child_parent),
            "beta": _nullable(ratio.pop("beta")),
            "angle_deg": angles.pop("angles_deg"),
        },
        "fraction_z_above_3": float((known_z > Z_THRESHOLD).mean()) if len(known_z) else None,
        "median_z": float(np.median(known_z)) if len(known_z) else None,
        "fraction_q_below_05": float((shared.q[np.isfinite(shared.q)] < 0.05).mean()) if len(known_z) else None,
        **ratio,
        **spread,
        "angles": {"estimator": estimate.method, **angles},
    }
    if child_names is not None:
        result["children"] = {"name": list(child_names), **result["children"]}
    return result


def _nullable(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
