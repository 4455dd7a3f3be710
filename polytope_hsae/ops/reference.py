"""Routed products in plain PyTorch: each row meets only the weights of the parents it was routed to.

The (row, parent) pairs of a batch are sorted by parent and cut into tiles of T pairs that share one parent, so every
product is one batched matrix product whose cost grows with the number of pairs, not with the number of parents.

Shapes: B rows, k slots per row, N = B k pairs, P parents, n tiles, T pairs per tile, d residual width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MAX_PADDING = 0.25


class TilePlan(NamedTuple):
    """Where each pair of a batch lies among the tiles.

    parent_of_tile [n]; pair_of_slot [n*T] (padding slots name pair 0); slot_of_pair [N]; tile: T.
    """

    parent_of_tile: Tensor
    pair_of_slot: Tensor
    slot_of_pair: Tensor
    tile: int


def plan_tiles(parent_N: Tensor, n_parents: int) -> TilePlan:
    """Group pairs by parent (int64 [N], N >= 1) into tiles.

    T is the largest power of two up to 64 with which padding adds at most MAX_PADDING to the pairs, however they fall:
    the tiles are as large as a matrix product likes, and the cost never grows with the number of parents.
    """
    order_N = torch.argsort(parent_N, stable=True)
    count_P = torch.bincount(parent_N, minlength=n_parents)
    sizes_7 = 1 << torch.arange(7, device=parent_N.device)
    slots_7 = ((count_P.unsqueeze(1) + sizes_7 - 1) // sizes_7).sum(0) * sizes_7
    tile = int(sizes_7[slots_7 <= (1 + MAX_PADDING) * parent_N.numel()].max())
    tiles_P = (count_P + tile - 1) // tile
    parents_P = torch.arange(n_parents, device=parent_N.device)
    parent_of_tile = torch.repeat_interleave(parents_P, tiles_P)
    first_slot_P = (torch.cumsum(tiles_P, 0) - tiles_P) * tile
    first_pair_P = torch.cumsum(count_P, 0) - count_P
    sorted_parent_N = parent_N[order_N]
    rank_N = torch.arange(parent_N.numel(), device=parent_N.device) - first_pair_P[sorted_parent_N]
    slot_sorted_N = first_slot_P[sorted_parent_N] + rank_N
    slot_of_pair = torch.empty_like(order_N)
    slot_of_pair[order_N] = slot_sorted_N
    pair_of_slot = torch.zeros(parent_of_tile.numel() * tile, dtype=torch.int64, device=parent_N.device)
    pair_of_slot[slot_sorted_N] = order_N
    return TilePlan(parent_of_tile, pair_of_slot, slot_of_pair, tile)


class _RowsToSlots(torch.autograd.Function):
    """rows [B, i], each repeated for its k pairs -> slots [n*T, i]. Backward: the sum of each row's k slots."""

    @staticmethod
    def forward(ctx: Any, rows_Bi: Tensor, plan: TilePlan, k: int) -> Tensor:
        ctx.plan, ctx.k = plan, k
        return rows_Bi.index_select(0, plan.pair_of_slot // k)

    @staticmethod
    def backward(ctx: Any, grad_slots: Tensor) -> tuple[Tensor, None, None]:
        return _sum_slots(grad_slots, ctx.plan, ctx.k), None, None


class _SlotsToRows(torch.autograd.Function):
    """slots [n*T, o] -> the sum of each row's k slots [B, o]. Backward: the row's gradient for each of its slots.

    Padding slots get pair 0's gradient: what goes into them must be 0.
    """

    @staticmethod
    def forward(ctx: Any, slots: Tensor, plan: TilePlan, k: int) -> Tensor:
        ctx.plan, ctx.k = plan, k
        return _sum_slots(slots, plan, k)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        return grad_rows.index_select(0, ctx.plan.pair_of_slot // ctx.k), None, None


def _sum_slots(slots: Tensor, plan: TilePlan, k: int) -> Tensor:
    """Sum of each row's k slots, [B, o], without a [B, k, o] tensor."""
    return embedding_bag(plan.slot_of_pair.view(-1, k), slots, mode="sum")


class _SlotsToPairs(torch.autograd.Function):
    """slots [n*T, o] -> pairs [N, o]; padding slots are dropped and get gradient 0."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, plan: TilePlan) -> Tensor:
        ctx.plan = plan
        return slots.index_select(0, plan.slot_of_pair)

    @staticmethod
    def backward(ctx: Any, grad_pairs: Tensor) -> tuple[Tensor, None]:
        grad_slots = grad_pairs.new_zeros(len(ctx.plan.pair_of_slot), grad_pairs.shape[-1])
        return grad_slots.index_copy_(0, ctx.plan.slot_of_pair, grad_pairs), None


class _PairsToSlots(torch.autograd.Function):
    """pairs [N, i] -> slots [n*T, i], 0 in padding slots."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, plan: TilePlan) -> Tensor:
        ctx.plan = plan
        slots = pairs.new_zeros(len(plan.pair_of_slot), pairs.shape[-1])
        return slots.index_copy_(0, plan.slot_of_pair, pairs)

    @staticmethod
    def backward(ctx: Any, grad_slots: Tensor) -> tuple[Tensor, None]:
        return grad_slots.index_select(0, ctx.plan.slot_of_pair), None


def routed_product(plan: TilePlan, slots: Tensor, weight_Pio: Tensor) -> Tensor:
    """x W_p for every slot: slots [n*T, i], weight [P, i, o] -> [n*T, o]."""
    tiles = slots.view(-1, plan.tile, slots.shape[-1])
    return torch.bmm(tiles, weight_Pio.index_select(0, plan.parent_of_tile)).flatten(0, 1)


def routed_product_transposed(plan: TilePlan, slots: Tensor, weight_Poi: Tensor) -> Tensor:
    """x W_p^T for every slot: slots [n*T, i], weight [P, o, i] -> [n*T, o]."""
    tiles = slots.view(-1, plan.tile, slots.shape[-1])
    return torch.bmm(tiles, weight_Poi.index_select(0, plan.parent_of_tile).mT).flatten(0, 1)


def weighted_row_sum(weight_Pd: Tensor, index_Bk: Tensor, value_Bk: Tensor) -> Tensor:
    """Sum over k of value * weight[index]: [B, d], without a [B, k, d] tensor."""
    return embedding_bag(index_Bk, weight_Pd, mode="sum", per_sample_weights=value_Bk)


def encode_children(x_Bd: Tensor, parent_Bk: Tensor, Down: Tensor | None, F: Tensor, b_F: Tensor | None) -> Tensor:
    """Child pre-activations q = F_p Down_p x + b_F,p of every routed parent: [B, k, C]; no b_F counts as 0.

    Without Down children read the row itself: F is [P, C, d].
    """
    B, k = parent_Bk.shape
    if B == 0:
        return x_Bd.new_zeros(0, k, F.shape[1])
    plan = plan_tiles(parent_Bk.flatten(), F.shape[0])
    slots = _RowsToSlots.apply(x_Bd, plan, k)
    if Down is not None:
        slots = routed_product_transposed(plan, slots, Down)
    pre = routed_product_transposed(plan, slots, F)
    pre_BkC: Tensor = _SlotsToPairs.apply(pre, plan).view(B, k, -1)
    return pre_BkC if b_F is None else pre_BkC + b_F[parent_Bk]


def decode_children(index_BK: Tensor, value_BK: Tensor, Up: Tensor | None, G: Tensor) -> Tensor:
    """Sum of value * (Up_p^T G_pj) over each row's children, flat indices p*C + j: [B, d]; without Up of G_pj."""
    if Up is None:
        return weighted_row_sum(G.flatten(0, 1), index_BK, value_BK)
    B, K = index_BK.shape
    d = Up.shape[-1]
    if B * K == 0:
        return value_BK.new_zeros(B, d)
    C = G.shape[1]
    plan = plan_tiles(index_BK.flatten() // C, Up.shape[0])
    codes_Ns = G.flatten(0, 1).index_select(0, index_BK.flatten()) * value_BK.reshape(-1, 1)
    return _SlotsToRows.apply(routed_product(plan, _PairsToSlots.apply(codes_Ns, plan), Up), plan, K)
