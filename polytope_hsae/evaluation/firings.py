"""Firing rates of a model's latents, how they depend on each other, and dead latents (docs/method.md section 5).

P(parent on | child on) is 1 by construction for gated children, and counted all the same.

Shapes: B rows of a batch, P parents (a flat model's latents), R = P C children, k, K slots, G groups of documents.
"""

import math

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    FloatArray,
    Metric,
    Resampling,
    Units,
    bootstrap_fraction,
    bootstrap_mean,
    bootstrap_quantile,
    bootstrap_sums,
    bootstrap_units,
    unavailable,
)
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.hsae import HierarchicalSAE

FLAT = "a flat model has no children"
MIN_PARENT_ROWS = 50  # of a parent, for its children's P(child | parent) to be counted
GROUPS = 64  # of documents: what is resampled where counts of every document would take too much memory
BATCH = 8192
NORM_BLOCK = 256  # parents whose atoms are made at once


class Firings:
    """Counts of a split's codes: rows; parents on [G, P]; children on [R]; children on while their parent is [R]."""

    def __init__(self, n_parents: int, n_children: int, device: torch.device | str = "cpu", n_groups: int = 1) -> None:
        self.n_parents, self.n_children, self.rows = n_parents, n_children, 0
        self.rows_G = torch.zeros(n_groups, dtype=torch.int64, device=device)
        self.parents_GP = torch.zeros(n_groups, n_parents, dtype=torch.int64, device=device)
        self.children_R = torch.zeros(n_parents * n_children, dtype=torch.int64, device=device)
        self.both_R = torch.zeros_like(self.children_R)

    def add(self, codes: Codes, group_B: Tensor | None = None) -> None:
        """Count one batch, whose rows belong to documents of the given groups (default: all to the first)."""
        self.rows += len(codes.parent_index)
        on_Bk = codes.parent_value > 0
        cell_Bk = codes.parent_index
        if group_B is None:
            self.rows_G[0] += len(cell_Bk)
        else:
            self.rows_G.scatter_add_(0, group_B, torch.ones_like(group_B))
            cell_Bk = cell_Bk + group_B.unsqueeze(1) * self.n_parents
        self.parents_GP.view(-1).scatter_add_(0, cell_Bk.flatten(), on_Bk.long().flatten())
        if self.n_children:
            on_BK = codes.child_value > 0
            owner_BK1 = (codes.child_index // self.n_children).unsqueeze(2)
            with_parent_BK = ((owner_BK1 == codes.parent_index.unsqueeze(1)) & on_Bk.unsqueeze(1)).any(2)
            child_N = codes.child_index.flatten()
            self.children_R.scatter_add_(0, child_N, on_BK.long().flatten())
            self.both_R.scatter_add_(0, child_N, (on_BK & with_parent_BK).long().flatten())

    @property
    def parents_P(self) -> Tensor:
        """Rows with each parent on."""
        return self.parents_GP.sum(0)

    @property
    def dead_parents(self) -> float:
        """Share of all parents (a flat model's latents) that were never on."""
        return float((self.parents_P == 0).double().mean())

    @property
    def dead_children(self) -> float | None:
        """Share of all children that were never on, those of dead parents too; None for a flat model."""
        return float((self.children_R == 0).double().mean()) if self.n_children else None

    @property
    def l0_parents(self) -> float:
        """Parents on per row."""
        return float(self.parents_P.sum()) / self.rows

    @property
    def l0_children(self) -> float:
        """Children on per row."""
        return float(self.children_R.sum()) / self.rows


@torch.no_grad()
def count_firings(
    sae: SparseAutoencoder, store: ActivationStore, split: str, max_rows: int | None = None, seed: int = 0
) -> Firings:
    """Firings on a split, or on `max_rows` random rows of it."""
    device = sae.write_directions().device
    found = Firings(sae.n_parents, sae.n_children, device)
    for rows in sampled_rows(store.n_rows(split), max_rows, seed).split(BATCH):
        found.add(sae.encode(store.acts(split, rows).to(device)))
    return found


def sampled_rows(n_rows: int, max_rows: int | None, seed: int) -> Tensor:
    """All row numbers, or `max_rows` random ones in ascending order."""
    if max_rows is None or max_rows >= n_rows:
        return torch.arange(n_rows)
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values


def firing_metrics(found: Firings, resampling: Resampling = RESAMPLING) -> dict[str, Metric]:
    """Conditional firing rates of a split, and how evenly parents fire.

    `parent_given_child`: of all child codes, those whose parent is on; chance: as often as that parent is on anyway;
    interval over parents. `child_given_parent`, with `_q25` and `_q75`: over children whose parent is on in
    MIN_PARENT_ROWS rows or more, the median share of these rows with the child on; chance: the share of all rows;
    interval over these children. `max_firing_rate`: largest firing rate of a parent; chance: all equal.
    `entropy`: of the parents' shares of all parent codes, in nats; chance: its largest value. Their
    intervals are over groups of documents, if there are several. A flat model's latents count as parents.
    """
    names = ("parent_given_child", "child_given_parent", "child_given_parent_q25", "child_given_parent_q75")
    metrics = _rates(found, resampling)
    if not found.n_children:
        return metrics | {name: unavailable(FLAT) for name in names}
    parent_P = found.parents_P.double().cpu().numpy()
    child_R, both_R = (each_R.double().cpu().numpy() for each_R in (found.children_R, found.both_R))
    parent_R = parent_P.repeat(found.n_children)
    fired = child_R.sum()
    if fired == 0:
        metrics["parent_given_child"] = unavailable("no child is on")
    else:
        chance = float((child_R * parent_R).sum() / found.rows / fired)
        both_P, child_P = (each_R.reshape(-1, found.n_children).sum(1) for each_R in (both_R, child_R))
        given = bootstrap_units(Units.ratio(both_P, child_P), *resampling)
        metrics["parent_given_child"] = Metric(given.value, given.ci95, chance, int(fired), given.why)
    used_R = parent_R >= MIN_PARENT_ROWS
    if not used_R.any():
        why = f"no parent is on in {MIN_PARENT_ROWS} rows"
        return metrics | {name: unavailable(why) for name in names[1:]}
    given_M, alone_M = both_R[used_R] / parent_R[used_R], child_R[used_R] / found.rows
    for name, place in zip(names[1:], (0.5, 0.25, 0.75), strict=True):
        metrics[name] = bootstrap_quantile(given_M, place, float(np.quantile(alone_M, place)))
    return metrics


def _rates(found: Firings, resampling: Resampling) -> dict[str, Metric]:
    """`max_firing_rate` and `entropy`."""
    parents_GP, rows_G = found.parents_GP.double().cpu().numpy(), found.rows_G.double().cpu().numpy()
    used_G = rows_G > 0
    columns_GK = np.column_stack([rows_G, parents_GP])[used_G]

    def largest(sums: FloatArray) -> FloatArray:
        return sums[..., 1:].max(-1) / sums[..., 0]

    def entropy(sums: FloatArray) -> FloatArray:
        share = sums[..., 1:] / np.maximum(sums[..., 1:].sum(-1, keepdims=True), 1.0)
        return -(share * np.log(np.maximum(share, 1e-30))).sum(-1)

    even = float(parents_GP.sum() / max(found.rows, 1) / found.n_parents)
    chances = {"max_firing_rate": (largest, even), "entropy": (entropy, math.log(found.n_parents))}
    metrics = {}
    for name, (statistic, chance) in chances.items():
        metric = bootstrap_sums(columns_GK, statistic, *resampling, chance)
        metrics[name] = Metric(metric.value, metric.ci95, chance, found.rows, metric.why)
    return metrics


def usage_metrics(found: Firings, resampling: Resampling = RESAMPLING) -> dict[str, Metric]:
    """Dead latents of a split; no chance levels.

    `dead_parents`: share of parents that never fire. `dead_children`: of the children of parents that fire, the share
    that never do. `dead_children_routed`: the same, with parents weighted by their firing rates.
    `atoms_in_use`: children on at least once, per parent that is on. Intervals: over
    parents, for `dead_children` over children.
    """
    on_P = (found.parents_P > 0).cpu().numpy()
    metrics = {"dead_parents": bootstrap_fraction(int((~on_P).sum()), len(on_P), *resampling)}
    names = ("dead_children", "dead_children_routed", "atoms_in_use")
    if not found.n_children:
        return metrics | {name: unavailable(FLAT) for name in names}
    used_P = (found.children_R > 0).view(-1, found.n_children).sum(1).cpu().numpy()[on_P]
    rows_P = found.parents_P.double().cpu().numpy()[on_P]
    children = len(used_P) * found.n_children
    routed = Units.ratio(rows_P * (1 - used_P / found.n_children), rows_P)
    return metrics | {
        "dead_children": bootstrap_fraction(children - int(used_P.sum()), children, *resampling),
        "dead_children_routed": bootstrap_units(routed, *resampling),
        "atoms_in_use": bootstrap_mean(used_P, *resampling),
    }


@torch.no_grad()
def norm_metrics(sae: SparseAutoencoder) -> dict[str, Metric]:
    """`decoder_norm`, `atom_norm`: median Euclidean norm of the parents' decoder rows and of the children's atoms."""
    metrics = {"decoder_norm": bootstrap_quantile(sae.D.norm(dim=1).cpu().numpy(), 0.5)}
    if not isinstance(sae, HierarchicalSAE):
        return metrics | {"atom_norm": unavailable(FLAT)}
    blocks = torch.arange(sae.n_parents, device=sae.D.device).split(NORM_BLOCK)
    norms = torch.cat([sae.atoms(parents).norm(dim=2).flatten() for parents in blocks])
    return metrics | {"atom_norm": bootstrap_quantile(norms.cpu().numpy(), 0.5)}
