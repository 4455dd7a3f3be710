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
def _best_kernel(pre, value, best, N, k, C, CB: tl.constexpr, PAIRS: tl.constexpr):
    n, c = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS), tl.arange(0, CB)
    inside = (n[:, None] < N) & (c[None, :] < C)
    q = tl.load(pre + n[:, None] * C + c[None, :], mask=inside, other=float("-inf"))
    first = tl.argmax(q, 1, tie_break_left=True)
    is_open = tl.load(value + n, mask=n < N, other=0.0) > 0
    tl.store(best + n, ((n % k) * C + tl.where(is_open, first, 0)).to(tl.int64), mask=n < N)


def best_child(pre_BkC: Tensor, value_Bk: Tensor) -> Tensor:
    """The place in [k*C] of every slot's largest child, int64 [B, k]; the first of equal or closed ones."""
    B, k, C = pre_BkC.shape
    best = torch.empty(B, k, dtype=torch.int64, device=pre_BkC.device)
    _best_kernel[(triton.cdiv(B * k, PAIRS),)](
        pre_BkC.contiguous(), value_Bk.contiguous(), best, B * k, k, C, CB=triton.next_power_of_2(C), PAIRS=PAIRS
    )
    return best


@triton.jit
def _code(pre, value, threshold, row, i, k, C, slope, LEAKY: tl.constexpr, inside):
    """Codes of the children at places i of a row, and their slopes; 0 where the parent is closed."""
    q = tl.load(pre + row * k * C + i, mask=inside, other=0.0)
    is_open = tl.load(value + row * k + i // C, mask=inside, other=0.0) > 0
    if LEAKY:
        steep = q >= tl.load(threshold)
    else:
        steep = q > 0
    rate = tl.where(is_open, tl.where(steep, 1.0, slope), 0.0)
    return rate * q, rate


@triton.jit
def _keep_kernel(
    pre, place, value, threshold, code, dense, k, C, K, slope,
    KB: tl.constexpr, BLOCK: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, KB)
    for first in range(0, k * C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        tl.store(dense + row * k * C + c, tl.zeros((BLOCK,), tl.float32), mask=c < k * C)
    tl.debug_barrier()  # the zeros are written before the codes
    i = tl.load(place + row * K + at, mask=at < K, other=0)
    found, _ = _code(pre, value, threshold, row, i, k, C, slope, LEAKY, at < K)
    tl.store(code + row * K + at, found, mask=at < K)
    tl.store(dense + row * k * C + i, found, mask=at < K)


@triton.jit
def _keep_grad_kernel(
    pre, place, value, threshold, of_code, of_dense, out, k, C, K, slope,
    KB: tl.constexpr, BLOCK: tl.constexpr, LEAKY: tl.constexpr, CODE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, KB)
    for first in range(0, k * C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        tl.store(out + row * k * C + c, tl.zeros((BLOCK,), tl.float32), mask=c < k * C)
    tl.debug_barrier()
    i = tl.load(place + row * K + at, mask=at < K, other=0)
    _, rate = _code(pre, value, threshold, row, i, k, C, slope, LEAKY, at < K)
    g = tl.zeros((KB,), tl.float32)
    if CODE:
        g += tl.load(of_code + row * K + at, mask=at < K, other=0.0)
    if DENSE:
        g += tl.load(of_dense + row * k * C + i, mask=at < K, other=0.0)
    tl.store(out + row * k * C + i, g * rate, mask=at < K)


class KeepChildren(torch.autograd.Function):
    """Pre-activations [B, k, C], places in [k*C] of the kept ones [B, K], the parents' codes [B, k] -> the kept
    children's codes [B, K], and all children's [B, k, C], 0 where they are not kept.

    threshold, slope: as in `CodeSize`. A child of a parent whose code is not above 0 has code 0.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, place_BK: Tensor, value_Bk: Tensor, threshold: Tensor | None, slope: float
    ) -> tuple[Tensor, Tensor]:
        pre, place_BK, value_Bk = pre.contiguous(), place_BK.contiguous(), value_Bk.contiguous()
        ctx.save_for_backward(pre, place_BK, value_Bk, threshold)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        (B, k, C), K = pre.shape, place_BK.shape[1]
        code, dense = pre.new_empty(B, K), torch.empty_like(pre)
        _keep_kernel[(B,)](
            pre, place_BK, value_Bk, threshold, code, dense, k, C, K, slope,
            KB=triton.next_power_of_2(K), BLOCK=512, LEAKY=threshold is not None,
        )  # fmt: skip
        return code, dense

    @staticmethod
    def backward(ctx: Any, of_code: Tensor | None, of_dense: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        pre, place_BK, value_Bk, threshold = ctx.saved_tensors
        (B, k, C), K = pre.shape, place_BK.shape[1]
        of_code = None if of_code is None else of_code.contiguous()
        of_dense = None if of_dense is None else of_dense.contiguous()
        out = torch.empty_like(pre)
        _keep_grad_kernel[(B,)](
            pre, place_BK, value_Bk, threshold, of_code, of_dense, out, k, C, K, ctx.slope,
            KB=triton.next_power_of_2(K), BLOCK=512, LEAKY=threshold is not None,
            CODE=of_code is not None, DENSE=of_dense is not None,
        )  # fmt: skip
        return out, None, None, None, None


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
