"""Unit norms of decoder rows and atoms, and the gradient projection that goes with them (docs/method.md section 2)."""

import torch
from torch import Tensor


def row_norms(rows: Tensor, metric: Tensor | None) -> Tensor:
    """Norm of every row [..., d], Euclidean or in the metric [d, d]: [..., 1]."""
    squared = (rows * (rows if metric is None else rows @ metric)).sum(-1, keepdim=True)
    return squared.sqrt()


def gram(Up: Tensor, metric: Tensor | None) -> Tensor:
    """Up_p M Up_p^T, the metric that a subspace inherits: [P, s, s]."""
    return (Up if metric is None else Up @ metric) @ Up.mT


def atom_norms(Up: Tensor, G: Tensor, metric: Tensor | None) -> Tensor:
    """|Up_p^T G_pc| through the s x s Gram matrices: [P, C, 1]."""
    return (G * (G @ gram(Up, metric))).sum(-1, keepdim=True).clamp_min(0).sqrt()


def restore_gram(Up: Tensor, reference_gram: Tensor, metric: Tensor | None) -> Tensor:
    """The Up nearest in this sense: M Up with M = L_ref L^-1, which has the reference Gram matrix again.

    While G is frozen this keeps every atom at the norm it had, whatever the optimiser did to Up (float64 inside).
    """
    wide = Up.double()
    L = torch.linalg.cholesky(gram(wide, None if metric is None else metric.double()))
    L_ref = torch.linalg.cholesky(reference_gram.double())
    return (L_ref @ torch.linalg.solve_triangular(L, wide, upper=False)).to(Up.dtype)


def project_out(gradient: Tensor, rows: Tensor) -> Tensor:
    """The gradient without its component along the current rows [..., d] (normalised for the purpose)."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


def geometric_median(x_Bd: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Point with the least summed distance to the rows, by Weiszfeld's iteration in float64: [d].

    An iterate that lands on a row moves on unless the other rows pull less than the rows that lie there (Vardi and
    Zhang, 2000); the plain iteration would stay for ever.
    """
    x = x_Bd.double()
    median = x.mean(0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1, keepdim=True)
        weight = torch.where(distance > 1e-12, 1 / distance, 0.0)
        pull = ((x - median) * weight).sum(0).norm()
        stay = ((distance <= 1e-12).sum() / pull.clamp_min(1e-12)).clamp_max(1)
        new = stay * median + (1 - stay) * (x * weight).sum(0) / weight.sum().clamp_min(1e-12)
        if (new - median).norm() <= tolerance * (1 + median.norm()):
            return new.to(x_Bd.dtype)
        median = new
    return median.to(x_Bd.dtype)
