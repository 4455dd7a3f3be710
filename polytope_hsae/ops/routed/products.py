"""Three products between rows and the weights of the parents that each row was routed to, and their gradients.

    dot:    out[b, j] = W[p] x[b]                  [B, k, m]   p = the parent in slot j of row b
    sum:    out[b]    = sum_j W[p]^T c[b, j]       [B, d]
    outer:  out[p]    = sum of c[b, j] x[b]^T      [P, m, d]   over the slots that name p

Each is the gradient of the other two, so all of the model's routed work is made of them. `dot` and `outer` walk over
the pairs of one parent at a time, gather their rows once and use the matrix units; the gradients of `sum` need both of
them on the same rows, which then pass by once. `sum` walks over a row's parents. Nothing is added with atomics: the
same input gives the same bits.

Shapes: B rows, k slots per row, N = B k pairs, P parents, m weight rows per parent, d width, T pairs per tile.
A pair's row is pair // divisor: the divisor is k where the rows are the batch's, 1 where every pair has its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dense import DTYPE
from .plan import TILE, Plan

MODE = {"bf16": "tf32", "tf32": "tf32", "float32": "ieee"}  # of tl.dot; bf16 operands ignore it
FEW = 16  # weight rows per parent up to which one tile of the matrix units holds them


def _block(n: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(n)))


@triton.jit
def _dot_kernel(
    rows, weight, bias, out, order, tile_parent, tile_start, tile_end, divisor, d,
    M: tl.constexpr, MB: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if first < end:
        parent = tl.load(tile_parent + tile).to(tl.int64)
        slot = first + tl.arange(0, T)
        here = slot < end
        pair = tl.load(order + slot, mask=here, other=0).to(tl.int64)
        m, c = tl.program_id(1) * MB + tl.arange(0, MB), tl.arange(0, D)
        row_at = rows + (pair // divisor)[:, None] * d + c[None, :]
        weight_at = weight + (parent * M + m)[None, :] * d + c[:, None]
        total = tl.zeros((T, MB), tl.float32)
        for at in range(0, d, D):
            x = tl.load(row_at + at, mask=here[:, None] & (c[None, :] < d - at), other=0.0)
            w = tl.load(weight_at + at, mask=(m[None, :] < M) & (c[:, None] < d - at), other=0.0)
            total = tl.dot(x, w, total, input_precision=MODE)
        if BIAS:
            total += tl.load(bias + parent * M + m, mask=m < M, other=0.0)[None, :]
        tl.store(out + pair[:, None] * M + m[None, :], total, mask=here[:, None] & (m[None, :] < M))


@triton.jit
def _outer_kernel(
    coef, rows, out, order, chunk_start, chunk_end, chunk_place, divisor, d,
    M: tl.constexpr, MB: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The sum over one chunk of a parent's pairs."""
    chunk = tl.program_id(0)
    first, end = tl.load(chunk_start + chunk), tl.load(chunk_end + chunk)
    place = tl.load(chunk_place + chunk).to(tl.int64)
    m, c = tl.program_id(2) * MB + tl.arange(0, MB), tl.program_id(1) * D + tl.arange(0, D)
    total = tl.zeros((MB, D), tl.float32)
    for at in range(first, end, T):
        slot = at + tl.arange(0, T)
        here = slot < end
        pair = tl.load(order + slot, mask=here, other=0).to(tl.int64)
        left = tl.load(coef + pair[None, :] * M + m[:, None], mask=here[None, :] & (m[:, None] < M), other=0.0)
        row = rows + (pair // divisor)[:, None] * d
        x = tl.load(row + c[None, :], mask=here[:, None] & (c[None, :] < d), other=0.0)
        total = tl.dot(left.to(x.dtype), x, total, input_precision=MODE)
    at = out + (place * M + m)[:, None] * d + c[None, :]
    written = m < tl.where(place >= 0, M, 0)  # a spare chunk has no place
    tl.store(at, total, mask=written[:, None] & (c[None, :] < d))


@triton.jit
def _sweep_kernel(
    rows, weight, coef, out_dot, out_outer, order, tile_parent, tile_start, tile_end, tile_place, divisor, d,
    M: tl.constexpr, MB: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`outer` of one tile of a parent's pairs and, with DOT, their `dot`, for few weight rows."""
    tile = tl.program_id(0)
    place = tl.load(tile_place + tile).to(tl.int64)
    if place >= 0:
        first, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
        slot = first + tl.arange(0, T)
        here = slot < end
        pair = tl.load(order + slot, mask=here, other=0).to(tl.int64)
        m, c = tl.arange(0, MB), tl.arange(0, D)
        row_at = rows + (pair // divisor)[:, None] * d + c[None, :]
        out_at = out_outer + (place * M + m)[None, :] * d + c[:, None]
        right = tl.load(coef + pair[:, None] * M + m[None, :], mask=here[:, None] & (m[None, :] < M), other=0.0)
        right = right.to(rows.dtype.element_ty)
        weight_at = weight
        if DOT:
            weight_at += (tl.load(tile_parent + tile).to(tl.int64) * M + m)[None, :] * d + c[:, None]
        total = tl.zeros((T, MB), tl.float32)
        for at in range(0, d, D):
            x = tl.load(row_at + at, mask=here[:, None] & (c[None, :] < d - at), other=0.0)
            if DOT:
                w = tl.load(weight_at + at, mask=(m[None, :] < M) & (c[:, None] < d - at), other=0.0)
                total = tl.dot(x, w, total, input_precision=MODE)
            summed = tl.dot(tl.trans(x), right, input_precision=MODE)
            tl.store(out_at + at, summed, mask=(m[None, :] < M) & (c[:, None] < d - at))
        if DOT:
            tl.store(out_dot + pair[:, None] * M + m[None, :], total, mask=here[:, None] & (m[None, :] < M))


@triton.jit
def _add_pieces_kernel(out, first_piece, P, n, PARENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the sums of the later pieces of some parents to their first ones, in order."""
    begin = tl.program_id(0).to(tl.int64) * PARENTS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for i in range(0, PARENTS):
        parent = begin + i
        inside = parent < P
        first = tl.load(first_piece + parent, mask=inside, other=0)
        more = tl.load(first_piece + parent + 1, mask=inside, other=0) - first - 1
        if more > 0:
            extra = first - parent + P
            total = tl.load(out + parent * n + at, mask=at < n, other=0.0)
            for piece in range(0, more):
                total += tl.load(out + (extra + piece) * n + at, mask=at < n, other=0.0)
            tl.store(out + parent * n + at, total, mask=at < n)


@triton.jit
def _sum_kernel(coef, weight, parent, out, d, R, M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """One row, one block of columns. Blocks of columns are the slow axis: their weights then stay in the L2 cache."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    total = tl.zeros((ROWS, D), tl.float32)
    for at in range(0, R, ROWS):
        r = at + tl.arange(0, ROWS)
        p = tl.load(parent + b * (R // M) + r // M, mask=r < R, other=0).to(tl.int64)
        scale = tl.load(coef + b * R + r, mask=r < R, other=0.0).to(tl.float32)
        inside = (scale != 0)[:, None] & (c[None, :] < d)  # pairs that are left out cost no weights
        w = tl.load(weight + (p * M + r % M)[:, None] * d + c[None, :], mask=inside, other=0.0)
        total += scale[:, None] * w.to(tl.float32)
    tl.store(out + b * d + c, tl.sum(total, 0), mask=c < d)


@triton.jit
def _tile_sum_kernel(
    coef, weight, out, order, tile_parent, tile_start, tile_end, d,
    M: tl.constexpr, T: tl.constexpr, K: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """W[p]^T c for every pair: the tiles of one block of columns come one after the other."""
    tile = tl.program_id(0)
    first, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if first < end:
        parent = tl.load(tile_parent + tile).to(tl.int64)
        slot = first + tl.arange(0, T)
        here = slot < end
        pair = tl.load(order + slot, mask=here, other=0).to(tl.int64)
        c = tl.program_id(1) * D + tl.arange(0, D)
        total = tl.zeros((T, D), tl.float32)
        for at in range(0, M, K):
            m = at + tl.arange(0, K)
            w = tl.load(
                weight + (parent * M + m)[:, None] * d + c[None, :], mask=(m[:, None] < M) & (c[None, :] < d), other=0.0
            )
            left = tl.load(coef + pair[:, None] * M + m[None, :], mask=here[:, None] & (m[None, :] < M), other=0.0)
            total = tl.dot(left.to(w.dtype), w, total, input_precision=MODE)
        tl.store(out + pair[:, None] * d + c[None, :], total, mask=here[:, None] & (c[None, :] < d))


def of_pairs(plan: Plan, like: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for a number or a row of every pair [N, width]: 0 where pairs are left out, as nothing else writes there."""
    made = like.new_zeros if plan.partial else like.new_empty
    return made(len(plan.order), width, dtype=dtype)


def dot(
    rows: Tensor, weight_Pmd: Tensor, plan: Plan, divisor: int, precision: str, bias_Pm: Tensor | None = None
) -> Tensor:
    """float32 [N, m]; rows [N / divisor, d]; with a bias each pair's own is added."""
    _, M, d = weight_Pmd.shape
    dtype, tiles = DTYPE[precision], plan.tiles
    rows, weight = rows.to(dtype).contiguous(), weight_Pmd.to(dtype).contiguous()
    out = of_pairs(plan, rows, M)
    MB = _block(M, 256)
    D = _block(d, 64 if precision == "bf16" else 32)
    _dot_kernel[(len(tiles.parent), triton.cdiv(M, MB))](
        rows, weight, bias_Pm, out, plan.order, tiles.parent, tiles.start, tiles.end, divisor, d,
        M=M, MB=MB, T=TILE, D=D, MODE=MODE[precision], BIAS=bias_Pm is not None, num_warps=4 if MB <= 32 else 8,
        num_stages=4 if d > D else 1,
    )  # fmt: skip
    return out


def outer(coef_Nm: Tensor, rows: Tensor, plan: Plan, divisor: int, precision: str) -> Tensor:
    """float32 [P, m, d]; every entry is written, also where a parent has no pair."""
    if coef_Nm.shape[1] <= FEW:
        return _sweep(rows, None, coef_Nm, plan, divisor, precision)[1]
    M, d = coef_Nm.shape[1], rows.shape[1]
    dtype, chunks = DTYPE[precision], plan.chunks
    rows, coef_Nm = rows.to(dtype).contiguous(), coef_Nm.to(dtype).contiguous()
    out = rows.new_empty(len(chunks.place), M, d, dtype=torch.float32)  # from P on: later chunks
    MB = _block(M, 256)
    D = _block(d, (128 if MB <= 128 else 64) if precision == "bf16" else 64)
    _outer_kernel[(len(chunks.place), triton.cdiv(d, D), triton.cdiv(M, MB))](
        coef_Nm, rows, out, plan.order, chunks.start, chunks.end, chunks.place, divisor, d,
        M=M, MB=MB, T=64 if precision == "bf16" else 32, D=D, MODE=MODE[precision], num_warps=8, num_stages=3,
    )  # fmt: skip
    return _add_pieces(out, plan, chunks.first)


def dot_and_outer(
    rows: Tensor, weight_Pmd: Tensor, coef_Nm: Tensor, plan: Plan, divisor: int, precision: str
) -> tuple[Tensor, Tensor]:
    """`dot` of rows and weights, and `outer` of the coefficients and the same rows."""
    if coef_Nm.shape[1] <= FEW:
        return _sweep(rows, weight_Pmd, coef_Nm, plan, divisor, precision)
    options = plan, divisor, precision
    return dot(rows, weight_Pmd, *options), outer(coef_Nm, rows, *options)


def _sweep(
    rows: Tensor, weight_Pmd: Tensor | None, coef_Nm: Tensor, plan: Plan, divisor: int, precision: str
) -> tuple[Tensor, Tensor]:
    """As `dot_and_outer`; without weights the first result is empty."""
    M, d = coef_Nm.shape[1], rows.shape[1]
    dtype, tiles = DTYPE[precision], plan.tiles
    rows, coef_Nm = rows.to(dtype).contiguous(), coef_Nm.to(dtype).contiguous()
    weight = rows if weight_Pmd is None else weight_Pmd.to(dtype).contiguous()
    out_dot = rows.new_empty(0, M, dtype=torch.float32) if weight_Pmd is None else of_pairs(plan, rows, M)
    out = rows.new_empty(len(tiles.place), M, d, dtype=torch.float32)  # from P on: later tiles
    D = _block(d, 64 if precision == "bf16" else 32)
    _sweep_kernel[(len(tiles.place),)](
        rows, weight, coef_Nm, out_dot, out, plan.order, *tiles[:4], divisor, d,
        M=M, MB=_block(M, FEW), T=TILE, D=D, MODE=MODE[precision], DOT=weight_Pmd is not None,
        num_warps=4, num_stages=3 if d > D else 1,
    )  # fmt: skip
    return out_dot, _add_pieces(out, plan, tiles.first)


def _add_pieces(out: Tensor, plan: Plan, first: Tensor) -> Tensor:
    """The sums [P, m, d] of every parent from those of all pieces [n, m, d]."""
    n, M, d = out.shape
    P = plan.n_parents
    if n > P:
        parents, block = triton.cdiv(P, 1024), 1024
        grid = (triton.cdiv(P, parents), triton.cdiv(M * d, block))
        _add_pieces_kernel[grid](out, first, P, M * d, PARENTS=parents, BLOCK=block)
    return out[:P]


def sum_rows(coef_Nm: Tensor, weight_Pmd: Tensor, plan: Plan, divisor: int, precision: str) -> Tensor:
    """float32 [N / divisor, d]."""
    _, M, d = weight_Pmd.shape
    if divisor == 1 or M > FEW:
        slots = slot_sums(coef_Nm, weight_Pmd, plan, divisor, precision)
        return slots if divisor == 1 else slots.view(-1, divisor, d).sum(1, dtype=torch.float32)
    weight, coef_Nm = weight_Pmd.to(DTYPE[precision]).contiguous(), coef_Nm.contiguous()
    N, R = len(plan.order), divisor * M
    out = weight.new_empty(N // divisor, d, dtype=torch.float32)
    D = _block(d, 256)
    ROWS = min(8, triton.next_power_of_2(R))
    grid = (N // divisor, triton.cdiv(d, D))
    _sum_kernel[grid](coef_Nm, weight, plan.parent_Bk, out, d, R, M=M, ROWS=ROWS, D=D, num_warps=1)
    return out


def slot_sums(coef_Nm: Tensor, weight_Pmd: Tensor, plan: Plan, divisor: int, precision: str) -> Tensor:
    """W[p]^T c of every pair, [N, d], a matrix product per tile; float32 where every pair has its own row."""
    _, M, d = weight_Pmd.shape
    weight, coef_Nm = (x.to(DTYPE[precision]).contiguous() for x in (weight_Pmd, coef_Nm))
    tiles = plan.tiles
    slots = of_pairs(plan, weight, d, torch.float32 if divisor == 1 else DTYPE[precision])
    D = _block(d, 128 if precision == "bf16" else 64)
    grid = (len(tiles.parent), triton.cdiv(d, D))
    _tile_sum_kernel[grid](
        coef_Nm, weight, slots, plan.order, tiles.parent, tiles.start, tiles.end, d,
        M=M, T=TILE, K=_block(M, 32), D=D, MODE=MODE[precision], num_warps=8 if D >= 64 else 4,
        num_stages=3 if M > 32 else 1,
    )  # fmt: skip
    return slots
