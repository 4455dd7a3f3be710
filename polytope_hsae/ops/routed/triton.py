"""The routed operations as kernels, with their gradients.

Shapes: B rows, k slots per row, N = B k pairs, P parents, m weight rows per parent, d width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dense import DTYPE, dense, product
from . import UNIT_ROW_EPS, Children, Decoded, Routed, Routing, Rows, naive
from .decoding import decode as decode_and_compare
from .plan import Plan, make_plan
from .products import dot, dot_and_outer, outer, sum_rows
from .rows import enter as enter_rows
from .rows import reconstruct_grad, squared_error_grad
from .rows import squared_error as squared_errors
from .select import select, spread

GROUPED_FROM = 2048  # parents from which on a router gradient without a dense part is taken grouped by parent


def enter(
    h: Tensor, normalize: str, mean_d: Tensor, scale: Tensor, b_dec: Tensor | None, *, precision: str
) -> tuple[Tensor, Rows, Tensor | None]:
    """As `naive.enter`."""
    if h.requires_grad:
        return naive.enter(h, normalize, mean_d, scale, b_dec)
    if h.is_cuda and (there := h.get_device()) != (here := torch.cuda.current_device()):
        raise ValueError(f"device: found a tensor on cuda:{there}, allowed: cuda:{here}, or torch.cuda.set_device")
    bias = None if b_dec is None else b_dec.detach()
    x, values, norm_B = enter_rows(h, normalize, mean_d, scale, UNIT_ROW_EPS, bias, DTYPE[precision])
    return x, Rows(values, b_dec), norm_B


def linear(rows: Rows, weight_Pd: Tensor, bias_P: Tensor | None) -> Tensor:
    """As `naive.linear`."""
    x_Bd = rows.values.to(weight_Pd.dtype)
    if rows.origin is not None:
        x_Bd = x_Bd + (rows.origin.detach() - rows.origin)
    return torch.nn.functional.linear(x_Bd, weight_Pd, bias_P)


def route(rows: Rows, E: Tensor, b_E: Tensor | None, k: int, *, precision: str, **choice: Any) -> Routed:
    """As `naive.route`."""
    bias, noise, wants_sum = choice.get("bias"), choice.get("noise"), choice.get("sum_codes", False)
    plain = bias is None and noise is None
    more = None if plain else lambda logits_BP: naive.added(logits_BP, bias, noise)
    found = Route.apply(*rows, E, b_E, k, choice.get("threshold"), more, wants_sum, precision)
    index, logit, code_sum, logits = found
    return Routed(index, logit, logits, code_sum if wants_sum else None)


def decode(routes: Routing, value_Bk: Tensor, D: Tensor, *, precision: str) -> Tensor:
    """As `naive.decode`."""
    if value_Bk.numel() == 0:
        return naive.decode(routes, value_Bk, D)
    summed: Tensor = RoutedSum.apply(value_Bk.reshape(-1, 1), D[:, None], _plan(routes), value_Bk.shape[1], precision)
    return summed


def encode_children(
    rows: Rows, routes: Routing, F: Tensor, b_F: Tensor | None = None, Down: Tensor | None = None, *, precision: str
) -> Tensor:
    """As `naive.encode_children`."""
    if routes.parent_Bk.numel() == 0:
        return naive.encode_children(rows, routes, F, b_F, Down)
    (B, k), plan = routes.parent_Bk.shape, _plan(routes)
    if Down is None:
        pre: Tensor = RoutedDot.apply(*rows, F, b_F, plan, k, precision)
    else:
        subspace = RoutedDot.apply(*rows, Down, None, plan, k, precision)
        pre = RoutedDot.apply(subspace, None, F, b_F, plan, 1, precision)
    return pre.view(B, k, -1)


def decode_children(
    index_BK: Tensor, value_BK: Tensor, G: Tensor, Up: Tensor | None = None, *, precision: str
) -> Tensor:
    """As `naive.decode_children`: every child is a slot of its own."""
    if value_BK.numel() == 0:
        return naive.decode_children(index_BK, value_BK, G, Up)
    C = G.shape[1]
    plan = make_plan(index_BK // C, len(G))
    codes_Nc = torch.nn.functional.one_hot(index_BK % C, C) * value_BK.unsqueeze(2)
    decoded: Tensor = RoutedSum.apply(
        *_in_subspace(codes_Nc.view(-1, C), G, Up, plan, precision), plan, plan.k, precision
    )
    return decoded


def reconstruct(
    x: Tensor, top: Tensor | None, routes: Routing, value_Bk: Tensor, children: Children,
    D: Tensor, b_dec: Tensor | None, G: Tensor, Up: Tensor | None, *, precision: str,
) -> Decoded:  # fmt: skip
    """As `naive.reconstruct`; the errors are taken while a row's columns are in registers."""
    if value_Bk.numel() == 0:
        return naive.reconstruct(x, top, routes, value_Bk, children, D, b_dec, G, Up)
    plan, C = _plan(routes), G.shape[1]
    dense_BN = x.new_zeros(len(x), value_Bk.shape[1] * C).scatter(1, children.place, children.value)
    subspace, written = _in_subspace(dense_BN.view(-1, C), G, Up, plan, precision)
    parents = (value_Bk.reshape(-1, 1), D, b_dec) if top is None else (None, None, None)
    x_hat, made, error, error_top = Reconstruct.apply(x, top, *parents, subspace, written, plan, precision)
    return Decoded(x_hat, made if top is None else top, error, error_top)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """As `naive.squared_error`."""
    if x.requires_grad:
        return naive.squared_error(x, x_hat)
    error: Tensor = SquaredError.apply(x, x_hat)
    return error


