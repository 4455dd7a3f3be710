"""Is the hierarchy in the unembedding? The published angle, the statistics beside it, and their controls.

In d dimensions random vectors are nearly orthogonal, and a child's set inside its parent's gives exactly 90
degrees, so an angle proves nothing by itself (docs/method.md §3). Every control computes everything anew.

Shape suffixes: V vocabulary, N tokens, d residual width, R children, Q parents. Vectors are in the unified coordinate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.controls import CONTROLS, METRICS, Variant, variant
from polytope_hsae.geometry.decision import hierarchy_decision
from polytope_hsae.geometry.difference import nontrivial_difference
from polytope_hsae.geometry.estimators import ALL, ConceptEstimator
from polytope_hsae.geometry.orthogonality import omega, orthogonality_ratio
from polytope_hsae.geometry.polytopes import MEASURES, polytopes
from polytope_hsae.geometry.signal import concept_signal, frequency_order
from polytope_hsae.geometry.statistics import (
    Z_THRESHOLD,
    ChildWords,
    ConceptWords,
    Floats,
    Word,
    bootstrap_median,
    concept_words,
    dealt_siblings,
    shared_parent,
    word_sums,
)

_SUMMARY = ("fraction_z_above_3", "median_z", "fraction_q_below_05", "median_beta", "omega")
ANGLE_DEG = 80.0  # the published threshold
_OWN_ONLY = "beta, omega, kappa and polytopes are about a parent and its own children"


def hierarchical_orthogonality(
    parents_Qd: Tensor, deltas_Rd: Tensor, child_parent: Sequence[int], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The published criterion: angles between l_p and delta_{c|p} in the unified coordinate, one- and two-sided.

    Takes l_p [Q, d], delta [R, d] and the parent row of every delta [R].
    Returns `angles_deg` [R], `median_angle_deg` with `median_ci95` (bootstrap over parents),
    `fraction_above_threshold` (80 degrees), `fraction_two_sided` (80 to 100), `passes_validation` (median at or above
    80, as published) and `passes_two_sided`. It passes for random vectors too: read it beside the other evidence.
    """
    if len(child_parent) != len(deltas_Rd) or not len(deltas_Rd):
        found = f"{len(child_parent)} rows for {len(deltas_Rd)} deltas"
        raise ValueError(f"child_parent: found {found}, allowed: equal, at least one")
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
        "fraction_above_threshold": float((angles >= ANGLE_DEG).mean()),
        "fraction_two_sided": float(((angles >= ANGLE_DEG) & (angles <= 180 - ANGLE_DEG)).mean()),
        "passes_validation": median >= ANGLE_DEG,
        "passes_two_sided": ANGLE_DEG <= median <= 180 - ANGLE_DEG,
    }


# The published name; it is not a test for pytest to collect.
test_hierarchical_orthogonality = hierarchical_orthogonality
test_hierarchical_orthogonality.__test__ = False  # type: ignore[attr-defined]


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
    controls: Sequence[str] = (*CONTROLS, *METRICS),
    counts: Tensor | None = None,
    activation_covariance: Tensor | None = None,
    named: slice | Tensor = ALL,
) -> dict[str, Any]:
    """All statistics for the real concepts (`main`) and for every control and metric, everything estimated anew;
    ready for JSON.

    Args:
        unembedding: [V, d].
        geometry: its metric.
        child_words: the words of each child row, each word a list of token ids.
        child_parent: the parent row of each child.
        pool: first-sense nouns, each a list of token ids, or single tokens (then children are taken token by
            token too). Words of the concepts that a pool of words lacks are added to it.
        estimator: of the angles. All else uses the mean: the nulls need it so often.
        controls: which of `controls.CONTROLS` and `controls.METRICS`.
        counts: of every token in a corpus [V], to match tokens by frequency; None: by vocabulary rank.
        activation_covariance: [d, d], of the residual that U reads; for the metric residual_covariance.
        named: index of the rows that stand for a token, of which `geometry` is; no others are drawn or compared with.
    """
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
    main = Variant(ConceptEstimator(unembedding, geometry, estimator, named), child_words)
    made = {
        name: variant(name, main, child_parent, seed=seed, activation_covariance=activation_covariance)
        for name in controls
    }
    out: dict[str, Any] = {
        "statistics_estimator": "mean",
        "null": "tokens" if all(len(word) == 1 for word in nouns) else "words",
        "matched_by": "vocabulary rank" if counts is None else "corpus counts",
        "pool_size": len(nouns),
        **options,
        "geometry": {
            "metric": geometry.metric,
            "shrinkage": geometry.shrinkage,
            "condition_number": geometry.condition_number,
            "spectrum": geometry.spectrum.tolist(),
        },
    }
    order_V = frequency_order(len(unembedding), counts)
    order_N = order_V[np.isin(order_V, main.estimate.ids.numpy())]
    for name, found in {"main": main, **made}.items():
        if isinstance(found, str):
            # What cannot be had keeps its place, without numbers.
            out[name] = {**dict.fromkeys(_SUMMARY), "why": found}
            continue
        out[name] = _measure(found, child_parent, nouns, order_N, child_names, parent_names, **options)
    return out


