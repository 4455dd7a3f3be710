"""The L1 of all opened children's codes, in one pass over their pre-activations."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


class _L1(torch.autograd.Function):
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


def l1(pre: Tensor, threshold: Tensor | None, slope: float) -> Tensor:
    """As `naive.l1`."""
    size: Tensor = _L1.apply(pre.flatten(1), threshold, slope)
    return size