def _plan(routes: Routing) -> Plan:
    """The pairs grouped by parent, which all operations of a pass share."""
    if routes.plan is None:
        routes.plan = make_plan(routes.parent_Bk, routes.n_parents, routes.used_Bk)
    plan: Plan = routes.plan
    return plan


def _in_subspace(codes_Nc: Tensor, G: Tensor, Up: Tensor | None, plan: Plan, precision: str) -> tuple[Tensor, Tensor]:
    """Every pair's children summed in its parent's subspace, and that subspace's rows; without Up these are G's."""
    return (codes_Nc, G) if Up is None else (RoutedSum.apply(codes_Nc, G, plan, 1, precision), Up)


def _ones(like: Tensor) -> Tensor:
    """One row of width 1, which all pairs share: their outer product with it is their sum."""
    return like.new_ones(1, 1)


class RoutedDot(torch.autograd.Function):
    """rows [N / divisor, d], weight [P, m, d], bias [P, m] or None -> W[p] row + bias[p] of every pair, [N, m].

    origin [d] or None: as in `Rows`. Its gradient is taken from the sums of each parent's pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, origin: Tensor | None, weight_Pmd: Tensor, bias_Pm: Tensor | None,
        plan: Plan, divisor: int, precision: str,
    ) -> Tensor:  # fmt: skip
        rows, weight_Pmd = rows.to(DTYPE[precision]), weight_Pmd.to(DTYPE[precision])
        ctx.save_for_backward(rows, weight_Pmd)
        ctx.plan, ctx.divisor, ctx.precision = plan, divisor, precision
        return dot(rows, weight_Pmd, plan, divisor, precision, bias_Pm)

    @staticmethod
    def backward(ctx: Any, grad_Nm: Tensor) -> tuple[Any, ...]:
        rows, weight_Pmd = ctx.saved_tensors
        options = ctx.plan, ctx.divisor, ctx.precision
        need, of_bias, of_origin = ctx.needs_input_grad, None, None
        if need[1] or need[3]:
            summed_Pm = outer(grad_Nm, _ones(grad_Nm), ctx.plan, len(grad_Nm), "float32")[:, :, 0]
            of_bias = summed_Pm if need[3] else None
        if need[1]:
            of_origin = -(summed_Pm.reshape(1, -1).to(weight_Pmd.dtype) @ weight_Pmd.flatten(0, 1))[0].float()
        of_rows = sum_rows(grad_Nm, weight_Pmd, *options) if need[0] else None
        of_weight = outer(grad_Nm, rows, *options) if need[2] else None
        return of_rows, of_origin, of_weight, of_bias, None, None, None


class RoutedSum(torch.autograd.Function):
    """coefficients [N, m], weight [P, m, d] -> sum of W[p]^T c over the pairs of every row, [N / divisor, d]."""

    @staticmethod
    def forward(ctx: Any, coef_Nm: Tensor, weight_Pmd: Tensor, plan: Plan, divisor: int, precision: str) -> Tensor:
        weight_Pmd = weight_Pmd.to(DTYPE[precision])
        ctx.save_for_backward(coef_Nm, weight_Pmd)
        ctx.plan, ctx.divisor, ctx.precision = plan, divisor, precision
        return sum_rows(coef_Nm, weight_Pmd, plan, divisor, precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        coef_Nm, weight_Pmd = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        of_coef, of_weight = _sum_gradients(grad, weight_Pmd, coef_Nm, need, ctx.plan, ctx.divisor, ctx.precision)
        return of_coef, of_weight, None, None, None


def _sum_gradients(
    grad: Tensor, weight_Pmd: Tensor, coef_Nm: Tensor, need: Sequence[bool], plan: Plan, divisor: int, precision: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `sum_rows` with respect to its coefficients and its weights, each where it is needed."""
    grad, options = grad.to(DTYPE[precision]), (plan, divisor, precision)
    if all(need):
        return dot_and_outer(grad, weight_Pmd, coef_Nm, *options)
    of_coef = dot(grad, weight_Pmd, *options) if need[0] else None
    return of_coef, outer(coef_Nm, grad, *options) if need[1] else None


