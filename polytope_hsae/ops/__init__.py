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
from .magnitude import CHILD_SLOPE, child_code

Precision = Literal["bf16", "tf32", "float32"]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether operations on these tensors run as kernels.

    Raises ValueError for tensors on a GPU that is not the current one, where Triton would not launch them.
    """
    if not (HAS_TRITON and all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors)):
        return False
    here = torch.cuda.current_device()
    for tensor in tensors:
        there = tensor.get_device()
        if there != here:
            raise ValueError(f"device: found a tensor on cuda:{there}, allowed: cuda:{here}, or torch.cuda.set_device")
    return True


class Routing(NamedTuple):
    """Which parents every row meets, int64 [B, k], and what the kernels need to know about it (None on a CPU)."""

    parent_Bk: Tensor
    plan: Any
    precision: Precision


def routing(
    parent_Bk: Tensor, weight: Tensor, precision: Precision = "float32", used_Bk: Tensor | None = None
) -> Routing:
    """Prepare routed operations on weights [P, ...].

    used_Bk (bool): slots whose parent's code is above 0; kernels leave the others out, where a child's pre-activation
    then is 0.
    """
    plan = None
    if uses_kernels(weight) and parent_Bk.numel():
        from .triton.plan import make_plan

        plan = make_plan(parent_Bk, len(weight), used_Bk)
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


def gate(logit_Bk: Tensor, threshold: Tensor | None, temperature: float | Tensor) -> Tensor:
    """On a GPU: codes of k > 1 chosen parents, relu or from the threshold up, behind a straight-through gate."""
    from .triton.gate import Gate

    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, device=logit_Bk.device)
    codes: Tensor = Gate.apply(logit_Bk, threshold, temperature)
    return codes


def linear(x_Bd: Tensor, weight_Pd: Tensor, bias_P: Tensor | None) -> Tensor:
    """Logits x W^T + b [B, P], of which few are chosen: on a CPU the gradient of the others costs nothing."""
    if x_Bd.is_cuda:
        return torch.nn.functional.linear(x_Bd, weight_Pd, bias_P)
    return reference.linear(x_Bd, weight_Pd, bias_P)


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
    from .triton.functions import RoutedDot

    (B, k), plan, precision = routes.parent_Bk.shape, routes.plan, routes.precision
    if Down is None:
        pre: Tensor = RoutedDot.apply(x_Bd, F, b_F, origin, plan, k, precision)
    else:
        subspace = RoutedDot.apply(x_Bd, Down, None, origin, plan, k, precision)
        pre = RoutedDot.apply(subspace, F, b_F, None, plan, 1, precision)
    return pre.view(B, k, -1)


def decode_children(
    index_BK: Tensor,
    value_BK: Tensor,
    Up: Tensor | None,
    G: Tensor,
    routes: Routing | None = None,
    children: "Children | None" = None,
) -> Tensor:
    """Sum of value * (Up_p^T G_pj) over each row's children, flat indices p*C + j: [B, d].

    Without Up the atoms are the rows of G [P, C, d].
    With the row's routes and children, every parent's atoms are summed in its subspace first.
    """
    (B, K), C = index_BK.shape, G.shape[1]
    if not uses_kernels(value_BK, G) or B * K == 0:
        return reference.decode_children(index_BK, value_BK, Up, G)
    from .triton.functions import RoutedSum

    if routes is None or children is None:
        routes = routing(index_BK // C, G)
        dense_Nc = torch.nn.functional.one_hot(index_BK % C, C) * value_BK.unsqueeze(2)
    elif children.dense is not None:
        dense_Nc = children.dense
    else:
        dense_Nc = value_BK.new_zeros(children.pre.shape).flatten(1).scatter(1, children.place, value_BK)
    k, plan, precision = routes.parent_Bk.shape[1], routes.plan, routes.precision
    sums, rows = _in_subspace(dense_Nc.reshape(-1, C), Up, G, plan, precision)
    decoded: Tensor = RoutedSum.apply(sums, rows, plan, k, precision)
    return decoded


def _in_subspace(dense_Nc: Tensor, Up: Tensor | None, G: Tensor, plan: Any, precision: str) -> tuple[Tensor, Tensor]:
    """Every pair's children summed in its parent's subspace, and that subspace's rows; without Up these are G's."""
    from .triton.functions import RoutedSum

    if Up is None:
        return dense_Nc, G
    return RoutedSum.apply(dense_Nc, G, plan, 1, precision), Up


class Children(NamedTuple):
    """The children of B rows that were chosen, and all that were opened.

    pre [B, k, C]: pre-activations of all. place [B, K]: where in [k*C] the chosen ones stand; value [B, K]: their
    codes. dense [B, k, C] or None: the codes of all, 0 where they were not chosen, where kernels need them.
    """

    pre: Tensor
    place: Tensor
    value: Tensor
    dense: Tensor | None


def best_child(pre_BkC: Tensor, value_Bk: Tensor) -> Tensor:
    """Places in [k*C] of every parent's largest child, int64 [B, k]; the first of equal or closed ones."""
    if uses_kernels(pre_BkC, value_Bk) and pre_BkC.numel():
        from .triton.children import best_child as kernel

        return kernel(pre_BkC.detach(), value_Bk.detach())
    k, C = pre_BkC.shape[1:]
    first_Bk = pre_BkC.detach().masked_fill(value_Bk.unsqueeze(2) <= 0, -torch.inf).argmax(2)
    return first_Bk + torch.arange(0, k * C, C, device=pre_BkC.device)