def hierarchy_statistics(
    words: ConceptWords,
    pool: tuple[Tensor, Tensor],
    *,
    permutations: int,
    halvings: int,
    bootstrap: int,
    seed: int,
    reference: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Evidence of the kinds 2, 3 and 4, all that `hierarchy_decision` reads. `pool`: (sums of g [M, d], tokens [M])
    of the nouns; `reference`: see `shared_parent`."""
    chance: dict[str, Any] = {"permutations": permutations, "seed": seed}
    shared = shared_parent(words, *pool, **chance, reference=reference)
    delta = nontrivial_difference(words, **chance, reference=reference)
    # Beta and the rest compare a parent's own children: with other parents, no parent qualifies.
    z = shared.z if reference is None else np.full_like(shared.z, np.nan)
    ratio = orthogonality_ratio(words, z, bootstrap=bootstrap, seed=seed)
    spread = omega(words, z, shared.s_p, halvings=halvings, bootstrap=bootstrap, seed=seed)
    if reference is None:
        dealt = dealt_siblings(words, **chance)
        siblings = {"dealt_z": dealt.z, "dealt_p": dealt.p, "dealt_q": dealt.q}
    else:
        siblings = dict.fromkeys(("dealt_z", "dealt_p", "dealt_q"), z)
        ratio["why"] = spread["why"] = _OWN_ONLY
    columns = {key: getattr(shared, key) for key in ("s_p", "z", "p", "q")} | siblings
    columns |= {"omega": spread.pop("omega_p"), "kappa": spread.pop("kappa_p")}
    differences = {f"delta_{key}": getattr(delta, key) for key in ("squared", "z", "p", "q")}
    return {
        "parents": {key: _nullable(values) for key, values in columns.items()},
        "children": {
            "parent": words.child_parent.tolist(),
            "beta": _nullable(ratio.pop("beta")),
            **{key: _nullable(values) for key, values in differences.items()},
        },
        "fraction_z_above_3": _mean(shared.z > Z_THRESHOLD, shared.z),
        "median_z": _median(shared.z),
        "fraction_q_below_05": _mean(shared.q < 0.05, shared.q),
        "median_dealt_z": _median(siblings["dealt_z"]),
        "fraction_delta_q_below_05": _mean(delta.q < 0.05, delta.q),
        "median_delta_z": _median(delta.z),
        **ratio,
        **spread,
    }


def _measure(
    found: Variant,
    child_parent: Sequence[int],
    nouns: Sequence[Word],
    order_N: np.ndarray,
    child_names: Sequence[str],
    parent_names: Sequence[str],
    **options: int,
) -> dict[str, Any]:
    estimate, child_words, reference = found.estimate, found.child_words, found.reference
    words = concept_words(child_words, child_parent, estimate.rows)
    result = hierarchy_statistics(words, word_sums(nouns, estimate.rows), **options, reference=reference)
    seed, bootstrap = options["seed"], options["bootstrap"]
    n_children = torch.bincount(words.child_parent, minlength=len(parent_names)).tolist()
    parents: dict[str, Any] = {"name": list(parent_names), "n_children": n_children, **result["parents"]}
    children: dict[str, Any] = {"name": list(child_names)} if found.own_children else {}
    children |= result["children"]

    signal = concept_signal(estimate, words, child_words, order_N, seed=seed, reference=reference)
    parents |= {"auroc": _nullable(signal.parent_auroc), "reliability": _nullable(signal.parent_reliability)}
    children |= {"auroc": _nullable(signal.child_auroc), "reliability": _nullable(signal.child_reliability)}

    tokens = [token for of_child in child_words for word in of_child for token in word]
    measured = (
        polytopes(words, child_words, estimate.rows(tokens), seed=seed)
        if reference is None
        else dict.fromkeys(MEASURES, np.full(len(parent_names), np.nan))
    )
    parents |= {key: _nullable(values) for key, values in measured.items()}
    angles = _angles(estimate, child_words, child_parent, reference, bootstrap, seed)
    children["angle_deg"] = angles.pop("angles_deg")
    owner = np.asarray(child_parent)
    return {
        **result,
        "parents": parents,
        "children": children,
        "signal": {
            "parent_auroc": _with_interval(signal.parent_auroc, np.arange(len(parent_names)), bootstrap, seed),
            "child_auroc": _with_interval(signal.child_auroc, owner, bootstrap, seed),
            "parent_reliability": _median(signal.parent_reliability),
            "child_reliability": _median(signal.child_reliability),
        },
        "polytopes": {
            key: _with_interval(values, np.arange(len(parent_names)), bootstrap, seed)
            for key, values in measured.items()
        },
        "angles": {"estimator": estimate.method, **angles},
        "decision": hierarchy_decision(result, bootstrap=bootstrap, seed=seed),
    }


def _angles(
    estimate: ConceptEstimator,
    child_words: ChildWords,
    child_parent: Sequence[int],
    reference: Sequence[int] | None,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    child_tokens = [sorted(token for word in words for token in word) for words in child_words]
    parent_tokens: list[list[int]] = [[] for _ in range(max(child_parent) + 1)]
    for tokens, parent in zip(child_tokens, child_parent, strict=True):
        parent_tokens[parent] += tokens
    parents_Qd = estimate.concept_vectors(parent_tokens)
    if reference is not None:
        parents_Qd = parents_Qd[list(reference)]
    deltas_Rd = estimate.concept_vectors(child_tokens) - parents_Qd[list(child_parent)]
    return hierarchical_orthogonality(parents_Qd, deltas_Rd, child_parent, bootstrap=bootstrap, seed=seed)


def _nullable(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _median(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _mean(true: np.ndarray, values: Floats) -> float | None:
    """Share of the values that are known for which `true` holds."""
    known = np.isfinite(values)
    return float(true[known].mean()) if known.any() else None


def _with_interval(values: Floats, owner: np.ndarray, bootstrap: int, seed: int) -> dict[str, Any]:
    """Median with a 95 % interval by bootstrap over parents, and how many values are known."""
    known = np.isfinite(values)
    if not known.any():
        return {"median": None, "ci95": None, "n": 0}
    groups = [values[known & (owner == parent)] for parent in np.unique(owner[known])]
    return {
        "median": float(np.median(values[known])),
        "ci95": bootstrap_median(groups, bootstrap, seed),
        "n": int(known.sum()),
    }
