"""The terms of the training objective (docs/method.md section 2).

Shapes: B rows, d width, P parents, k active parents, C children, s subspace width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..config import HSAEConfig
from ..ops.magnitude import CHILD_SLOPE, child_code, parent_code
from .codes import Dead, ModelOutput

WARMED_UP = ("l1_parent", "l1_child", "biorth_router", "biorth_child", "gram")  # penalties that penalty_warmup scales
JAX_EPS = 1e-6


def reconstruction_error(x_Bd: Tensor, x_hat_Bd: Tensor, reduction: str) -> Tensor:
    """Mean over rows of the squared error summed over d (`sum`), or averaged over d (`mean`)."""
    return _mean_error(ops.squared_error(x_Bd, x_hat_Bd), x_Bd.shape[1], reduction)


def _mean_error(error_B: Tensor, width: int, reduction: str) -> Tensor:
    return error_B.mean() / width if reduction == "mean" else error_B.mean()


class _Gram(torch.autograd.Function):
    """X^T X over the last two dimensions; autograd takes a product for each factor, and they are one."""

    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        return X.mT @ X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        gradient: Tensor = X @ (grad + grad.mT)
        return gradient


def _gram_product(E: Tensor, D: Tensor) -> Tensor:
    """<E^T E, D^T D> = |E D^T|_F^2, summed over leading dimensions."""
    return (_Gram.apply(E) * _Gram.apply(D)).sum()


def biorth_identity(E: Tensor, D: Tensor) -> Tensor:
    """|E D^T - I|_F^2 over the last two dimensions [n, m], summed over leading ones, in O(n m min(n, m)).

    For n > m the n x n product is never built: |E D^T|_F^2 = <E^T E, D^T D>, and the trace of E D^T is the sum of E*D.
    """
    n, m = E.shape[-2:]
    if n <= m:
        eye = torch.eye(n, dtype=E.dtype, device=E.device)
        return (_long_product(E, D) - eye).square().sum()
    return _gram_product(E, D) - 2 * (E * D).sum() + E.numel() // m


def _long_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T over the last dimension, [..., n, n]; a long one is summed in parts, which keeps a GPU busy."""
    n, m = a.shape[-2:]
    parts = math.gcd(m, 64) if m >= 16 * n and a.is_cuda else 1
    a, b = (x.unflatten(-1, (parts, m // parts)).transpose(-3, -2) for x in (a, b))
    return (a @ b.mT).sum(-3)


def biorth_offdiag(E: Tensor, D: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of E D^T with unit rows, over the last two dimensions and all leading ones."""
    n, m = E.shape[-2:]
    if n == 1:
        return E.new_zeros(())
    E, D = torch.nn.functional.normalize(E, dim=-1), torch.nn.functional.normalize(D, dim=-1)
    diagonal = (E * D).sum(-1).square().sum()
    total = (E @ D.mT).square().sum() if n <= m else _gram_product(E, D)
    return (total - diagonal) / (E.numel() // (n * m) * (n * n - n))


def biorth_jax(E: Tensor, D: Tensor, precision: ops.Precision = "float32") -> Tensor:
    """|M - 1 diag(M)^T|_F / (P^2 - P) with M_ij = D_i . E_j of unit rows [P, d]: the published code's penalty.

    It subtracts the diagonal from every *row* of M, which is a slip (`biorth_offdiag` is what was meant). With
    m_j = M_jj and the column sums 1^T M = E (sum_i D_i) the square is |M|^2 - 2 sum_j m_j (1^T M)_j + P |m|^2, so M
    is never built for P > d.
    """
    P, d = E.shape
    if P == 1:
        return E.new_zeros(())
    if ops.uses_kernels(E, D) and d < P:
        return ops.biorth_jax(E, D, JAX_EPS, precision)
    E, D = (rows / (rows.norm(dim=1, keepdim=True) + JAX_EPS) for rows in (E, D))
    total = (D @ E.T).square().sum() if d >= P else _gram_product(D, E)
    diagonal_P, column_P = (E * D).sum(1), E @ D.sum(0)
    squared = total - 2 * (diagonal_P * column_P).sum() + P * diagonal_P.square().sum()
    return squared.clamp_min(torch.finfo(E.dtype).tiny).sqrt() / (P * P - P)


def causal_orthogonality(D: Tensor, Up: Tensor | None, G: Tensor, sigma: Tensor | None, form: str) -> Tensor:
    """Mean over children of the squared causal inner product of a parent's row and its child's atom.

    `atom`: <D_p, A_pj> in the residual metric Sigma (None = Euclidean); no [P, C, d] tensor is built.
    `literal`: <D_p, A_pj - D_p>, and `sigma` is then expected to hold the metric of that form, Sigma^-1.
    """
    metric_D = D if sigma is None else D @ sigma
    in_subspace = metric_D if Up is None else torch.einsum("psd,pd->ps", Up, metric_D)
    inner_PC = torch.einsum("pcs,ps->pc", G, in_subspace)
    if form == "literal":
        inner_PC = inner_PC - (D * metric_D).sum(1, keepdim=True)
    return inner_PC.square().mean()


def aux_parent(output: ModelOutput, D: Tensor, dead_P: Tensor, k: int, reduction: str) -> Tensor:
    """Error of rebuilding what x_hat leaves of x from the k dead parents with the largest logits; 0 if none is dead.

    Dead parents get a gradient although the router never chooses them (Gao et al., arXiv 2406.04093, section A.2).
    """
    error_Bd = (output.x - output.x_hat).detach()
    dead_BP = output.router_logits.masked_fill(~dead_P, -torch.inf)
    logit_Bk, index_Bk = torch.topk(dead_BP, min(k, dead_BP.shape[1]), dim=1)
    rebuilt_Bd = ops.weighted_row_sum(D, index_Bk, torch.relu(logit_Bk))
    return reconstruction_error(error_Bd, rebuilt_Bd, reduction) * dead_P.any()


def aux_child(output: ModelOutput, Up: Tensor | None, G: Tensor, dead_R: Tensor, k: int, reduction: str) -> Tensor:
    """The same from dead children of the row's active parents; 0 if no child is dead."""
    codes, C = output.codes, G.shape[1]
    flat_BkC = codes.parent_index.unsqueeze(2) * C + torch.arange(C, device=G.device)
    open_BkC = dead_R[flat_BkC] & (codes.parent_value > 0).unsqueeze(2)
    score_BN = output.child_pre.masked_fill(~open_BkC, -torch.inf).flatten(1)
    pre_BK, place_BK = torch.topk(score_BN, min(k, score_BN.shape[1]), dim=1)
    error_Bd = (output.x - output.x_hat).detach()
    rebuilt_Bd = ops.decode_children(flat_BkC.flatten(1).gather(1, place_BK), torch.relu(pre_BK), Up, G)
    return reconstruction_error(error_Bd, rebuilt_Bd, reduction) * dead_R.any()


def l1(codes: Tensor) -> Tensor:
    """Summed sizes of a row's codes, mean over rows."""
    return codes.abs().flatten(1).sum(1).mean()


def loss_terms(
    output: ModelOutput,
    config: HSAEConfig,
    parameters: dict[str, Tensor],
    metric: Tensor | None,
    threshold: Tensor | None = None,
    dead: Dead | None = None,
    precision: ops.Precision = "float32",
) -> dict[str, tuple[float, Tensor]]:
    """Every term that is on, by name: (weight, value). The loss is the sum of weight * value.

    parameters: the model's tensors by name; metric: of the causal penalty [d, d], None = Euclidean; threshold: of
    leaky_offset codes; dead: who takes part in the auxiliary terms, None = nobody; precision: of the matrix products
    on a GPU.
    """
    codes, reduction = output.codes, config.recon_reduction
    size = "relu" if config.magnitude == "binary" else config.magnitude
    every_code = config.l1_scope == "all"
    if output.errors is None:
        recon, recon_top = (reconstruction_error(output.x, y, reduction) for y in (output.x_hat, output.x_hat_top))
    else:
        recon, recon_top = (_mean_error(error_B, output.x.shape[1], reduction) for error_B in output.errors)
    terms = {"recon": (1.0, recon)}
    if config.top_level_beta > 0:
        terms["recon_top"] = (config.top_level_beta, recon_top)
    if config.l1_parent > 0:
        if every_code and output.parent_sum is not None:
            value = output.parent_sum.mean()
        else:
            value = l1(parent_code(output.router_logits, size, threshold) if every_code else codes.parent_value)
        terms["l1_parent"] = (config.l1_parent, value)
    if config.l1_child > 0:
        if every_code and ops.uses_kernels(output.child_pre):
            slope = 0.0 if threshold is None else CHILD_SLOPE
            value = ops.code_size(output.child_pre.flatten(1), threshold, slope).mean()
        else:
            value = l1(child_code(output.child_pre, size, threshold) if every_code else codes.child_value)
        terms["l1_child"] = (config.l1_child, value)
    if config.biorth_lambda > 0 and config.use_offdiag_biorth == "jax":
        terms["biorth_router"] = (config.biorth_lambda, biorth_jax(parameters["E"], parameters["D"], precision))
    elif config.biorth_lambda > 0:
        form: Callable[[Tensor, Tensor], Tensor] = biorth_offdiag if config.use_offdiag_biorth else biorth_identity
        terms["biorth_router"] = (config.biorth_lambda, form(parameters["E"], parameters["D"]))
        like = config.child_encoder == config.child_decoder  # else F reads the row itself, and compares with atoms
        write = parameters["G"] if like else parameters["G"] @ parameters["Up"]
        terms["biorth_child"] = (config.biorth_lambda, form(parameters["F"], write))
    if config.gram_lambda > 0:
        terms["gram"] = (config.gram_lambda, biorth_offdiag(parameters["D"], parameters["D"]))
    if config.causal_ortho_lambda > 0:
        D, Up, G = parameters["D"], parameters.get("Up"), parameters["G"]
        value = causal_orthogonality(D, Up, G, metric, config.causal_orth_form)
        terms["causal_orth"] = (config.causal_ortho_lambda, value)
    if config.aux_weight > 0 and dead is not None:
        D, Up, G = parameters["D"], parameters.get("Up"), parameters["G"]
        of_parents = aux_parent(output, D, dead.parents, config.aux_k_parent, reduction)
        of_children = aux_child(output, Up, G, dead.children, config.aux_k_child, reduction)
        terms |= {"aux_parent": (config.aux_weight, of_parents), "aux_child": (config.aux_weight, of_children)}
    return terms