def best_children(pre_BkC: Tensor, value_Bk: Tensor, n: int) -> Tensor:
    """Places in [k*C] of the n largest children of all opened parents of a row together, int64 [B, n]."""
    score_BN = pre_BkC.detach().masked_fill(value_Bk.unsqueeze(2) <= 0, -torch.inf).flatten(1)
    return largest(score_BN, n) if uses_kernels(score_BN) else torch.topk(score_BN, n, dim=1).indices


def largest(value_BP: Tensor, k: int) -> Tensor:
    """On a GPU: indices [B, k] of the k largest entries of every row, the lowest index first among equal ones."""
    from .triton.select import select

    return select(value_BP, k, None, False)[0]


def keep_children(
    pre_BkC: Tensor, place_BK: Tensor, value_Bk: Tensor, magnitude: str, threshold: Tensor | None
) -> Children:
    """The codes of the children at the given places; 0 where the parent's code is not above 0."""
    if uses_kernels(pre_BkC, value_Bk) and magnitude != "binary":
        from .triton.children import KeepChildren

        slope = CHILD_SLOPE if magnitude == "leaky_offset" else 0.0
        value_BK, dense_BkC = KeepChildren.apply(pre_BkC, place_BK, value_Bk.detach(), threshold, slope)
        return Children(pre_BkC, place_BK, value_BK, dense_BkC)
    value_BK = child_code(pre_BkC.flatten(1).gather(1, place_BK), magnitude, threshold)
    is_open_BK = value_Bk.gather(1, place_BK // pre_BkC.shape[2]) > 0
    return Children(pre_BkC, place_BK, value_BK * is_open_BK, None)


def with_codes(children: Children, value_BK: Tensor) -> Children:
    """The same children with other codes."""
    pre, place, _, dense = children
    if dense is not None:
        dense = torch.zeros_like(pre).flatten(1).scatter(1, place, value_BK).view_as(pre)
    return Children(pre, place, value_BK, dense)


class Reconstruction(NamedTuple):
    """x_hat, x_hat_top [B, d]; errors: their rows' squared errors [B], if taken; these then carry all gradients."""

    x_hat: Tensor
    x_hat_top: Tensor
    errors: tuple[Tensor, Tensor] | None


def reconstruct(
    x_Bd: Tensor, top_Bd: Tensor | None, routes: Routing, value_Bk: Tensor, index_BK: Tensor, children: Children,
    D: Tensor, Up: Tensor | None, G: Tensor, b_dec: Tensor | None, compare: bool,
) -> Reconstruction:  # fmt: skip
    """Decode and, with `compare` on a GPU, take the errors in the same pass. index_BK: the children, as p*C + j.

    top_Bd: what b_dec and the parents make, where that is known already.
    """
    C, dense = G.shape[1], children.dense
    if compare and routes.plan is not None and dense is not None:
        from .triton.functions import Reconstruct

        plan, precision = routes.plan, routes.precision
        sums, rows = _in_subspace(dense.view(-1, C), Up, G, plan, precision)
        parents = (value_Bk.reshape(-1, 1), D, b_dec) if top_Bd is None else (None, None, None)
        x_hat, x_hat_top, *errors = Reconstruct.apply(x_Bd, top_Bd, *parents, sums, rows, plan, precision)
        return Reconstruction(x_hat, x_hat_top, (errors[0], errors[1]))
    if top_Bd is None:
        top_Bd = weighted_row_sum(D, routes.parent_Bk, value_Bk, routes)
        top_Bd = top_Bd if b_dec is None else top_Bd + b_dec
    x_hat = top_Bd + decode_children(index_BK, children.value, Up, G, routes, children)
    return Reconstruction(x_hat, top_Bd, None)


def code_size(pre_Bn: Tensor, threshold: Tensor | None, slope: float) -> Tensor:
    """Each row's summed |code| [B] on a GPU: q from the threshold (None: 0) up counts whole, below it slope * q."""
    from .triton.children import CodeSize

    size: Tensor = CodeSize.apply(pre_Bn, threshold, slope)
    return size


def enter(
    h_Bd: Tensor, normalize: str, mean_d: Tensor, scale: Tensor, eps: float, b_dec: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor, Tensor | None]:
    """On a GPU: normalised rows x [B, d], x - b_dec as the matrix products read it, and unit_row's divisors [B].

    No gradient: neither to h nor to b_dec.
    """
    from .triton.rows import enter as kernel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return kernel(h_Bd, normalize, mean_d, scale, eps, None if b_dec is None else b_dec.detach(), dtype)


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
