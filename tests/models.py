"""Small hierarchical autoencoders, and rows for them.

`config` and `sae` are of the default form; `factored` and `factored_sae` of the one with subspaces (docs/method.md,
sections 1 and 2), a straight-through gate and budgets of a row's own.
"""

from typing import Any

import torch
from torch import Tensor

from polytope_hsae.config import HSAEConfig
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

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
