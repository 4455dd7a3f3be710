"""The straight-through gate's backward pass in one kernel.

Shapes: B rows, k slots per row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..magnitude import parent_code

ROWS = 16  # rows per program


@triton.jit
def _gate_grad_kernel(
    logit, grad, threshold, temperature, out, B, k, ROWS: tl.constexpr, KB: tl.constexpr, LEAKY: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    slot = tl.arange(0, KB)[None, :]
    inside = (row < B) & (slot < k)
    r = tl.load(logit + row * k + slot, mask=inside, other=float("-inf"))
    g = tl.load(grad + row * k + slot, mask=inside, other=0.0)
    tau = tl.load(temperature)
    if LEAKY:
        is_on = r >= tl.load(threshold)
    else:
        is_on = r > 0
    top = tl.max(tl.where(slot < k, r, float("-inf")), 1)[:, None]
    e = tl.where(inside, tl.exp((r - tl.where(row < B, top, 0.0)) / tau), 0.0)
    soft = e / tl.maximum(tl.sum(e, 1), 1e-30)[:, None]
    of_soft = tl.where(is_on, g * r, 0.0)  # the gate multiplies the code
    through = soft * (of_soft - tl.sum(soft * of_soft, 1)[:, None]) / tau
    tl.store(out + row * k + slot, tl.where(is_on, g, 0.0) + through, mask=inside)


class Gate(torch.autograd.Function):
    """Codes [B, k] of the k > 1 chosen parents' logits, relu or from the threshold up, times a gate of value 1.

    The gate's gradient is that of softmax(logit / temperature) over a row's slots; temperature: one number.
    """

    @staticmethod
    def forward(ctx: Any, logit_Bk: Tensor, threshold: Tensor | None, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(logit_Bk, threshold, temperature)
        return parent_code(logit_Bk, "relu" if threshold is None else "leaky_offset", threshold)

    @staticmethod
    def backward(ctx: Any, grad_Bk: Tensor) -> tuple[Tensor, None, None]:
        logit_Bk, threshold, temperature = ctx.saved_tensors
        B, k = logit_Bk.shape
        out = torch.empty(B, k, device=logit_Bk.device)
        if B:
            _gate_grad_kernel[(triton.cdiv(B, ROWS),)](
                logit_Bk.contiguous(), grad_Bk.contiguous(), threshold, temperature, out, B, k,
                ROWS=ROWS, KB=triton.next_power_of_2(k), LEAKY=threshold is not None,
            )  # fmt: skip
        return out, None, None
