"""The routed operations on a CPU: rows are read where they lie and added in place, with no gathered copy.

All of them are made of three products, each the gradient of the other two. With rows x [B, d], weights W [R, d] and
for every row the numbers i of n weights and n values v:

    dot    x_b . W_i                                  -> [B, n]
    sum    sum over a row's n of v W_i                -> [B, d]
    outer  sum over a weight's pairs (b, i) of v x_b  -> [R, d], for which pairs are grouped by weight

Memory is that of B n values. M counts the pairs whose value is not 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from . import Children, Decoded, Routed, Routing, Rows
from .naive import chosen

SPARSE = 1 / 8  # share of a gradient's entries that are not 0, up to which its products take those entries alone


def linear(rows: Rows, weight_Pd: Tensor, bias_P: Tensor | None) -> Tensor:
    """As `naive.linear`; the gradient costs what its entries other than 0 cost: those of the chosen logits."""
    out: Tensor = _Linear.apply(rows.values, weight_Pd, bias_P)
    return out


def route(rows: Rows, E: Tensor, b_E: Tensor | None, k: int, **choice: Any) -> Routed:
    """As `naive.route`."""
    return chosen(_Linear.apply(rows.values, E, b_E), k, **choice)


def decode(routes: Routing, value_Bk: Tensor, D: Tensor) -> Tensor:
    """As `naive.decode`."""
    summed: Tensor = _Sum.apply(D, routes.parent_Bk, value_Bk)
    return summed


def encode_children(
    rows: Rows, routes: Routing, F: Tensor, b_F: Tensor | None = None, Down: Tensor | None = None
) -> Tensor:
    """As `naive.encode_children`."""
    parent_Bk, x_Bd = routes.parent_Bk, rows.values
    (B, k), (P, C, s) = parent_Bk.shape, F.shape
    if Down is None or composes(B * k, P, C, s):
        direct = F if Down is None else F @ Down
        pre = _Dot.apply(x_Bd, direct.flatten(0, 1), parent_Bk, C)
    else:
        subspace = _Dot.apply(x_Bd, Down.flatten(0, 1), parent_Bk, s)
        pre = _Dot.apply(subspace.view(B * k, s), F.flatten(0, 1), parent_Bk.view(-1, 1), C)
    pre_BkC: Tensor = pre.view(B, k, C)
    if b_F is not None:
        pre_BkC = pre_BkC + b_F[parent_Bk]
    return pre_BkC if routes.used_Bk is None else torch.where(routes.used_Bk.unsqueeze(2), pre_BkC, 0.0)


def decode_children(index_BK: Tensor, value_BK: Tensor, G: Tensor, Up: Tensor | None = None) -> Tensor:
    """As `naive.decode_children`."""
    (B, K), (P, C, s) = index_BK.shape, G.shape
    if Up is None or composes(B * K, P, C, s):
        decoded: Tensor = _Sum.apply((G if Up is None else G @ Up).flatten(0, 1), index_BK, value_BK)
    else:
        codes = _Sum.apply(G.flatten(0, 1), index_BK.view(-1, 1), value_BK.view(-1, 1))
        rows_Kn = (index_BK // C).unsqueeze(2) * s + torch.arange(s, device=index_BK.device)
        decoded = _Sum.apply(Up.flatten(0, 1), rows_Kn.flatten(1), codes.view(B, K * s))
    return decoded


def reconstruct(
    x: Tensor, top: Tensor | None, routes: Routing, value_Bk: Tensor, children: Children,
    D: Tensor, b_dec: Tensor | None, G: Tensor, Up: Tensor | None,
) -> Decoded:  # fmt: skip
    """As `naive.reconstruct`."""
    if top is None:
        top = decode(routes, value_Bk, D)
        top = top if b_dec is None else top + b_dec
    x_hat = top + decode_children(children.indices, children.value, G, Up)
    return Decoded(x_hat, top, (x - x_hat).square().sum(1), (x - top).square().sum(1))


def composes(pairs: int, P: int, C: int, s: int) -> bool:
    """Whether all atoms of width d, [P, C, d], are made first, instead of passing through the subspaces.

    They are then no larger than the projectors, and cost no more than the pairs' way through the subspaces.
    """
    return s >= C and pairs >= P * C


class _Linear(torch.autograd.Function):
    """x [B, d], W [P, d], b [P] or None -> [B, P]."""

    @staticmethod
    def forward(ctx: Any, x_Bd: Tensor, weight_Pd: Tensor, bias_P: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_Bd, weight_Pd)
        return torch.nn.functional.linear(x_Bd, weight_Pd, bias_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_Bd, weight_Pd = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if torch.count_nonzero(grad_BP) > SPARSE * grad_BP.numel():
            grad_x, grad_weight = grad_BP @ weight_Pd if of_x else None, grad_BP.T @ x_Bd if of_weight else None
        else:
            index_BP = torch.arange(len(weight_Pd), device=x_Bd.device).expand_as(grad_BP)
            pairs = _pairs(index_BP, grad_BP)
            grad_x = _sum(weight_Pd, *pairs, len(x_Bd)) if of_x else None
            grad_weight = _outer(x_Bd, *pairs, len(weight_Pd)) if of_weight else None
        return grad_x, grad_weight, grad_BP.sum(0) if of_bias else None


class _Dot(torch.autograd.Function):
    """x [B, d], W [P m, d], parents [B, k] -> products with the m weights of every parent, [B, k m]."""

    @staticmethod
    def forward(ctx: Any, x_Bd: Tensor, weight_Rd: Tensor, parent_Bk: Tensor, m: int) -> Tensor:
        index_Bn = (parent_Bk.unsqueeze(2) * m + torch.arange(m, device=parent_Bk.device)).flatten(1)
        ctx.save_for_backward(x_Bd, weight_Rd, index_Bn)
        return _dot(x_Bd, weight_Rd, index_Bn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Bn: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_Bd, weight_Rd, index_Bn = ctx.saved_tensors
        pairs = _pairs(index_Bn, grad_Bn)
        grad_x = _sum(weight_Rd, *pairs, len(x_Bd)) if ctx.needs_input_grad[0] else None
        return grad_x, _outer(x_Bd, *pairs, len(weight_Rd)) if ctx.needs_input_grad[1] else None, None, None


class _Sum(torch.autograd.Function):
    """W [R, d], index [B, n], value [B, n] -> [B, d]."""

    @staticmethod
    def forward(ctx: Any, weight_Rd: Tensor, index_Bn: Tensor, value_Bn: Tensor) -> Tensor:
        ctx.save_for_backward(weight_Rd, index_Bn, value_Bn)
        if index_Bn.numel() == 0:
            return weight_Rd.new_zeros(len(index_Bn), weight_Rd.shape[1])
        return embedding_bag(index_Bn, weight_Rd, mode="sum", per_sample_weights=value_Bn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Bd: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight_Rd, index_Bn, value_Bn = ctx.saved_tensors
        grad_Bd = grad_Bd.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = _outer(grad_Bd, *_pairs(index_Bn, value_Bn), len(weight_Rd))
        return grad_weight, None, _dot(grad_Bd, weight_Rd, index_Bn) if ctx.needs_input_grad[2] else None


def _dot(x_Bd: Tensor, weight_Rd: Tensor, index_Bn: Tensor) -> Tensor:
    """The product that embedding_bag's gradient takes for its weights of samples; as such it has no name in public."""
    B, n = index_Bn.shape
    if index_Bn.numel() == 0:
        return x_Bd.new_zeros(B, n)
    row_of_pair = torch.arange(B, device=index_Bn.device).repeat_interleave(n)
    first = torch.arange(0, B * n, n, device=index_Bn.device)
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dots: Tensor = dot(x_Bd.contiguous(), weight_Rd, index_Bn.flatten(), first, row_of_pair, 0)
    return dots.view(B, n)


def _pairs(index_Bn: Tensor, value_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, weight and value of the pairs whose value is not 0, by row: [M] each. Most children are not chosen."""
    row_M, slot_M = value_Bn.nonzero(as_tuple=True)
    return row_M, index_Bn[row_M, slot_M], value_Bn[row_M, slot_M]


def _sum(weight_Rd: Tensor, row_M: Tensor, index_M: Tensor, value_M: Tensor, B: int) -> Tensor:
    """Sum of value * weight over the pairs of every row, which are in the rows' order: [B, d]."""
    count_B = torch.bincount(row_M, minlength=B)
    return embedding_bag(index_M, weight_Rd, count_B.cumsum(0) - count_B, mode="sum", per_sample_weights=value_M)


def _outer(x_Bd: Tensor, row_M: Tensor, index_M: Tensor, value_M: Tensor, R: int) -> Tensor:
    """Sum of value * x over the pairs of every weight: [R, d]."""
    order_M = torch.argsort(index_M, stable=True)
    count_R = torch.bincount(index_M, minlength=R)
    first_R = count_R.cumsum(0) - count_R
    return embedding_bag(row_M[order_M], x_Bd, first_R, mode="sum", per_sample_weights=value_M[order_M])