class Route(torch.autograd.Function):
    """x [B, d], E [P, d], b_E [P] or None -> indices, logits of the chosen [B, k], summed codes [B], all logits [B, P].

    origin [d] or None: as in `Rows`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Tensor | None,
        E: Tensor,
        b_E: Tensor | None,
        k: int,
        threshold: Tensor | None,
        noise: Callable[[Tensor], Tensor] | None,
        want_sum: bool,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, E = x.to(DTYPE[precision]), E.to(DTYPE[precision])
        with dense(precision):
            logits = torch.nn.functional.linear(x, E, None if b_E is None else b_E.to(E.dtype))
        code_sum = None
        if noise is None or want_sum:
            index, value, code_sum = select(logits, k, threshold, want_sum)
        if noise is not None:
            code = logits.float() if threshold is None else torch.where(logits >= threshold, logits, 0.0).float()
            index, _, _ = select(code + noise(logits.float()), k, None, False)
            value = logits.gather(1, index).float()
        ctx.save_for_backward(x, E, logits, index, threshold)
        ctx.precision = precision
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index, logits)
        return index, value, value.new_zeros(len(x)) if code_sum is None else code_sum, logits

    @staticmethod
    def backward(ctx: Any, _: Any, grad_value: Tensor | None, grad_sum: Tensor | None, __: Any) -> tuple[Any, ...]:
        x, E, logits, index, threshold = ctx.saved_tensors
        need_x, need_origin, need_E, need_b = ctx.needs_input_grad[:4]
        chosen_only = need_E and not (need_x or need_b or need_origin) and E.shape[0] >= GROUPED_FROM
        if grad_sum is None and grad_value is not None and chosen_only:
            plan = make_plan(index, E.shape[0])
            of_chosen = outer(grad_value.reshape(-1, 1), x, plan, plan.k, ctx.precision)[:, 0]
            return None, None, of_chosen, None, None, None, None, None, None
        of_logits = torch.zeros_like(logits) if grad_sum is None else spread(logits, grad_sum, threshold)
        if grad_value is not None:
            of_logits.scatter_add_(1, index, grad_value.to(of_logits.dtype))
        with dense(ctx.precision):
            of_x = of_logits @ E if need_x else None
            of_weight = product(of_logits.T, x) if need_E else None
        of_b = of_origin = None
        if need_b or need_origin:
            summed_P = of_logits.sum(0, dtype=torch.float32)
            of_b = summed_P if need_b else None
            of_origin = -(summed_P.to(E.dtype) @ E).float() if need_origin else None
        return of_x, of_origin, of_weight, of_b, None, None, None, None, None


class SquaredError(torch.autograd.Function):
    """x, x_hat [B, d] -> each row's squared error [B]; x gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        ctx.save_for_backward(x, x_hat)
        return squared_errors(x, x_hat)

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[None, Tensor]:
        x, x_hat = ctx.saved_tensors
        return None, squared_error_grad(x, x_hat, grad_B)


