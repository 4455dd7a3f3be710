"""AdamW, one step."""

import torch
from torch import Tensor


@torch.no_grad()
def adam_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: Tensor, hyper_4: Tensor, b1: float, b2: float, eps: float
) -> None:
    """One step on p with the gradient g * scale, in place; where scale is NaN nothing changes.

    m, v: moments. hyper_4: rate, 1 - rate * weight decay, 1 / (1 - b1^t), 1 / sqrt(1 - b2^t).
    """
    if torch.isnan(scale):
        return
    rate, shrink, correct_1, correct_2 = hyper_4
    g = g * scale
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    p.mul_(shrink).sub_(rate * correct_1 * m / (v.sqrt() * correct_2 + eps))
