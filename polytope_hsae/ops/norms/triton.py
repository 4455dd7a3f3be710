"""Unit norms of rows, in one pass over them each."""

import triton
import triton.language as tl
from torch import Tensor

from . import naive


@triton.jit
def _project_kernel(grad, normal, d, R, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (row < R) & (c < d)
    g = tl.load(grad + row * d + c, mask=inside, other=0.0)
    w = tl.load(normal + row * d + c, mask=inside, other=0.0)
    along = tl.sum(g * w, 1) / tl.maximum(tl.sum(w * w, 1), 1e-24)
    tl.store(grad + row * d + c, g - along[:, None] * w, mask=inside)


@triton.jit
def _normalize_kernel(rows, d, R, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (row < R) & (c < d)
    w = tl.load(rows + row * d + c, mask=inside, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(w * w, 1)), 1e-12)
    tl.store(rows + row * d + c, w / norm[:, None], mask=inside)


def _rows_per_program(d: int) -> tuple[int, int]:
    block = triton.next_power_of_2(d)
    return max(1, 1024 // block), block


def project_out_(grad: Tensor, normal: Tensor) -> None:
    """As `naive.project_out_`."""
    if not (grad.is_contiguous() and normal.is_contiguous()):
        return naive.project_out_(grad, normal)
    ROWS, BLOCK = _rows_per_program(grad.shape[-1])
    R = grad.numel() // grad.shape[-1]
    _project_kernel[(triton.cdiv(R, ROWS),)](grad, normal, grad.shape[-1], R, ROWS=ROWS, BLOCK=BLOCK)


def normalize_rows_(rows: Tensor) -> None:
    """As `naive.normalize_rows_`."""
    if not rows.is_contiguous():
        return naive.normalize_rows_(rows)
    ROWS, BLOCK = _rows_per_program(rows.shape[-1])
    R = rows.numel() // rows.shape[-1]
    _normalize_kernel[(triton.cdiv(R, ROWS),)](rows, rows.shape[-1], R, ROWS=ROWS, BLOCK=BLOCK)
