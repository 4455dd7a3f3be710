"""The straight-through gate, whose backward pass is one kernel.

Shapes: B rows, k slots per row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # rows per program


@triton.jit
def _gate_grad_kernel(logit, grad, temperature, out, B, k, ROWS: tl.constexpr, KB: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    slot = tl.arange(0, KB)[None, :]
    inside = (row < B) & (slot < k)
    r = tl.load(logit + row * k + slot, mask=inside, other=float("-inf"))
    g = tl.load(grad + row * k + slot, mask=inside, other=0.0)
    tau = tl.load(temperature)
    is_on = r > 0
    top = tl.max(tl.where(slot < k, r, float("-inf")), 1)[:, None]
    e = tl.where(inside, tl.exp((r - tl.where(row < B, top, 0.0)) / tau), 0.0)
    soft = e / tl.maximum(tl.sum(e, 1), 1e-30)[:, None]
    of_soft = tl.where(is_on, g * r, 0.0)  # the gate multiplies the code
    through = soft * (of_soft - tl.sum(soft * of_soft, 1)[:, None]) / tau
    tl.store(out + row * k + slot, tl.where(is_on, g, 0.0) + through, mask=inside)


class _Gate(torch.autograd.Function):
    """`naive.gate`, with the temperature as one number on the device."""

    @staticmethod
    def forward(ctx: Any, logit_Bk: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(logit_Bk, temperature)
        return torch.relu(logit_Bk)

    @staticmethod
    def backward(ctx: Any, grad_Bk: Tensor) -> tuple[Tensor, None]:
        logit_Bk, temperature = ctx.saved_tensors
        B, k = logit_Bk.shape
        out = torch.empty(B, k, device=logit_Bk.device)
        if B:
            _gate_grad_kernel[(triton.cdiv(B, ROWS),)](
                logit_Bk.contiguous(), grad_Bk.contiguous(), temperature, out, B, k,
                ROWS=ROWS, KB=triton.next_power_of_2(k),
            )  # fmt: skip
        return out, None


def gate(logit_Bk: Tensor, temperature: float | Tensor) -> Tensor:
    """As `naive.gate`."""
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, device=logit_Bk.device)
    codes: Tensor = _Gate.apply(logit_Bk, temperature)
    return codes
