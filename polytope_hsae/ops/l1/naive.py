"""Summed sizes of codes."""

import torch
from torch import Tensor


def l1(pre: Tensor, threshold: Tensor | None, slope: float) -> Tensor:
    """Each row's summed |code| [B] of pre-activations [B, ...]: q from the threshold (None: 0) up, below it slope q."""
    floor = 0.0 if threshold is None else threshold
    return torch.where(pre >= floor, pre, slope * pre).abs().flatten(1).sum(1)
