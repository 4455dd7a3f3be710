"""The children of a parent as a polytope: how regular it is, and whether held-out tokens lie in it (docs/method.md §3).

Shape suffixes: N tokens, K children (vertices) of one parent, d residual width, H halves, R children, Q parents.
Vectors are in the unified coordinate.
"""

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.orthogonality import halve_words
from polytope_hsae.geometry.statistics import ChildWords, ConceptWords, Floats

TOLERANCE = 1e-9
_MAX_STEPS = 20_000
MEASURES = ("gram_cv", "edge_cv", "barycentric_accuracy", "chance", "hull_auroc")


def polytopes(words: ConceptWords, child_words: ChildWords, token_rows: Tensor, *, seed: int = 0) -> dict[str, Floats]:
    """Measures of every parent's children [Q]; NaN for a parent with fewer than 3 children of 2 words or more.

    gram_cv: deviation over |mean| of <l_i, l_j>, i < j, and edge_cv: of |l_i - l_j|; 0 for a regular simplex. The
    other two take the vertices l_c from one half of the words and read the tokens of the other half:
    barycentric_accuracy, the share of tokens whose largest barycentric coordinate is their own child's, mean over
    children (`chance` 1/K); hull_auroc, whether the parent's tokens lie nearer to the hull of its children than as
    many random tokens of other parents do (chance 0.5).

    Args:
        token_rows: g [N, d] of all tokens of `child_words`, child by child, word by word.
    """
    generator = np.random.default_rng(seed)
    sizes = [[len(word) for word in of_child] for of_child in child_words]
    child_N = np.repeat(np.arange(len(sizes)), [sum(size) for size in sizes])
    parent_N = words.child_parent.cpu().numpy()[child_N]
    word_N = np.repeat(np.arange(len(words.word_sizes)), [n for size in sizes for n in size])
    half_W = halve_words(words.word_child, seed * 100_003)
    sides = (half_W, 1 - half_W)
    vertices_HRd = torch.stack([words.child_vectors(weight_W) for weight_W in sides])
    held_out_HN = torch.stack(sides).cpu().numpy()[:, word_N] == 0
    full_Rd = words.child_vectors()
    out = {name: np.full(words.n_parents, np.nan) for name in MEASURES}
    for parent in range(words.n_parents):
        rows = [row for row in words.children(parent).tolist() if len(sizes[row]) > 1]
        if len(rows) < 3:
            continue
        out["gram_cv"][parent], out["edge_cv"][parent] = regularity(full_Rd[rows])
        out["chance"][parent] = 1 / len(rows)
        inside_N, outside_N = np.isin(child_N, rows), parent_N != parent
        accuracy, auroc = [], []
        for vertices_Rd, held_out_N in zip(vertices_HRd, held_out_HN, strict=True):
            own = np.flatnonzero(inside_N & held_out_N)
            vertices_Kd = vertices_Rd[rows]
            guess = np.asarray(rows)[barycentric(vertices_Kd, token_rows[own]).argmax(1).cpu().numpy()]
            accuracy.append(np.mean([(guess[child_N[own] == row] == row).mean() for row in rows]))
            others = np.flatnonzero(outside_N & held_out_N)
            if len(others) >= len(own):
                both = np.concatenate((own, generator.choice(others, len(own), replace=False)))
                distance = hull_distance(vertices_Kd, token_rows[both]).cpu().numpy()
                auroc.append(_auroc(-distance[: len(own)], -distance[len(own) :]))
        out["barycentric_accuracy"][parent] = np.mean(accuracy)
        out["hull_auroc"][parent] = np.mean(auroc) if auroc else np.nan
    return out


def regularity(vertices_Kd: Tensor) -> tuple[float, float]:
    """(gram_cv, edge_cv) of K >= 3 vertices: deviation over |mean| of inner products and of edge lengths."""
    i, j = torch.triu_indices(len(vertices_Kd), len(vertices_Kd), offset=1)
    products = (vertices_Kd[i] * vertices_Kd[j]).sum(1)
    lengths = (vertices_Kd[i] - vertices_Kd[j]).norm(dim=1)
    gram_cv, edge_cv = (float(x.std(correction=0) / x.mean().abs()) for x in (products, lengths))
    return gram_cv, edge_cv


