"""Operations of the models, each under one name: plain PyTorch (`reference`) or, on a GPU, Triton kernels.

The reference says what is computed. On a CUDA device, float32 tensors go to the kernels where Triton is installed.
`precision` is that of the matrix products alone (bf16, tf32 or float32); everything is held and summed in float32.

Shapes: B rows, k slots per row, P parents, C children, s subspace width, d width, K children per row.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import reference

Precision = Literal["bf16", "tf32", "float32"]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether operations on these tensors run as kernels."""
    return HAS_TRITON and all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors)


class Routing(NamedTuple):
    """Which parents every row meets, int64 [B, k], and what the kernels need to know about it (None on a CPU)."""

    parent_Bk: Tensor
    plan: Any
    precision: Precision


def routing(parent_Bk: Tensor, weight: Tensor, precision: Precision = "float32") -> Routing:
    """Prepare routed operations on weights [P, ...]."""
    plan = None
    if uses_kernels(weight) and parent_Bk.numel():
        from .triton.plan import make_plan

        plan = make_plan(parent_Bk, len(weight))
    return Routing(parent_Bk, plan, precision)


class Chosen(NamedTuple):
    """parent, logit [B, k] of the chosen ones; code_sum [B] or None; logits [B, P], without a gradient."""

    parent: Tensor
    logit: Tensor
    code_sum: Tensor | None
    logits: Tensor


def route(
    x: Tensor,
    E: Tensor,
    b_E: Tensor | None,
    origin: Tensor | None,
    k: int,
    *,
    threshold: Tensor | None,
    noise: Callable[[Tensor], Tensor] | None,
    sum_codes: bool,
    precision: Precision,
) -> Chosen:
    """The router on a GPU: x [B, d] -> the k largest of E x + b_E (+ noise) of every row, lowest index first.

    With a threshold the choice is among codes (the logit from the threshold up, 0 below). code_sum: the sum of all of
    a row's codes. Gradients reach the chosen logits and code_sum. origin [d]: what was subtracted from the rows, where
    that is learned: it gets its gradient here, so that no row needs one.
    """
    from .triton.functions import Route

    index, logit, code_sum, logits = Route.apply(x, E, b_E, origin, k, threshold, noise, sum_codes, precision)
    return Chosen(index, logit, code_sum if sum_codes else None, logits)


def weighted_row_sum(weight_Pd: Tensor, index_Bk: Tensor, value_Bk: Tensor, routes: Routing | None = None) -> Tensor:
    """Sum over k of value * weight[index]: [B, d], without a [B, k, d] tensor."""
    routes = routes or routing(index_Bk, weight_Pd)
    if routes.plan is None:
        return reference.weighted_row_sum(weight_Pd, index_Bk, value_Bk)
    from .triton.functions import RoutedSum

    k = index_Bk.shape[1]
    summed: Tensor = RoutedSum.apply(value_Bk.reshape(-1, 1), weight_Pd[:, None], routes.plan, k, routes.precision)
    return summed


def encode_children(
    x_Bd: Tensor, routes: Routing, Down: Tensor | None, F: Tensor, b_F: Tensor | None, origin: Tensor | None = None
) -> Tensor:
    """Child pre-activations q = F_p Down_p x + b_F,p of every routed parent: [B, k, C]; no b_F counts as 0.

    Without Down children read the row itself: F is [P, C, d].
    origin: as in `route`; on a CPU None.
    """
    if routes.plan is None:
        return reference.encode_children(x_Bd, routes.parent_Bk, Down, F, b_F)
    from .triton.functions import RoutedBias, RoutedDot

    (B, k), plan, precision = routes.parent_Bk.shape, routes.plan, routes.precision
    if Down is None:
        pre = RoutedDot.apply(x_Bd, F, origin, plan, k, precision)
    else:
        subspace = RoutedDot.apply(x_Bd, Down, origin, plan, k, precision)
        pre = RoutedDot.apply(subspace, F, None, plan, 1, precision)
    if b_F is not None:
        pre = pre + RoutedBias.apply(b_F, plan)
    return pre.view(B, k, -1)


