"""Are the trees' edges in the model? (docs/method.md section 7)

A model predicts a forest over its latents: for every latent at most one other as its parent. Three forests:
- structure: an H-SAE's child lies under its router parent, which has none. A flat model has no such edges.
- cofiring: one rule for all latents of every model. Of the latents that are on in nearly all rows in which b is, the
  least frequent one that is more frequent than b is b's parent.
- forest: structure for an H-SAE's children and the rule among its router parents; for a flat model the rule alone.

An H-SAE has two levels: a latent is a parent or a child, never both. So of a chain of three edges structure can hold
the first and the last, or only the middle one; the edge between two router parents is what the rule adds.

Shapes: L latents, P router parents, C children per parent, N features.
"""

import torch
from torch import Tensor

from .recovery import Counts, Match
from .world import World

COVERED = 0.9  # of b's rows, for a to be above b
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # instead of COVERED, where the best one is asked for
LIFT = 2.0  # times as often as in all rows, which a latent that is nearly always on does not reach
MIN_ROWS = 20  # of b, for its rates to mean anything


def structure(n_parents: int, n_children: int, latent_L: Tensor) -> Tensor:
    """Parent of each latent [L] by the model's construction, -1 for none; a child that is never on has none."""
    L = n_parents * (1 + n_children)
    above_L = torch.full((L,), -1)
    above_L[n_parents:] = torch.arange(n_parents).repeat_interleave(n_children)
    return torch.where(latent_L.cpu() > 0, above_L, -1)


def cofiring(counts: Counts, among: int | None = None, covered: float = COVERED) -> Tensor:
    """Parent of each latent [L] by co-firing, -1 for none; `among`: only the first latents take part.

    The parent of b is the least frequent a, more frequent than b, with P(a on | b on) >= covered and >= LIFT P(a on).
    """
    L = len(counts.latent_L)
    among = L if among is None else among
    on_L = counts.latent_L[:among].double()
    given_LL = counts.pair_LL[:among, :among].double() / on_L.clamp_min(1)  # [a, b]: P(a on | b on)
    above_LL = (given_LL >= covered) & (given_LL >= LIFT * on_L[:, None] / counts.rows)
    above_LL &= (on_L[:, None] > on_L) & (on_L >= MIN_ROWS)
    rare_LL = torch.where(above_LL, on_L[:, None], torch.inf)
    least_L, index_L = rare_LL.min(0)
    parent_L = torch.full((L,), -1)
    parent_L[:among] = torch.where(least_L.isfinite(), index_L, -1).cpu()
    return parent_L


def best_cofiring(counts: Counts, found: Match, world: World) -> dict[str, float | None]:
    """The scores of `cofiring` at the threshold with the largest F1 of THRESHOLDS, which only the truth can tell."""
    scores = [
        {**edge_scores(cofiring(counts, covered=covered), found, world), "covered": covered} for covered in THRESHOLDS
    ]
    return max(scores, key=lambda each: each["f1"] or 0.0)


def forest(n_parents: int, n_children: int, counts: Counts) -> Tensor:
    """Parent of each latent [L]: by construction for an H-SAE's children, else by co-firing among the others."""
    built_L = structure(n_parents, n_children, counts.latent_L)
    return torch.where(built_L >= 0, built_L, cofiring(counts, n_parents))


def reachable(world: World, n_latents: int) -> int:
    """Edges between the `n_latents` most frequent features: what a model of that size should find."""
    rate_N, parent_N = world.rate_N.cpu(), world.parent_N.cpu()
    frequent_N = torch.zeros(len(rate_N), dtype=torch.bool)
    frequent_N[rate_N.topk(min(n_latents, len(rate_N))).indices] = True
    return int((frequent_N & (parent_N >= 0) & frequent_N[parent_N]).sum())


def two_level_bound(world: World, n_parents: int, n_children: int) -> int:
    """Edges that P router parents of C children can hold at most, whatever features they stand for.

    A feature is held by a parent or by a child, so levels of parents and of children alternate; best is every second
    level of parents, beginning above the leaves.
    """
    inner = sum(world.config.level_sizes[-2::-2])
    return min(n_parents, inner) * min(n_children, world.config.branching)


def edge_scores(above_L: Tensor, found: Match, world: World) -> dict[str, float | None]:
    """Precision, recall and F1 of a predicted forest, and counts.

    An edge is right when both latents stand for features and the one is the other's parent in its tree; an edge of a
    latent that stands for nothing is wrong. `ancestors` is the share in which the one is any ancestor of the other.
    Recall is against `reachable` edges, `recall_all` against all edges of the world, `recall_held` against those whose
    two features both have a latent in this model. `chance` is the F1 when features are dealt out to the latents that
    stand for one at random. Values are None where there is nothing to divide by.
    """
    child_E = (above_L >= 0).nonzero().squeeze(1)
    parent_N = world.parent_N.cpu()
    upper_E, lower_E = found.feature_L[above_L[child_E]], found.feature_L[child_E]
    right = int(_is_parent(upper_E, lower_E, parent_N).sum())
    reach, n_edges = reachable(world, len(above_L)), int((parent_N >= 0).sum())
    held = int(((found.latent_N >= 0) & (parent_N >= 0) & (found.latent_N[parent_N] >= 0)).sum())
    predicted = len(child_E)
    above_E, ancestor_E = lower_E, torch.zeros(predicted, dtype=torch.bool)
    for _ in range(world.config.depth):
        above_E = torch.where(above_E >= 0, parent_N[above_E], -1)
        ancestor_E |= (above_E >= 0) & (above_E == upper_E)
    return {
        "precision": _over(right, predicted),
        "recall": _over(right, reach),
        "f1": _over(2 * right, predicted + reach),
        "chance": _over(2 * _dealt_out(above_L, found, parent_N), predicted + reach),
        "ancestors": _over(int(ancestor_E.sum()), predicted),
        "recall_held": _over(right, held),
        "recall_all": _over(right, n_edges),
        "right": right,
        "predicted": predicted,
        "reachable": reach,
    }


def _is_parent(upper_E: Tensor, lower_E: Tensor, parent_N: Tensor) -> Tensor:
    """Where both are features (not -1) and the upper one is the lower one's parent."""
    return (upper_E >= 0) & (lower_E >= 0) & (parent_N[lower_E] == upper_E)


def _dealt_out(above_L: Tensor, found: Match, parent_N: Tensor) -> int:
    """Right edges after one random deal of the recovered features to the latents that stand for one."""
    feature_L = found.feature_L.clone()
    stands_n = (feature_L >= 0).nonzero().squeeze(1)
    order_n = torch.randperm(len(stands_n), generator=torch.Generator().manual_seed(0))
    feature_L[stands_n] = found.feature_L[stands_n[order_n]]
    child_E = (above_L >= 0).nonzero().squeeze(1)
    return int(_is_parent(feature_L[above_L[child_E]], feature_L[child_E], parent_N).sum())


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None
