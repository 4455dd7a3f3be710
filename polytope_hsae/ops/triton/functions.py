"""The kernels with their gradients.

Shapes: B rows, k slots per row, N = B k pairs, P parents, m weight rows per parent, d width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .biorth import product
from .plan import Plan, make_plan
from .routed import DTYPE, dot, outer, sum_rows
from .rows import reconstruct_, reconstruct_grad, squared_error, squared_error_grad
from .select import select, spread

GROUPED_FROM = 2048  # parents from which on a router gradient without a dense part is taken grouped by parent


def _ones(like: Tensor) -> Tensor:
    """One row of width 1, which all pairs share: their outer product with it is their sum."""
    return like.new_ones(1, 1)


class RoutedDot(torch.autograd.Function):
    """rows [N / divisor, d], weight [P, m, d] -> W[p] row of every pair, [N, m].

    origin [d] or None: what was subtracted from the rows, if it is learned. Its gradient is taken from the sums of
    each parent's pairs, without the gradient of any row.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight_Pmd: Tensor, origin: Tensor | None, plan: Plan, divisor: int, precision: str
    ) -> Tensor:
        rows, weight_Pmd = rows.to(DTYPE[precision]), weight_Pmd.to(DTYPE[precision])
        ctx.save_for_backward(rows, weight_Pmd)
        ctx.plan, ctx.divisor, ctx.precision = plan, divisor, precision
        return dot(rows, weight_Pmd, plan, divisor, precision)

    @staticmethod
    def backward(ctx: Any, grad_Nm: Tensor) -> tuple[Any, ...]:
        rows, weight_Pmd = ctx.saved_tensors
        options = ctx.plan, ctx.divisor, ctx.precision
        of_origin = None
        if ctx.needs_input_grad[2]:
            summed_Pm = outer(grad_Nm, _ones(grad_Nm), ctx.plan, len(grad_Nm), "float32")
            of_origin = -(summed_Pm.reshape(1, -1).to(weight_Pmd.dtype) @ weight_Pmd.flatten(0, 1))[0].float()
        of_rows = sum_rows(grad_Nm, weight_Pmd, *options) if ctx.needs_input_grad[0] else None
        of_weight = outer(grad_Nm, rows, *options) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, of_origin, None, None, None


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
        options = ctx.plan, ctx.divisor, ctx.precision
        grad = grad.to(DTYPE[ctx.precision])
        of_coef = dot(grad, weight_Pmd, *options) if ctx.needs_input_grad[0] else None
        of_weight = outer(coef_Nm, grad, *options) if ctx.needs_input_grad[1] else None
        return of_coef, of_weight, None, None, None


class Route(torch.autograd.Function):
    """x [B, d], E [P, d], b_E [P] or None -> indices, logits of the chosen [B, k], summed codes [B], all logits [B, P].

    origin [d] or None: what was subtracted from the rows x, if it is learned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        E: Tensor,
        b_E: Tensor | None,
        origin: Tensor | None,
        k: int,
        threshold: Tensor | None,
        noise: Callable[[Tensor], Tensor] | None,
        want_sum: bool,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, E = x.to(DTYPE[precision]), E.to(DTYPE[precision])
        logits = torch.nn.functional.linear(x, E, None if b_E is None else b_E.to(E.dtype))
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
        need_x, need_E = ctx.needs_input_grad[:2]
        need_b, need_origin = ctx.needs_input_grad[2:4]
        chosen_only = need_E and not (need_x or need_b or need_origin) and E.shape[0] >= GROUPED_FROM
        if grad_sum is None and grad_value is not None and chosen_only:
            plan = make_plan(index, E.shape[0])
            of_chosen = outer(grad_value.reshape(-1, 1), x, plan, plan.k, ctx.precision)[:, 0]
            return None, of_chosen, None, None, None, None, None, None, None
        of_logits = torch.zeros_like(logits) if grad_sum is None else spread(logits, grad_sum, threshold)
        if grad_value is not None:
            of_logits.scatter_add_(1, index, grad_value.to(of_logits.dtype))
        of_x = of_logits @ E if need_x else None
        of_weight = product(of_logits.T, x) if need_E else None
        of_b = of_origin = None
        if need_b or need_origin:
            summed_P = of_logits.sum(0, dtype=torch.float32)
            of_b = summed_P if need_b else None
            of_origin = -(summed_P.to(E.dtype) @ E).float() if need_origin else None
        return of_x, of_weight, of_b, of_origin, None, None, None, None, None


class RoutedBias(torch.autograd.Function):
    """bias [P, m] -> the bias of every pair's parent, [N, m]."""

    @staticmethod
    def forward(ctx: Any, bias_Pm: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return bias_Pm[plan.parent_Bk.flatten()]

    @staticmethod
    def backward(ctx: Any, grad_Nm: Tensor) -> tuple[Tensor, None]:
        return outer(grad_Nm, _ones(grad_Nm), ctx.plan, len(grad_Nm), "float32")[:, :, 0], None


class SquaredError(torch.autograd.Function):
    """x, x_hat [B, d] -> each row's squared error [B]; x gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        ctx.save_for_backward(x, x_hat)
        return squared_error(x, x_hat)

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[None, Tensor]:
        x, x_hat = ctx.saved_tensors
        return None, squared_error_grad(x, x_hat, grad_B)


class Reconstruct(torch.autograd.Function):
    """x [B, d], parents' codes [N, 1], D, the children's sums in each subspace [N, s], Up, b_dec [d] or None ->
    x_hat, x_hat_top [B, d] (without gradients) and their rows' squared errors [B].

    The gradients of both errors are written in the precision of the products that read them, and nowhere else.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value_N1: Tensor, D: Tensor, subspace_Ns: Tensor, Up: Tensor, bias: Tensor | None,
        plan: Plan, precision: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        x, D, Up = x.contiguous(), D.to(DTYPE[precision])[:, None], Up.to(DTYPE[precision])
        top = sum_rows(value_N1, D, plan, plan.k, precision)
        x_hat = sum_rows(subspace_Ns, Up, plan, plan.k, precision)
        error, error_top = reconstruct_(x, top, x_hat, bias)
        ctx.save_for_backward(x, value_N1, D, subspace_Ns, Up, top, x_hat)
        ctx.plan, ctx.precision = plan, precision
        ctx.mark_non_differentiable(x_hat, top)
        return x_hat, top, error, error_top

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, grad_B: Tensor, grad_top_B: Tensor) -> tuple[Any, ...]:
        x, value_N1, D, subspace_Ns, Up, top, x_hat = ctx.saved_tensors
        options = ctx.plan, ctx.plan.k, ctx.precision
        of_hat, of_both = reconstruct_grad(x, top, x_hat, grad_B, grad_top_B, DTYPE[ctx.precision])
        need = ctx.needs_input_grad
        of_value = dot(of_both, D, *options) if need[1] else None
        of_D = outer(value_N1, of_both, *options)[:, 0] if need[2] else None
        of_subspace = dot(of_hat, Up, *options) if need[3] else None
        of_Up = outer(subspace_Ns, of_hat, *options) if need[4] else None
        of_bias = of_both.sum(0, dtype=torch.float32) if need[5] else None
        return None, of_value, of_D, of_subspace, of_Up, of_bias, None, None
