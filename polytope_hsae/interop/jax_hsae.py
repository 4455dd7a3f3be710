"""Weights of the published JAX H-SAE (docs/method.md section 6) as a model of this package.

The published tree stores decoders transposed. Its integers and `use_bias` are leaves too, and so are a bias and a
threshold that no gradient reaches.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
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


def import_jax(checkpoint: Path, out: Path, topk_parent: int | None = None) -> HierarchicalSAE:
    """Read an orbax checkpoint of the published tree and write it to `out` for `from_pretrained`; returns the model.

    `topk_parent`: active experts per row; None = the tree's leaf `k`. Needs the extra `jax`. Raises ValueError (one
    line) for a folder without a checkpoint, another tree, or a k that nothing names.
    """
    leaves = read_orbax(checkpoint)
    if topk_parent is None:
        if "k" not in leaves:
            raise ValueError("--topk: found nothing, nor a leaf k in the checkpoint, allowed: experts per row (32)")
        topk_parent = int(leaves["k"])
    model = model_of_tree(leaves, topk_parent)
    model.save_pretrained(out)
    return model


def read_orbax(checkpoint: Path) -> dict[str, Tensor]:
    """The leaves of an orbax checkpoint by dotted name, floats as float32.

    Arrays are restored to NumPy, so that a checkpoint that was sharded over many devices can be read on one.
    """
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ValueError('import-jax needs orbax: pip install "polytope-hsae[jax]"') from error
    folders = sorted({path.parent for path in checkpoint.rglob("_METADATA")}) if checkpoint.is_dir() else []
    if len(folders) != 1:
        found = "no checkpoint" if not folders else f"{len(folders)}: {', '.join(map(str, folders))}"
        raise ValueError(f"{checkpoint}: found {found}, allowed: a folder with one orbax checkpoint")
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(folders[0].resolve()).item_metadata.tree
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return _dotted(reader.restore(folders[0].resolve(), restore_args=as_arrays))


def _dotted(tree: Mapping[str, object], prefix: str = "") -> dict[str, Tensor]:
    leaves: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _dotted(value, f"{prefix}{name}.")
        else:
            array = np.asarray(value)
            leaves[prefix + name] = torch.from_numpy(array.astype(np.float32 if array.dtype.kind in "fV" else np.int64))
    return leaves


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
    into = {**model.tensors(), "threshold": model.router.get_buffer("threshold")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)
    return model.eval()
