"""The straight-through gate (docs/method.md section 1)."""

import torch
from torch import Tensor


def gate(logit_Bk: Tensor, temperature: float | Tensor) -> Tensor:
    """Codes relu(r) [B, k] of k > 1 chosen parents behind a gate of value 1.

    The gate's gradient is that of softmax(r / temperature) renormalised over the chosen: the softmax of their logits.
    """
    return torch.relu(logit_Bk) * straight_through(torch.softmax(logit_Bk / temperature, dim=1))


def straight_through(soft: Tensor) -> Tensor:
    """1, with the gradient of `soft`."""
    return 1.0 + (soft - soft.detach())
