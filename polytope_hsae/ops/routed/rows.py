"""Rows on their way into the model, and their errors: steps that would otherwise take several passes over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _squared_error_kernel(x, x_hat, out, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, d, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(x + row * d + c, mask=c < d, other=0.0).to(tl.float32)
        b = tl.load(x_hat + row * d + c, mask=c < d, other=0.0).to(tl.float32)
        total += (a - b) * (a - b)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _squared_error_grad_kernel(x, x_hat, grad, out, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g = 2 * tl.load(grad + row)
    for at in range(0, d, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(x + row * d + c, mask=c < d, other=0.0).to(tl.float32)
        b = tl.load(x_hat + row * d + c, mask=c < d, other=0.0).to(tl.float32)
        tl.store(out + row * d + c, g * (b - a), mask=c < d)


def squared_error(x_Bd: Tensor, x_hat_Bd: Tensor) -> Tensor:
    """Each row's squared error, float32 [B]."""
    B, d = x_Bd.shape
    out = torch.empty(B, device=x_Bd.device)
    if B:
        _squared_error_kernel[(B,)](x_Bd.contiguous(), x_hat_Bd.contiguous(), out, d, BLOCK=1024)
    return out


def squared_error_grad(x_Bd: Tensor, x_hat_Bd: Tensor, grad_B: Tensor) -> Tensor:
    """Gradient of the rows' squared errors with respect to x_hat."""
    B, d = x_Bd.shape
    out = torch.empty(B, d, device=x_Bd.device)
    if B:
        _squared_error_grad_kernel[(B,)](
            x_Bd.contiguous(), x_hat_Bd.contiguous(), grad_B.contiguous(), out, d, BLOCK=1024
        )
    return out


@triton.jit
def _reconstruct_grad_kernel(x, top, x_hat, grad, grad_top, of_hat, of_both, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g, h = 2 * tl.load(grad + row), 2 * tl.load(grad_top + row)
    for at in range(0, d, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(x + row * d + c, mask=c < d, other=0.0)
        e = g * (tl.load(x_hat + row * d + c, mask=c < d, other=0.0) - a)
        f = h * (tl.load(top + row * d + c, mask=c < d, other=0.0) - a)
        tl.store(of_hat + row * d + c, e, mask=c < d)
        tl.store(of_both + row * d + c, e + f, mask=c < d)


def reconstruct_grad(
    x: Tensor, top: Tensor, x_hat: Tensor, grad_B: Tensor, grad_top_B: Tensor,
    dtype: torch.dtype, both_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the two errors with respect to what the children add, and to what the parents add."""
    of_hat, of_both = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=both_dtype)
    B, d = x.shape
    _reconstruct_grad_kernel[(B,)](
        x, top, x_hat, grad_B.contiguous(), grad_top_B.contiguous(), of_hat, of_both, d, BLOCK=1024
    )
    return of_hat, of_both


@triton.jit
def _enter_kernel(
    h, mean, scale, bias, x, centred, norm, stride_row, stride_column, d, eps,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, AFFINE: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if UNIT:
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, d, BLOCK):
            c = at + tl.arange(0, BLOCK)
            a = tl.load(h + row * stride_row + c * stride_column, mask=c < d, other=0.0).to(tl.float32)
            total += a * a
        factor = tl.sqrt(tl.sum(total, 0)) + eps
        tl.store(norm + row, factor)
    if AFFINE:
        factor = tl.load(scale)
    for at in range(0, d, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(h + row * stride_row + c * stride_column, mask=c < d, other=0.0).to(tl.float32)
        if AFFINE:
            a -= tl.load(mean + c, mask=c < d, other=0.0)
        a = a / factor
        tl.store(x + row * d + c, a, mask=c < d)
        if CENTRE:
            a -= tl.load(bias + c, mask=c < d, other=0.0)
        tl.store(centred + row * d + c, a, mask=c < d)


def enter(
    h_Bd: Tensor, normalize: str, mean: Tensor, scale: Tensor, eps: float, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalised rows float32 [B, d], the same less the bias in `dtype`, and the divisors of `unit_row` [B]."""
    B, d = h_Bd.shape
    unit = normalize == "unit_row"
    x = torch.empty(B, d, device=h_Bd.device)
    centred = torch.empty(B, d, device=h_Bd.device, dtype=dtype)
    norm = torch.empty(B if unit else 0, device=h_Bd.device)
    if B:
        _enter_kernel[(B,)](
            h_Bd, mean, scale, bias, x, centred, norm, *h_Bd.stride(), d, eps,
            BLOCK=min(2048, triton.next_power_of_2(d)), UNIT=unit, AFFINE=normalize == "rms", CENTRE=bias is not None,
        )  # fmt: skip
    return x, centred, norm if unit else None
