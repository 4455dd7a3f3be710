"""Worlds in which the answer is known, to see how often the decision is right (docs/method.md §3).

Every word is one token, whose row is what its parent and child give it plus Gaussian noise of expected squared
length 1, in the unified coordinate. Shape suffixes: Q parents, K children of each, n words of each, M words of the
pool, d residual width, R children.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytope_hsae.geometry.decision import hierarchy_decision
from polytope_hsae.geometry.evidence import hierarchical_orthogonality, hierarchy_statistics
from polytope_hsae.geometry.statistics import ConceptWords

WORLDS = {
    "noise": "no word has anything but noise",
    "flat": "children have directions of their own, of the length sqrt(2) signal; parents have none",
    "hierarchy": "signal times a direction of the parent, and signal times differences orthogonal to it and each other",
    "oblique": "the same, but children have 0.4 to 1.6 of their parent's direction, unequally",
    "oblique_siblings": "the same, but half of a parent's children lean on one direction, the others on another",
    "undivided": "all words of a parent share its direction, sqrt(2) signal long; children are random parts of it",
}


@dataclass(frozen=True)
class WorldSize:
    """Sizes of a simulated world. `background`: words of noise in the pool beside the concepts' own."""

    width: int = 128
    parents: int = 20
    children: int = 6
    words: int = 8
    background: int = 1000
    permutations: int = 200
    halvings: int = 4


def draw_world(name: str, signal: float, size: WorldSize, seed: int) -> tuple[ConceptWords, Tensor]:
    """(the concepts' words, sums of g [M, d] of the pool) of one draw."""
    generator = torch.Generator().manual_seed(seed)
    n_children = size.parents * size.children

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, size.width, generator=generator, dtype=torch.float64) / size.width**0.5

    noise_Md = randn(n_children * size.words + size.background)
    # Orthonormal directions of every parent: its own, those of its children, and two to lean on.
    axes_Qdj = torch.linalg.qr(randn(size.parents, size.children + 3).transpose(1, 2))[0]
    own_Q1d = axes_Qdj[:, :, 0].unsqueeze(1)
    child_QKd = axes_Qdj[:, :, 1:-2].transpose(1, 2)
    lean_Q2d = axes_Qdj[:, :, -2:].transpose(1, 2)
    if name == "noise":
        mean_QKd = torch.zeros_like(child_QKd)
    elif name == "flat":
        mean_QKd = 2**0.5 * signal * torch.nn.functional.normalize(randn(size.parents, size.children), dim=-1)
    elif name == "undivided":
        mean_QKd = (2**0.5 * signal * own_Q1d).expand_as(child_QKd)
    elif name == "oblique":
        share_K1 = torch.linspace(0.4, 1.6, size.children, dtype=torch.float64).unsqueeze(1)
        mean_QKd = signal * (share_K1 * own_Q1d + child_QKd)
    elif name == "oblique_siblings":
        group_K = torch.arange(size.children) % 2
        mean_QKd = signal * (own_Q1d + 0.9 * lean_Q2d[:, group_K] + (1 - 0.9**2) ** 0.5 * child_QKd)
    else:
        mean_QKd = signal * (own_Q1d + child_QKd)
    own_Rd = mean_QKd.flatten(0, 1)
    rows_Md = noise_Md.clone()
    rows_Md[: n_children * size.words] += own_Rd.repeat_interleave(size.words, 0)
    child_W = torch.arange(n_children).repeat_interleave(size.words)
    parent_R = torch.arange(size.parents).repeat_interleave(size.children)
    sums_Wd = rows_Md[: len(child_W)]
    return ConceptWords(sums_Wd, torch.ones(len(sums_Wd), dtype=torch.float64), child_W, parent_R), rows_Md


def try_world(name: str, signal: float, size: WorldSize, seed: int, alpha: float = 0.01) -> dict[str, Any]:
    """One draw: the decision with its tests, and whether the published angle criterion passes."""
    words, pool_Md = draw_world(name, signal, size, seed)
    found = hierarchy_statistics(
        words,
        (pool_Md, pool_Md.new_ones(len(pool_Md))),
        permutations=size.permutations,
        halvings=size.halvings,
        bootstrap=1,
        seed=seed,
    )
    parents_Qd = words.parent_vectors()
    owner_R = words.child_parent
    deltas_Rd = words.child_vectors() - parents_Qd[owner_R]
    angles = hierarchical_orthogonality(parents_Qd, deltas_Rd, owner_R.tolist(), bootstrap=1)
    return {**hierarchy_decision(found, alpha), "angle_passes": angles["passes_two_sided"]}
