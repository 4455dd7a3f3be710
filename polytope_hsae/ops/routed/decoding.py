"""Decoding a row and comparing it with its input while its columns are in registers.

Shapes: B rows, k slots per row, M weight rows per parent, d width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dense import DTYPE
from .plan import Plan
from .products import FEW, slot_sums

BLOCK = 256  # columns per program


@triton.jit
def _weighted_rows(coef, weight, parent, b, c, inside, R, d, M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """The sum of the R weight rows of row b's parents, each times its coefficient: D columns."""
    total = tl.zeros((ROWS, D), tl.float32)
    for at in range(0, R, ROWS):
        r = at + tl.arange(0, ROWS)
        p = tl.load(parent + b * (R // M) + r // M, mask=r < R, other=0).to(tl.int64)
        scale = tl.load(coef + b * R + r, mask=r < R, other=0.0).to(tl.float32)
        used = (scale != 0)[:, None] & inside[None, :]
        w = tl.load(weight + (p * M + r % M)[:, None] * d + c[None, :], mask=used, other=0.0)
        total += scale[:, None] * w.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _decode_kernel(
    x, value, D_Pd, coef, weight, parent, bias, top, x_hat, error, error_top, B, k, d,
    M: tl.constexpr, ROWS: tl.constexpr, TOP_ROWS: tl.constexpr, D: tl.constexpr,
    SLOTS: tl.constexpr, TOP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One row, one block of columns. Blocks of columns are the slow axis: their weights then stay in the L2 cache.

    TOP: the parents' part lies in `top` already. SLOTS: weight holds what each slot adds, [B k, d].
    """
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    inside = c < d
    if TOP:
        t = tl.load(top + b * d + c, mask=inside, other=0.0)
    else:
        t = _weighted_rows(value, D_Pd, parent, b, c, inside, k, d, 1, TOP_ROWS, D)
        if BIAS:
            t += tl.load(bias + c, mask=inside, other=0.0)
        tl.store(top + b * d + c, t, mask=inside)
    if SLOTS:
        added = tl.zeros((D,), tl.float32)
        for j in range(0, k):
            added += tl.load(weight + (b * k + j) * d + c, mask=inside, other=0.0).to(tl.float32)
    else:
        added = _weighted_rows(coef, weight, parent, b, c, inside, k * M, d, M, ROWS, D)
    y = t + added
    tl.store(x_hat + b * d + c, y, mask=inside)
    a = tl.load(x + b * d + c, mask=inside, other=0.0)
    tl.store(error + tl.program_id(1) * B + b, tl.sum((a - y) * (a - y), 0))
    tl.store(error_top + tl.program_id(1) * B + b, tl.sum((a - t) * (a - t), 0))


def decode(
    x: Tensor, top: Tensor | None, value_N1: Tensor | None, D: Tensor | None, subspace_Ns: Tensor, Up: Tensor,
    bias: Tensor | None, plan: Plan, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x_hat and x_hat_top, float32 [B, d], and their rows' squared errors [B].

    x float32 [B, d]; the parents' part is `top` [B, d] (with the bias), or made from their codes [N, 1], D [P, d] and
    the bias; the children's from their sums in each slot's subspace [N, s] and Up [P, s, d].
    """
    (B, d), k, s = x.shape, plan.k, Up.shape[1]
    dtype = DTYPE[precision]
    slots = s > FEW
    weight = slot_sums(subspace_Ns, Up, plan, k, precision) if slots else Up.to(dtype).contiguous()
    given = top is not None
    if D is not None:
        D = D.to(dtype).contiguous()
    top = torch.empty_like(x) if top is None else top
    x_hat, blocks = torch.empty_like(x), triton.cdiv(d, BLOCK)
    errors = x.new_empty(2, blocks, B)
    _decode_kernel[(B, blocks)](
        x, value_N1, D, subspace_Ns, weight, plan.parent_Bk, bias, top, x_hat, *errors, B, k, d,
        M=s, ROWS=min(8, triton.next_power_of_2(k * s)), TOP_ROWS=min(8, triton.next_power_of_2(k)), D=BLOCK,
        SLOTS=slots, TOP=given, BIAS=bias is not None, num_warps=1,
    )  # fmt: skip
    return x_hat, top, *errors.sum(1)
