"""What the evidence is held against: other rows of U, other children, other parents, other metrics (docs/method.md §3).

A control changes what is estimated *from*; everything is then estimated anew. Shape suffixes: V vocabulary, d
residual width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.causal import CausalGeometry
from polytope_hsae.geometry.estimators import ConceptEstimator
from polytope_hsae.geometry.statistics import ChildWords, Word

CONTROLS = ("shuffled_rows", "gaussian", "pseudo_parents", "random_parent", "permuted_words")
METRICS = ("identity", "diagonal", "random", "residual_covariance")
WHY_FEW = "needs more parents than children of any one"
WHY_NO_COVARIANCE = "needs the covariance of activations of the final residual"


@dataclass(frozen=True)
class Variant:
    """What one column of evidence is estimated from. `reference`: for each parent the one that stands in for it,
    where that is not itself."""

    estimate: ConceptEstimator
    child_words: ChildWords
    own_children: bool = True
    reference: Sequence[int] | None = None


def variant(
    name: str,
    main: Variant,
    child_parent: Sequence[int],
    *,
    seed: int = 0,
    activation_covariance: Tensor | None = None,
) -> Variant | str:
    """The named control or metric, or a sentence on why it cannot be had. ValueError for an unknown name."""
    estimate, geometry = main.estimate, main.estimate.geometry
    rows_Vd, named = estimate.unembedding_Vd, estimate.named
    generator = torch.Generator().manual_seed(seed)
    if name == "shuffled_rows":
        # A permutation of the rows leaves their covariance, hence the geometry, as it is.
        order_V, ids_N = torch.arange(len(rows_Vd)), estimate.ids
        order_V[ids_N] = ids_N[torch.randperm(len(ids_N), generator=generator)]
        return Variant(estimate.of(rows_Vd[order_V.to(rows_Vd.device)], geometry), main.child_words)
    if name == "gaussian":
        noise_Nd = torch.randn(len(estimate.ids), rows_Vd.shape[1], generator=generator).to(rows_Vd.device)
        noise_Vd = noise_Nd.new_zeros(rows_Vd.shape)
        noise_Vd[named] = noise_Nd
        return Variant(estimate.of(noise_Vd, CausalGeometry(noise_Nd, geometry.shrinkage)), main.child_words)
    if name == "pseudo_parents":
        if max(child_parent) + 1 <= max(np.bincount(child_parent)):
            return WHY_FEW
        return Variant(estimate, pseudo_parents(main.child_words, child_parent, seed), own_children=False)
    if name == "random_parent":
        if max(child_parent) == 0:
            return "needs more than one parent"
        return Variant(estimate, main.child_words, reference=random_parents(max(child_parent) + 1, seed))
    if name == "permuted_words":
        return Variant(estimate, permuted_words(main.child_words, seed))
    if name == "residual_covariance":
        if activation_covariance is None:
            return WHY_NO_COVARIANCE
        on_device_dd = activation_covariance.to(rows_Vd.device)
        other = CausalGeometry.from_activation_covariance(on_device_dd, geometry.shrinkage)
        return Variant(estimate.of(rows_Vd, other), main.child_words)
    if name in METRICS:
        other = CausalGeometry(rows_Vd[named], geometry.shrinkage, name, seed=seed)
        return Variant(estimate.of(rows_Vd, other), main.child_words)
    raise ValueError(f"controls: found {name!r}, allowed: {', '.join((*CONTROLS, *METRICS))}")


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


def random_parents(n_parents: int, seed: int = 0) -> list[int]:
    """Another parent for every parent, each used once."""
    order = np.random.default_rng(seed).permutation(n_parents)
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return [int(parent) for parent in other]


def permuted_words(child_words: ChildWords, seed: int = 0) -> list[list[Word]]:
    """All words dealt out to the children at random, each child keeping how many words it has of how many tokens."""
    flat = [list(word) for words in child_words for word in words]
    size_W = np.array([len(word) for word in flat])
    generator = np.random.default_rng(seed)
    source_W = np.arange(len(flat))
    for size in np.unique(size_W):
        places = np.flatnonzero(size_W == size)
        source_W[places] = generator.permutation(places)
    dealt = iter(source_W)
    return [[flat[next(dealt)] for _ in words] for words in child_words]
