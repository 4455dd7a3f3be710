"""Products that compare all rows of two matrices with each other."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


class _Gram(torch.autograd.Function):
    """X^T X over the last two dimensions; autograd takes a product for each factor, and they are one."""

    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        return X.mT @ X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        gradient: Tensor = X @ (grad + grad.mT)
        return gradient


def gram_product(E: Tensor, D: Tensor) -> Tensor:
    """<E^T E, D^T D> = |E D^T|_F^2, summed over leading dimensions."""
    return (_Gram.apply(E) * _Gram.apply(D)).sum()


def cross(E: Tensor, D: Tensor) -> Tensor:
    """E D^T over the last two dimensions: [..., n, n]."""
    return E @ D.mT


def biorth_jax(E: Tensor, D: Tensor) -> Tensor:
    """|M - 1 diag(M)^T|_F / (P^2 - P) with M_ij = D_i . E_j of unit rows [P, d]: the published code's penalty.

    It subtracts the diagonal from every *row* of M, which is a slip. With m_j = M_jj and the column sums
    1^T M = E (sum_i D_i) the square is |M|^2 - 2 sum_j m_j (1^T M)_j + P |m|^2, so M is never built for P > d.
    """
    P, d = E.shape
    if P == 1:
        return E.new_zeros(())
    E, D = E / (E.norm(dim=1, keepdim=True) + EPS), D / (D.norm(dim=1, keepdim=True) + EPS)
    total = (D @ E.T).square().sum() if d >= P else gram_product(D, E)
    diagonal_P, column_P = (E * D).sum(1), E @ D.sum(0)
    squared = total - 2 * (diagonal_P * column_P).sum() + P * diagonal_P.square().sum()
    return squared.clamp_min(torch.finfo(E.dtype).tiny).sqrt() / (P * P - P)
