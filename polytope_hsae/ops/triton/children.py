"""Steps over the pre-activations of all opened children.

Shapes: N pairs of a row and a parent, C children per parent.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 64  # pairs per program


@triton.jit
def _best_kernel(pre, value, best, N, C, CB: tl.constexpr, PAIRS: tl.constexpr):
    n, c = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS), tl.arange(0, CB)
    inside = (n[:, None] < N) & (c[None, :] < C)
    q = tl.load(pre + n[:, None] * C + c[None, :], mask=inside, other=float("-inf"))
    first = tl.argmax(q, 1, tie_break_left=True)
    is_open = tl.load(value + n, mask=n < N, other=0.0) > 0
    tl.store(best + n, tl.where(is_open, first, 0).to(tl.int64), mask=n < N)


def best_child(pre_NC: Tensor, value_N: Tensor) -> Tensor:
    """The largest child of every pair, int64 [N]: the first of equal ones; 0 where the parent's value <= 0."""
    N, C = pre_NC.shape
    best = torch.empty(N, dtype=torch.int64, device=pre_NC.device)
    _best_kernel[(triton.cdiv(N, PAIRS),)](
        pre_NC.contiguous(), value_N.contiguous(), best, N, C, CB=triton.next_power_of_2(C), PAIRS=PAIRS
    )
    return best


@triton.jit
def _size_kernel(pre, threshold, out, width, slope, BLOCK: tl.constexpr, LEAKY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    level = 0.0
    if LEAKY:
        level = tl.load(threshold)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, width, BLOCK):
        c = at + tl.arange(0, BLOCK)
        q = tl.load(pre + row * width + c, mask=c < width, other=0.0)
        total += tl.abs(tl.where(q >= level, q, slope * q))
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _size_grad_kernel(pre, threshold, grad, out, width, slope, BLOCK: tl.constexpr, LEAKY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    level = 0.0
    if LEAKY:
        level = tl.load(threshold)
    g = tl.load(grad + row)
    for at in range(0, width, BLOCK):
        c = at + tl.arange(0, BLOCK)
        q = tl.load(pre + row * width + c, mask=c < width, other=0.0)
        sign = tl.where(q > 0, 1.0, tl.where(q < 0, -1.0, 0.0))
        tl.store(out + row * width + c, g * sign * tl.where(q >= level, 1.0, slope), mask=c < width)


class CodeSize(torch.autograd.Function):
    """Each row's summed |code| [B] of pre-activations [B, width]: q from the threshold (or 0) up, slope * q below."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor | None, slope: float) -> Tensor:
        pre = pre.contiguous()
        ctx.save_for_backward(pre, threshold)
        ctx.slope = slope
        out = torch.empty(len(pre), device=pre.device)
        _size_kernel[(len(pre),)](pre, threshold, out, pre.shape[1], slope, BLOCK=512, LEAKY=threshold is not None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        out = torch.empty_like(pre)
        _size_grad_kernel[(len(pre),)](
            pre, threshold, grad_B.contiguous(), out, pre.shape[1], ctx.slope, BLOCK=512, LEAKY=threshold is not None
        )
        return out, None, None
