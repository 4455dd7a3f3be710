"""The published code's penalty |M - 1 diag(M)^T|_F / (P^2 - P), M_ij = D_i . E_j of unit rows, and its gradient.

With m_j = M_jj, s = sum_i D_i, t = sum_j m_j E_j and column sums c_j = E_j . s, the square is
<D^T D, E^T E> - 2 sum_j m_j c_j + P |m|^2, so only d x d products are taken. Its gradients (rows already unit) are
    E_j: 2 E_j (D^T D) - 2 m_j s + 2 (P m_j - c_j) D_j,        D_i: 2 D_i (E^T E) - 2 t + 2 (P m_i - c_i) E_i.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dense import DTYPE, dense, product
from . import naive


@triton.jit
def _unit_kernel(E, D, unit_E, unit_D, inner, d, eps, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    e = tl.load(E + row * d + c, mask=c < d, other=0.0)
    w = tl.load(D + row * d + c, mask=c < d, other=0.0)
    e = e / (tl.sqrt(tl.sum(e * e, 0)) + eps)
    w = w / (tl.sqrt(tl.sum(w * w, 0)) + eps)
    tl.store(inner + row, tl.sum(e * w, 0))
    tl.store(unit_E + row * d + c, e, mask=c < d)
    tl.store(unit_D + row * d + c, w, mask=c < d)


@triton.jit
def _through_norm(x, g, eps):
    """Gradient with respect to x of g . x / (|x| + eps)."""
    norm = tl.sqrt(tl.sum(x * x, 0))
    unit = x / tl.maximum(norm, 1e-30)
    return (g - unit * (tl.sum(g * x, 0) / (norm + eps))) / (norm + eps)


@triton.jit
def _grad_kernel(
    E, D, product_E, product_D, inner, column, s, t, factor, grad_E, grad_D, P, d, eps, BLOCK: tl.constexpr
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    e = tl.load(E + row * d + c, mask=c < d, other=0.0)
    w = tl.load(D + row * d + c, mask=c < d, other=0.0)
    m, scale = tl.load(inner + row), tl.load(factor)
    mixed = 2 * (P * m - tl.load(column + row))
    unit_e = e / (tl.sqrt(tl.sum(e * e, 0)) + eps)
    unit_w = w / (tl.sqrt(tl.sum(w * w, 0)) + eps)
    of_e = 2 * tl.load(product_E + row * d + c, mask=c < d, other=0.0).to(tl.float32)
    of_w = 2 * tl.load(product_D + row * d + c, mask=c < d, other=0.0).to(tl.float32)
    of_e += mixed * unit_w - 2 * m * tl.load(s + c, mask=c < d, other=0.0)
    of_w += mixed * unit_e - 2 * tl.load(t + c, mask=c < d, other=0.0)
    tl.store(grad_E + row * d + c, scale * _through_norm(e, of_e, eps), mask=c < d)
    tl.store(grad_D + row * d + c, scale * _through_norm(w, of_w, eps), mask=c < d)


class _BiorthJax(torch.autograd.Function):
    """Value of the penalty from E, D [P, d]."""

    @staticmethod
    def forward(ctx: Any, E: Tensor, D: Tensor, eps: float, precision: str) -> Tensor:
        P, d = E.shape
        E, D = E.contiguous(), D.contiguous()
        unit_E, unit_D = (torch.empty_like(E, dtype=DTYPE[precision]) for _ in range(2))
        inner = torch.empty(P, device=E.device)
        block = triton.next_power_of_2(d)
        _unit_kernel[(P,)](E, D, unit_E, unit_D, inner, d, eps, BLOCK=block, num_warps=8)
        s = unit_D.sum(0, dtype=torch.float32)
        with dense(precision):
            gram_D, gram_E = product(unit_D.T, unit_D), product(unit_E.T, unit_E)
            column = product(unit_E, s.to(unit_E.dtype)[:, None])[:, 0]
        squared = (gram_D * gram_E).sum() - 2 * (inner * column).sum() + P * inner.square().sum()
        root = squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        ctx.save_for_backward(E, D, unit_E, unit_D, gram_E, gram_D, inner, column, s, root)
        ctx.eps, ctx.precision = eps, precision
        return root / (P * P - P)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        E, D, unit_E, unit_D, gram_E, gram_D, inner, column, s, root = ctx.saved_tensors
        P, d = E.shape
        with dense(ctx.precision):
            t = product(inner.to(unit_E.dtype)[None, :], unit_E)[0]
            product_E, product_D = unit_E @ gram_D.to(unit_E.dtype), unit_D @ gram_E.to(unit_D.dtype)
        factor = grad / (2 * root * (P * P - P))
        grad_E, grad_D = torch.empty_like(E), torch.empty_like(D)
        block = triton.next_power_of_2(d)
        _grad_kernel[(P,)](
            E, D, product_E, product_D, inner, column, s, t, factor, grad_E, grad_D, P, d, ctx.eps,
            BLOCK=block, num_warps=8,
        )  # fmt: skip
        return grad_E, grad_D, None, None


def biorth_jax(E: Tensor, D: Tensor, *, precision: str) -> Tensor:
    """As `naive.biorth_jax`."""
    P, d = E.shape
    if d >= P:
        return naive.biorth_jax(E, D)
    value: Tensor = _BiorthJax.apply(E, D, naive.EPS, precision)
    return value


def cross(E: Tensor, D: Tensor) -> Tensor:
    """As `naive.cross`; a long product is summed in parts, which keeps a GPU busy."""
    n, m = E.shape[-2:]
    parts = math.gcd(m, 64) if m >= 16 * n else 1
    E, D = (rows.unflatten(-1, (parts, m // parts)).transpose(-3, -2) for rows in (E, D))
    return (E @ D.mT).sum(-3)