class Reconstruct(torch.autograd.Function):
    """x [B, d], top [B, d] or (parents' codes [N, 1], D, b_dec [d] or None), the children's sums in each subspace
    [N, s], Up -> x_hat, x_hat_top [B, d] and their rows' squared errors [B].

    top: what b_dec and the parents make. The gradients of both errors are written in the precision of the products
    that read them, and nowhere else; only who differentiates x, x_hat or x_hat_top themselves has them in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, top: Tensor | None, value_N1: Tensor | None, D: Tensor | None, bias: Tensor | None,
        subspace_Ns: Tensor, Up: Tensor, plan: Plan, precision: str,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        x, Up = x.contiguous(), Up.to(DTYPE[precision])
        D = None if D is None else D.to(DTYPE[precision])[:, None]
        given = None if top is None else top.contiguous()
        x_hat, made, error, error_top = decode_and_compare(
            x, given, value_N1, D, subspace_Ns, Up, bias, plan, precision
        )
        ctx.save_for_backward(x, value_N1, D, subspace_Ns, Up, made, x_hat)
        ctx.plan, ctx.precision = plan, precision
        ctx.set_materialize_grads(False)
        return x_hat, made if top is None else None, error, error_top

    @staticmethod
    def backward(
        ctx: Any, of_x_hat: Tensor | None, of_made: Tensor | None, grad_B: Tensor | None, grad_top_B: Tensor | None
    ) -> tuple[Any, ...]:
        x, value_N1, D, subspace_Ns, Up, top, x_hat = ctx.saved_tensors
        plan, precision, need = ctx.plan, ctx.precision, ctx.needs_input_grad
        more = need[0] or of_x_hat is not None or of_made is not None
        dtype = torch.float32 if more else DTYPE[precision]
        none_B = x.new_zeros(len(x)) if grad_B is None or grad_top_B is None else x
        grad_B, grad_top_B = none_B if grad_B is None else grad_B, none_B if grad_top_B is None else grad_top_B
        both_dtype = torch.float32 if need[1] else dtype
        of_hat, of_both = reconstruct_grad(x, top, x_hat, grad_B, grad_top_B, dtype, both_dtype)
        of_x = -of_both if need[0] else None
        if of_x_hat is not None:
            of_hat, of_both = of_hat + of_x_hat, of_both + of_x_hat
        if of_made is not None:
            of_both = of_both + of_made
        of_value = of_D = None
        if D is not None:
            of_value, of_D = _sum_gradients(of_both, D, value_N1, need[2:4], plan, plan.k, precision)
        of_subspace, of_Up = _sum_gradients(of_hat, Up, subspace_Ns, need[5:7], plan, plan.k, precision)
        of_bias = of_both.sum(0, dtype=torch.float32) if need[4] else None
        of_D = None if of_D is None else of_D[:, 0]
        return of_x, of_both if need[1] else None, of_value, of_D, of_bias, of_subspace, of_Up, None, None
