"""Pairs of a row and one of its parents, grouped by parent, without waiting for the GPU.

Shapes: B rows, k slots per row, N = B k pairs, P parents, n pieces.
"""

from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # pairs of one parent that a matrix product takes at a time
CHUNK = 2048  # pairs of one parent that one program sums up where a parent's sum is large
BLOCK = 256


class Pieces(NamedTuple):
    """Every parent's pairs, cut into pieces; all int32.

    Piece i holds order[start[i] : end[i]], all of parent[i]; every parent has at least one, perhaps empty. There are
    P + N / size pieces, an upper bound that needs no look at the counts; spare ones are empty. place: where a piece's
    sum belongs: p for the first piece of parent p, from P on for further ones, in order; -1 for spare pieces.
    first [P+1]: number of each parent's first piece.
    """

    parent: Tensor
    start: Tensor
    end: Tensor
    place: Tensor
    first: Tensor


class Plan:
    """Where every pair lies once the pairs are sorted by parent; int32 tensors.

    parent_Bk: the parents as they came. order [N]: pair numbers b*k + j, sorted by parent. start [P+1]: where each
    parent's pairs begin in `order`. tiles, chunks: pieces of at most TILE and CHUNK pairs. partial: whether pairs were
    left out; these lie in `order` after start[P], belong to no piece, and products of pairs are 0 there.
    """

    def __init__(self, parent_Bk: Tensor, order_N: Tensor, start: Tensor, partial: bool):
        self.parent_Bk, self.order, self.start, self.partial = parent_Bk, order_N, start, partial
        self.k = parent_Bk.shape[1]
        self.n_parents = len(start) - 1

    @cached_property
    def tiles(self) -> Pieces:
        return _pieces(self.start, len(self.order), TILE)

    @cached_property
    def chunks(self) -> Pieces:
        return _pieces(self.start, len(self.order), CHUNK)


def make_plan(parent_Bk: Tensor, n_parents: int, used_Bk: Tensor | None = None) -> Plan:
    """Group the pairs of int64 or int32 [B, k], or those of them that are in use (bool)."""
    # Keys as narrow as they go: a radix sort's cost grows with the bytes of a key.
    narrow = torch.int16 if n_parents < 2**15 - 1 else torch.int32
    key_Bk = parent_Bk.to(narrow)
    if used_Bk is not None:
        key_Bk = key_Bk.masked_fill(~used_Bk, n_parents)
    sorted_N, order_N = torch.sort(key_Bk.flatten(), stable=True)
    edges = torch.arange(n_parents + 1, device=parent_Bk.device, dtype=narrow)
    start = torch.searchsorted(sorted_N, edges, out_int32=True)
    return Plan(parent_Bk.to(torch.int32).contiguous(), order_N.to(torch.int32), start, used_Bk is not None)


def _pieces(start: Tensor, n_pairs: int, size: int) -> Pieces:
    """Cut every parent's pairs into pieces of `size`."""
    P = len(start) - 1
    pieces_P = (start.diff().add_(size - 1) // size).clamp_min_(1)
    first = start.new_zeros(P + 1)
    torch.cumsum(pieces_P, 0, dtype=torch.int32, out=first[1:])
    n = P + n_pairs // size
    parent, begin, end, place = start.new_empty(4, n).unbind()
    steps = P.bit_length()  # of a search among P parents
    _pieces_kernel[(triton.cdiv(n, BLOCK),)](start, first, parent, begin, end, place, P, n, size, steps, BLOCK=BLOCK)
    return Pieces(parent, begin, end, place, first)


@triton.jit
def _pieces_kernel(start, first, parent, begin, end, place, P, n, size, steps, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + P
    for _ in range(0, steps):  # the number of parents whose pieces all lie before piece i
        middle = (low + high) // 2
        before = (low < high) & (tl.load(first + tl.minimum(middle, P - 1) + 1) <= i)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    spare = low >= P
    p = tl.minimum(low, P - 1)
    number = i - tl.load(first + p)
    at = tl.load(start + p) + number * size
    stop = tl.where(spare, at, tl.minimum(at + size, tl.load(start + p + 1)))
    later = P + i - p - 1
    inside = i < n
    tl.store(parent + i, p, mask=inside)
    tl.store(begin + i, at, mask=inside)
    tl.store(end + i, stop, mask=inside)
    tl.store(place + i, tl.where(spare, -1, tl.where(number == 0, p, later)), mask=inside)
