"""Small hierarchical autoencoders, and rows for them.

`config` and `sae` are of the default form; `factored` and `factored_sae` of the one with subspaces (docs/method.md,
sections 1 and 2), a straight-through gate and budgets of a row's own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from polytope_hsae.config import HSAEConfig
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.models.init import ChildInit

WIDTH = 5
SHAPE: dict[str, Any] = {"n_parents": 6, "topk_parent": 3, "n_children_per_parent": 4, "subspace_dim": 2}
FACTORED: dict[str, Any] = {
    "n_parents": 256,
    "topk_parent": 16,
    "n_children_per_parent": 8,
    "topk_child_total": None,
    "gate": "straight_through",
    "parent_budget": "per_row",
    "child_budget": "shared",
    "children": "factored",
    "use_tied_decoders_child": "init",
    "balance_rate": 0.0,
}


def config(**fields: Any) -> HSAEConfig:
    """A small model of the default form, with other values for some fields."""
    return HSAEConfig(**{**SHAPE, **fields})


def factored(**fields: Any) -> HSAEConfig:
    """The factored form with other values for some fields."""
    return HSAEConfig(**{**FACTORED, **fields})


def sae(width: int = WIDTH, normalize: str = "none", seed: int = 0, **fields: Any) -> HierarchicalSAE:
    """A small float64 model of the default form, in training mode."""
    return HierarchicalSAE(config(**fields), width, normalize, seed=seed).double()


def factored_sae(width: int = WIDTH, normalize: str = "none", seed: int = 0, **fields: Any) -> HierarchicalSAE:
    """A small float64 model of the factored form, in training mode."""
    return HierarchicalSAE(factored(**{**SHAPE, **fields}), width, normalize, seed=seed).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian float64 numbers, as rows."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@torch.no_grad()
def random_parameters(model: SparseAutoencoder) -> None:
    """Give every tensor, biases included, a value that matters."""
    for number, tensor in enumerate({id(tensor): tensor for tensor in model.tensors().values()}.values()):
        tensor.copy_(0.6 * normal(*tensor.shape, seed=100 + number))


def total(terms: dict[str, tuple[float, Tensor]]) -> Tensor:
    """The loss of its terms."""
    return torch.stack([weight * value for weight, value in terms.values()]).sum()


def assert_equal_state(model: SparseAutoencoder, other: SparseAutoencoder) -> None:
    """The same tensors, bit for bit."""
    state, again = model.state_dict(), other.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


class Roots:
    """Square roots of a metric, as a geometry has them."""

    def __init__(self, d: int, seed: int = 6):
        root = normal(d, d, seed=seed)
        self.sigma = root @ root.T / d + 0.2 * torch.eye(d, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.sigma)
        self.sigma_sqrt = vectors @ values.sqrt().diag() @ vectors.T
        self.sigma_inv_sqrt = vectors @ values.rsqrt().diag() @ vectors.T


def child_inits(names: Iterable[str], d: int = WIDTH, s: int = 2, n: int = 3) -> dict[str, ChildInit]:
    """Teachers of sub-SAEs with atoms of unit norm."""
    made = {}
    for number, name in enumerate(names):
        up = normal(s, d, seed=20 + number)
        G = normal(n, s, seed=40 + number)
        G = G / (G @ up).norm(dim=1, keepdim=True)
        made[name] = ChildInit(torch.linalg.pinv(up).T, up, G / G.square().sum(1, keepdim=True), G)
    return made
