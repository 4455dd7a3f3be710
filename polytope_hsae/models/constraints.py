"""Unit norms of decoder rows and atoms, and the gradient projection that goes with them (docs/method.md section 2)."""

from collections.abc import Iterable

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
    """|Up_p^T G_pc|, [P, C, 1]: of the atoms themselves, or through the s x s Gram matrices where those are smaller."""
    if G.shape[-2] < Up.shape[-2]:
        return row_norms(G @ Up, metric)
    return (G * (G @ gram(Up, metric))).sum(-1, keepdim=True).clamp_min(0).sqrt()


def restore_gram(Up: Tensor, reference_gram: Tensor, metric: Tensor | None) -> Tensor:
    """The Up nearest in this sense: M Up with M = L_ref L^-1, which has the reference Gram matrix again.

    While G is frozen this keeps every atom at the norm it had, whatever the optimiser did to Up (float64 inside).
    NaN for a parent whose rows are not linearly independent.
    """
    wide = Up.double()
    L = _cholesky(gram(wide, None if metric is None else metric.double()))
    L_ref = _cholesky(reference_gram.double())
    return (L_ref @ torch.linalg.solve_triangular(L, wide, upper=False)).to(Up.dtype)


def _cholesky(A: Tensor) -> Tensor:
    """Lower factors of A [n, s, s], NaN where there is none: `torch.linalg.cholesky` waits for a GPU, to raise."""
    L, failed_n = torch.linalg.cholesky_ex(A)
    return torch.where(failed_n[:, None, None] == 0, L, torch.nan)


def project_out(gradient: Tensor, normal: Tensor) -> Tensor:
    """The gradient without its component along `normal` [..., d] (normalised for the purpose).

    The normal of a row's norm constraint is the row itself, in a metric M the row times M.
    """
    unit = torch.nn.functional.normalize(normal, dim=-1)
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


def geometric_median(batches: Iterable[Tensor], iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Point with the least summed distance to the rows of all batches [B, d], by Weiszfeld's iteration in float64: [d].

    `batches` is gone through once per iteration, so the rows need not fit into memory: a list, or any object whose
    `iter` starts anew. An iterate that lands on a row moves on unless the other rows pull less than the rows that lie
    there (Vardi and Zhang, 2000); the plain iteration would stay for ever. Raises ValueError where there is no row.
    """
    total_d, rows = None, 0
    for x_Bd in batches:
        summed_d = x_Bd.double().sum(0)
        total_d, rows = summed_d if total_d is None else total_d + summed_d, rows + len(x_Bd)
    if total_d is None or rows == 0:
        raise ValueError("geometric median: found no rows, allowed: at least one")
    median_d = total_d / rows
    for _ in range(iterations):
        pull_d, weighted_d = torch.zeros_like(median_d), torch.zeros_like(median_d)
        weights, here = median_d.new_zeros(()), median_d.new_zeros(())
        for x_Bd in batches:
            x_Bd = x_Bd.double()
            distance_B1 = (x_Bd - median_d).norm(dim=1, keepdim=True)
            weight_B1 = torch.where(distance_B1 > 1e-12, 1 / distance_B1, 0.0)
            pull_d += ((x_Bd - median_d) * weight_B1).sum(0)
            weighted_d += (x_Bd * weight_B1).sum(0)
            weights += weight_B1.sum()
            here += (distance_B1 <= 1e-12).sum()
        stay = (here / pull_d.norm().clamp_min(1e-12)).clamp_max(1)
        new_d = stay * median_d + (1 - stay) * weighted_d / weights.clamp_min(1e-12)
        if (new_d - median_d).norm() <= tolerance * (1 + median_d.norm()):
            return new_d
        median_d = new_d
    return median_d