def barycentric(vertices_Kd: Tensor, points_Nd: Tensor) -> Tensor:
    """Coordinates [N, K], of sum 1, of the points' projections onto the affine hull of the vertices."""
    edges_jd = vertices_Kd[1:] - vertices_Kd[0]
    rest_Nj = torch.linalg.lstsq(edges_jd.T, (points_Nd - vertices_Kd[0]).T).solution.T
    return torch.cat((1 - rest_Nj.sum(1, keepdim=True), rest_Nj), dim=1)


def hull_distance(vertices_Kd: Tensor, points_Nd: Tensor) -> Tensor:
    """Distance [N] of every point to the convex hull of the vertices; see `hull_weights`."""
    return (points_Nd - hull_weights(vertices_Kd, points_Nd) @ vertices_Kd).norm(dim=1)


def hull_weights(vertices_Kd: Tensor, points_Nd: Tensor) -> Tensor:
    """Weights [N, K] >= 0 of sum 1 of each point's nearest point in the hull: a small convex program per point.

    Accelerated projected gradient with restarts, on all points at once. It stops when the duality gap, which bounds
    the error of half the squared distance, is at most 1e-9 of the largest squared distance between a point and the
    first vertex. Raises ValueError if that is not reached.
    """
    # Coordinates about the first vertex: the program does not change, and no large common part is lost to rounding.
    edges_Kd, offsets_Nd = vertices_Kd - vertices_Kd[0], points_Nd - vertices_Kd[0]
    # NumPy: the arrays are so small that the calls are what costs.
    gram_KK, target_NK = ((rows @ edges_Kd.T).cpu().numpy() for rows in (edges_Kd, offsets_Nd))
    limit = TOLERANCE * float(offsets_Nd.square().sum(1).max())
    step = 1 / max(float(np.linalg.eigvalsh(gram_KK)[-1]), np.finfo(np.float64).tiny)
    weights_NK = np.full_like(target_NK, 1 / len(vertices_Kd))
    ahead_NK, t_N1 = weights_NK, np.ones_like(target_NK[:, :1])
    for number in range(_MAX_STEPS):
        if number % 10 == 0:
            slope_NK = weights_NK @ gram_KK - target_NK
            gap = float(((weights_NK * slope_NK).sum(1) - slope_NK.min(1)).max())
            if gap <= limit:
                return torch.from_numpy(weights_NK).to(points_Nd.device)
        moved_NK = project_to_simplex(ahead_NK - step * (ahead_NK @ gram_KK - target_NK))
        forward_NK = moved_NK - weights_NK
        uphill_N1 = ((ahead_NK - moved_NK) * forward_NK).sum(1, keepdims=True) > 0
        t_N1 = np.where(uphill_N1, 1.0, t_N1)
        next_N1 = (1 + np.sqrt(1 + 4 * t_N1**2)) / 2
        ahead_NK = moved_NK + (t_N1 - 1) / next_N1 * forward_NK
        weights_NK, t_N1 = moved_NK, next_N1
    raise ValueError(f"hull: found a gap of {gap:.3g} after {_MAX_STEPS} steps, allowed: {limit:.3g}")


def project_to_simplex(x_NK: Floats) -> Floats:
    """The nearest rows [N, K] with entries >= 0 of sum 1."""
    sorted_NK = np.sort(x_NK, axis=1)[:, ::-1]
    excess_NK = (sorted_NK.cumsum(1) - 1) / np.arange(1, x_NK.shape[1] + 1)
    last_N1 = (sorted_NK > excess_NK).sum(1, keepdims=True) - 1
    return np.asarray(np.maximum(x_NK - np.take_along_axis(excess_NK, last_N1, axis=1), 0.0))


def _auroc(positive: Floats, negative: Floats) -> float:
    """Share of pairs in which the positive is larger; ties count half."""
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)