def decode_children(
    index_BK: Tensor,
    value_BK: Tensor,
    Up: Tensor | None,
    G: Tensor,
    routes: Routing | None = None,
    place_BK: Tensor | None = None,
) -> Tensor:
    """Sum of value * (Up_p^T G_pj) over each row's children, flat indices p*C + j: [B, d].

    Without Up the atoms are the rows of G [P, C, d].
    With the row's routes, place_BK says where in [k*C] each child stands; every parent's atoms are then summed in its
    subspace first.
    """
    (B, K), C = index_BK.shape, G.shape[1]
    if Up is None:
        atoms_Rd = G.flatten(0, 1)
        direct = routing(index_BK, atoms_Rd, routes.precision if routes else "float32")
        return weighted_row_sum(atoms_Rd, index_BK, value_BK, direct)
    if not uses_kernels(value_BK, Up) or B * K == 0:
        return reference.decode_children(index_BK, value_BK, Up, G)
    from .triton.functions import RoutedSum

    if routes is None or place_BK is None:
        routes = routing(index_BK // C, Up)
        place_BK = torch.arange(K, device=index_BK.device) * C + index_BK % C
    k, plan, precision = routes.parent_Bk.shape[1], routes.plan, routes.precision
    codes_Nc = value_BK.new_zeros(B, k * C).scatter(1, place_BK, value_BK).view(B * k, C)
    subspace_Ns = RoutedSum.apply(codes_Nc, G, plan, 1, precision)
    decoded: Tensor = RoutedSum.apply(subspace_Ns, Up, plan, k, precision)
    return decoded


class Reconstruction(NamedTuple):
    """x_hat, x_hat_top [B, d], without gradients, and their rows' squared errors [B]."""

    x_hat: Tensor
    x_hat_top: Tensor
    error: Tensor
    error_top: Tensor


def reconstruct(
    x_Bd: Tensor, routes: Routing, value_Bk: Tensor, place_BK: Tensor, child_BK: Tensor,
    D: Tensor, Up: Tensor | None, G: Tensor, b_dec: Tensor | None,
) -> Reconstruction:  # fmt: skip
    """Decode and compare in one pass, on a GPU: gradients flow from the two errors to codes and weights only.

    place_BK: as in `decode_children`; child_BK: the children's codes.
    """
    from .triton.functions import Reconstruct, RoutedSum

    (B, k), C, plan, precision = value_Bk.shape, G.shape[1], routes.plan, routes.precision
    codes_Nc = child_BK.new_zeros(B, k * C).scatter(1, place_BK, child_BK).view(B * k, C)
    if Up is None:  # every child is a direction of its parent's subspace
        subspace_Ns, Up = codes_Nc, G
    else:
        subspace_Ns = RoutedSum.apply(codes_Nc, G, plan, 1, precision)
    return Reconstruction(*Reconstruct.apply(x_Bd, value_Bk.reshape(-1, 1), D, subspace_Ns, Up, b_dec, plan, precision))


def best_child(pre_BkC: Tensor, value_Bk: Tensor) -> Tensor:
    """The largest child of every opened parent, int64 [B, k, 1]: the first of equal ones; 0 where value <= 0."""
    if not uses_kernels(pre_BkC, value_Bk) or pre_BkC.numel() == 0:
        return pre_BkC.detach().masked_fill(value_Bk.unsqueeze(2) <= 0, -torch.inf).argmax(dim=2, keepdim=True)
    from .triton.children import best_child as kernel

    return kernel(pre_BkC.detach().flatten(0, 1), value_Bk.detach().flatten()).view(*value_Bk.shape, 1)


def code_size(pre_Bn: Tensor, threshold: Tensor | None, slope: float) -> Tensor:
    """Each row's summed |code| [B] on a GPU: q from the threshold (None: 0) up counts whole, below it slope * q."""
    from .triton.children import CodeSize

    size: Tensor = CodeSize.apply(pre_Bn, threshold, slope)
    return size


def divide_by_norm(rows_Bd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows divided by their norm + eps [B, d], and those divisors [B]."""
    if not uses_kernels(rows_Bd) or rows_Bd.requires_grad:
        norms_B = rows_Bd.norm(dim=1) + eps
        return rows_Bd / norms_B[:, None], norms_B
    from .triton import rows

    return rows.divide_by_norm(rows_Bd, eps)


def operand(rows_Bd: Tensor, precision: Precision) -> Tensor:
    """The rows as the matrix products read them, converted once for all of them; where no kernels run, as they are."""
    if precision == "bf16" and uses_kernels(rows_Bd) and not rows_Bd.requires_grad:
        return rows_Bd.bfloat16()
    return rows_Bd


def squared_error(x_Bd: Tensor, x_hat_Bd: Tensor) -> Tensor:
    """Each row's squared error [B]; x gets no gradient on a GPU."""
    if not uses_kernels(x_Bd, x_hat_Bd) or x_Bd.requires_grad:
        return (x_Bd - x_hat_Bd).square().sum(1)
    from .triton.functions import SquaredError

    error: Tensor = SquaredError.apply(x_Bd, x_hat_Bd)
    return error


def biorth_jax(E: Tensor, D: Tensor, eps: float, precision: Precision) -> Tensor:
    """The published code's orthogonality penalty on a GPU, from the d x d Gram matrices of E, D [P, d] alone."""
    from .triton.biorth import BiorthJax

    value: Tensor = BiorthJax.apply(E, D, eps, precision)
    return value


def project_out_(grad: Tensor, normal: Tensor) -> bool:
    """Remove from the rows of grad [..., d] their components along `normal`, in place; False: no kernel, not done."""
    if not uses_kernels(grad, normal) or not (grad.is_contiguous() and normal.is_contiguous()):
        return False
    from .triton import rows

    rows.project_out_(grad, normal)
    return True


def normalize_rows_(weight: Tensor) -> bool:
    """Divide rows [..., d] by their norms, in place; False: no kernel, not done."""
    if not uses_kernels(weight) or not weight.is_contiguous():
        return False
    from .triton import rows

    rows.normalize_rows_(weight)
    return True


def adam_(p: Tensor, m: Tensor, v: Tensor, scale: Tensor, hyper_4: Tensor, *, b1: float, b2: float, eps: float) -> None:
    """One step of AdamW on p with the gradient p.grad * scale (NaN: nothing changes), on a GPU.

    hyper_4: rate, 1 - rate * weight decay, 1 / (1 - b1^t), 1 / sqrt(1 - b2^t).
    """
    from .triton import adam

    assert p.grad is not None
    adam.adam_(p, p.grad.contiguous(), m, v, scale, hyper_4, b1, b2, eps)
