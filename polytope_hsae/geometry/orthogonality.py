"""Are siblings' differences orthogonal to each other and to their parent? beta, omega and kappa (docs/method.md §3).

Shape suffixes: W words, d residual width, R children, K children of one parent, Q parents. Vectors are in the
unified coordinate.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.statistics import Z_THRESHOLD, ConceptWords, Floats, bootstrap_median

BETA_RANGE = (0.8, 1.25)
WHY_NULL = f"no parent with at least 3 children has z > {Z_THRESHOLD:g}"


def _strong(words: ConceptWords, z: Floats) -> list[int]:
    children_Q = torch.bincount(words.child_parent, minlength=words.n_parents).tolist()
    return [parent for parent, value in enumerate(z) if value > Z_THRESHOLD and children_Q[parent] >= 3]


def orthogonality_ratio(words: ConceptWords, z: Floats, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """beta_c = mean_j <l_c, l_j> / mean_{i,j != c} <l_i, l_j> over children of parents with z > 3 and at
    least 3 children.

    Returns per-child `beta` [R] (NaN where not computed), `median_beta`, `beta_ci95` (bootstrap over
    parents), `beta_inside` (the median in 0.8 to 1.25), or nulls with `why`.
    """
    beta_R = np.full(len(words.child_parent), np.nan)
    strong = _strong(words, z)
    if not strong:
        return {"beta": beta_R, "median_beta": None, "beta_ci95": None, "beta_inside": None, "why": WHY_NULL}
    vectors_Rd = words.child_vectors()
    groups = []
    for parent in strong:
        rows_K = words.children(parent)
        gram_KK = vectors_Rd[rows_K] @ vectors_Rd[rows_K].T
        own_K = gram_KK.sum(1) - gram_KK.diagonal()
        k = len(rows_K)
        others_K = own_K.sum() - 2 * own_K
        beta_K = (own_K / (k - 1)) / (others_K / ((k - 1) * (k - 2)))
        beta_R[rows_K.cpu().numpy()] = beta_K.cpu().numpy()
        groups.append(beta_R[rows_K.cpu().numpy()])
    median = float(np.median(np.concatenate(groups)))
    return {
        "beta": beta_R,
        "median_beta": median,
        "beta_ci95": bootstrap_median(groups, bootstrap, seed),
        "beta_inside": BETA_RANGE[0] <= median <= BETA_RANGE[1],
    }


def halve_words(child_W: Tensor, seed: int) -> Tensor:
    """A random half of every child's words, as 0/1 weights [W] (float64): floor or ceil of half, by chance
    for odd counts."""
    generator = torch.Generator().manual_seed(seed)
    owner_W = child_W.cpu()
    key_W = torch.rand(len(owner_W), generator=generator, dtype=torch.float64)
    order_W = torch.argsort(owner_W.double() + key_W)
    counts_R = torch.bincount(owner_W)
    first_R = counts_R.cumsum(0) - counts_R
    rank_W = torch.empty_like(owner_W)
    rank_W[order_W] = torch.arange(len(owner_W)) - first_R[owner_W[order_W]]
    extra_R = torch.randint(0, 2, counts_R.shape, generator=generator) * (counts_R % 2)
    return (rank_W < (counts_R // 2 + extra_R)[owner_W]).double().to(child_W.device)


def omega(
    words: ConceptWords, z: Floats, s_p: Floats, *, halvings: int = 20, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What is left of the spread of siblings' inner products without noise, as squared shares of s_p.

    omega = mean over parents of cov_c(t_c^A, t_c^B) / s_p^2, t_c = mean_{j != c} <l_c, l_j> on two halves of the
    words: how unequally children lean on their parent. kappa, the same covariance over the pairs i < j of
    <l_i, l_j>: also sees siblings that lean on each other by pairs or groups. Averaged over `halvings` random
    halvings; parents with z > 3 and at least 3 children of at least 2 words (children with one word are left
    out). Returns per-parent `omega_p`, `kappa_p` [Q] (NaN where not computed), `omega`, `kappa` with `..._ci95`
    (bootstrap over parents), or nulls with `why`.
    """
    words_R = torch.bincount(words.word_child, minlength=len(words.child_parent))
    spread = {name: np.full(words.n_parents, np.nan) for name in ("omega", "kappa")}
    rows = {p: ((words.child_parent == p) & (words_R >= 2)).nonzero().flatten() for p in _strong(words, z)}
    rows = {parent: rows_K for parent, rows_K in rows.items() if len(rows_K) >= 3}
    out: dict[str, Any] = {f"{name}_p": values for name, values in spread.items()}
    if not rows:
        return {**out, **dict.fromkeys(("omega", "omega_ci95", "kappa", "kappa_ci95")), "why": WHY_NULL}
    totals = {name: dict.fromkeys(rows, 0.0) for name in spread}
    for halving in range(halvings):
        half_W = halve_words(words.word_child, seed * 100_003 + halving)
        halves = (words.child_vectors(half_W), words.child_vectors(1 - half_W))
        for parent, rows_K in rows.items():
            a_KK, b_KK = (vectors_Rd[rows_K] @ vectors_Rd[rows_K].T for vectors_Rd in halves)
            totals["omega"][parent] += _covariance(_to_siblings(a_KK), _to_siblings(b_KK))
            totals["kappa"][parent] += _covariance(_pairs(a_KK), _pairs(b_KK))
    picks = np.random.default_rng(seed).integers(0, len(rows), size=(bootstrap, len(rows)))
    for name, values_Q in spread.items():
        for parent, total in totals[name].items():
            values_Q[parent] = total / halvings / s_p[parent] ** 2
        values = values_Q[list(rows)]
        out[name] = float(values.mean())
        out[f"{name}_ci95"] = [float(value) for value in np.quantile(values[picks].mean(1), [0.025, 0.975])]
    return out


def _to_siblings(gram_KK: Tensor) -> Tensor:
    return (gram_KK.sum(1) - gram_KK.diagonal()) / (len(gram_KK) - 1)


def _pairs(gram_KK: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(gram_KK), len(gram_KK), offset=1)
    return gram_KK[i, j]


def _covariance(a_n: Tensor, b_n: Tensor) -> float:
    return float(((a_n - a_n.mean()) * (b_n - b_n.mean())).sum() / (len(a_n) - 1))
