"""Weights of the published JAX H-SAE (docs/method.md section 6) as a model of this package.

The published tree stores decoders transposed. Its integers and `use_bias` are leaves too, and so are a bias and a
threshold that no gradient reaches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import HSAEConfig
from ..models.hsae import HierarchicalSAE

# This package's tensor: (the tree's leaf, whether its last two dimensions are swapped)
LEAVES = {
    "E": ("top_level_autoencoder.encoder", False),
    "D": ("top_level_autoencoder.decoder", True),
    "Down": ("W_down", False),
    "Up": ("W_up", True),
    "F": ("encoder_weights", False),
    "G": ("decoder_weights", True),
}


def tensors_of_tree(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E, D, Down, Up, F, G and threshold (where the tree has one) of leaves by dotted name.

    Raises ValueError for a missing leaf and for shapes that do not fit together.
    """
    missing = [leaf for leaf, _ in LEAVES.values() if leaf not in leaves]
    if missing:
        raise ValueError(f"checkpoint: found no {', '.join(missing)}, allowed: the tree of the published H-SAE")
    tensors = {name: leaves[leaf].mT.contiguous() if swap else leaves[leaf] for name, (leaf, swap) in LEAVES.items()}
    (P, d), s, C = tensors["E"].shape, tensors["Down"].shape[1], tensors["F"].shape[1]
    expected = {"E": (P, d), "D": (P, d), "Down": (P, s, d), "Up": (P, s, d), "F": (P, C, s), "G": (P, C, s)}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            found = tuple(leaves[LEAVES[name][0]].shape)
            raise ValueError(
                f"checkpoint: found {LEAVES[name][0]} of shape {found}, allowed: one that fits P={P}, "
                f"d={d}, s={s}, C={C}"
            )
    if "threshold" in leaves:
        tensors["threshold"] = leaves["threshold"].reshape(())
    return tensors


def model_of_tree(leaves: Mapping[str, Tensor], topk_parent: int) -> HierarchicalSAE:
    """A jax-compatible H-SAE with the tree's weights, in eval mode; k is not in every checkpoint and is given."""
    tensors = tensors_of_tree(leaves)
    (P, d), s, C = tensors["E"].shape, tensors["Down"].shape[1], tensors["F"].shape[1]
    config = HSAEConfig.jax_compat(P, C, s, topk_parent)
    model = HierarchicalSAE(config, d, "unit_row").to(tensors["E"].dtype)
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(model, name).copy_(tensor)
    return model.eval()
