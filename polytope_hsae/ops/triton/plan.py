"""Pairs of a row and one of its parents, grouped by parent, without waiting for the GPU.

Shapes: B rows, k slots per row, N = B k pairs, P parents, n tiles, T pairs per tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # pairs of one parent that a matrix product takes at a time
CHUNK = 2048  # pairs of one parent that one program sums up


class Plan(NamedTuple):
    """Where every pair lies once the pairs are sorted by parent; all int32.

    parent_Bk: the parents as they came. order [N]: pair numbers b*k + j, sorted by parent. start [P+1]: where each
    parent's pairs begin in `order`. Tile t holds order[tile_start[t] : tile_end[t]], at most T pairs, all of parent
    tile_parent[t]. There are P + N/T tiles, an upper bound that needs no look at the counts; spare ones are empty.
    chunk_start, chunk_end: the same for chunks of at most CHUNK pairs, of which every parent has at least one.
    chunk_place: where a chunk's sum belongs: p for the first one of parent p, from P on for further ones, in order; -1
    for spare chunks. first_chunk [P+1]: number of each parent's first chunk.
    """

    parent_Bk: Tensor
    order: Tensor
    start: Tensor
    tile_parent: Tensor
    tile_start: Tensor
    tile_end: Tensor
    chunk_start: Tensor
    chunk_end: Tensor
    chunk_place: Tensor
    first_chunk: Tensor

    @property
    def k(self) -> int:
        """Slots per row."""
        return self.parent_Bk.shape[1]


def make_plan(parent_Bk: Tensor, n_parents: int) -> Plan:
    """Group the pairs of int64 or int32 [B, k]."""
    device, N = parent_Bk.device, parent_Bk.numel()
    parent_Bk = parent_Bk.to(torch.int32).contiguous()
    # Keys as narrow as they go: a radix sort's cost grows with the bytes of a key.
    keys_N = parent_Bk.flatten().to(torch.int16 if n_parents < 2**15 else torch.int32)
    sorted_N, order_N = torch.sort(keys_N, stable=True)
    edges = torch.arange(n_parents + 1, device=device, dtype=torch.int32)
    start = torch.searchsorted(sorted_N.to(torch.int32), edges, out_int32=True)
    count_P = start[1:] - start[:-1]
    tiles = _pieces((count_P + TILE - 1) // TILE, n_parents + N // TILE, start, TILE)
    chunks = _pieces(((count_P + CHUNK - 1) // CHUNK).clamp_min(1), n_parents + N // CHUNK, start, CHUNK)
    place = torch.where(chunks.number == 0, chunks.parent, chunks.piece - chunks.parent - 1 + n_parents)
    place = torch.where(chunks.spare, -1, place)
    return Plan(
        parent_Bk, order_N.to(torch.int32), start, tiles.parent, tiles.start, tiles.end,
        chunks.start, chunks.end, place, chunks.first,
    )  # fmt: skip


class _Pieces(NamedTuple):
    """Pieces of each parent's pairs: piece 0, 1, ...; number among its parent's; first piece of each parent [P+1]."""

    piece: Tensor
    parent: Tensor
    number: Tensor
    start: Tensor
    end: Tensor
    spare: Tensor
    first: Tensor


def _pieces(pieces_P: Tensor, most: int, start: Tensor, size: int) -> _Pieces:
    """Cut every parent's pairs into its number of pieces of `size` pairs; `most` pieces, the spare ones empty."""
    last_P = torch.cumsum(pieces_P, 0, dtype=torch.int32)
    first = torch.nn.functional.pad(last_P, (1, 0))
    index = torch.arange(most, device=last_P.device, dtype=torch.int32)
    parent = torch.searchsorted(last_P, index, right=True, out_int32=True)
    spare = parent == len(pieces_P)
    parent = parent.clamp_max(len(pieces_P) - 1)
    number = index - first[parent]
    begin = start[parent] + number * size
    end = torch.where(spare, begin, torch.minimum(begin + size, start[parent + 1]))
    return _Pieces(index, parent, number, begin, end, spare, first)
