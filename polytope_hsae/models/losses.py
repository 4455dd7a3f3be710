"""The terms of the training objective (docs/method.md section 2).

Shapes: B rows, d width, P parents, k active parents, C children, s subspace width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import LossOverrides
from ..ops import CPU, Ops, Routing
from ..ops.orthogonality.naive import gram_product
from .codes import ModelOutput

if TYPE_CHECKING:
    from .flat import FlatSAE
    from .hsae import HierarchicalSAE

WARMED_UP = ("l1_parent", "l1_child", "biorth_router", "biorth_child", "gram")  # penalties that penalty_warmup scales


def mean_error(error_B: Tensor, width: int, reduction: str) -> Tensor:
    """Mean of rows' squared errors, summed over d (`sum`) or averaged over it (`mean`)."""
    return error_B.mean() / width if reduction == "mean" else error_B.mean()


def biorth_identity(E: Tensor, D: Tensor, ops: Ops = CPU) -> Tensor:
    """|E D^T - I|_F^2 over the last two dimensions [n, m], summed over leading ones, in O(n m min(n, m)).

    For n > m the n x n product is never built: |E D^T|_F^2 = <E^T E, D^T D>, and the trace of E D^T is the sum of E*D.
    """
    n, m = E.shape[-2:]
    if n <= m:
        eye = torch.eye(n, dtype=E.dtype, device=E.device)
        return (ops.cross(E, D) - eye).square().sum()
    return gram_product(E, D) - 2 * (E * D).sum() + E.numel() // m


def biorth_offdiag(E: Tensor, D: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of E D^T with unit rows, over the last two dimensions and all leading ones."""
    n, m = E.shape[-2:]
    if n == 1:
        return E.new_zeros(())
    E, D = torch.nn.functional.normalize(E, dim=-1), torch.nn.functional.normalize(D, dim=-1)
    diagonal = (E * D).sum(-1).square().sum()
    total = (E @ D.mT).square().sum() if n <= m else gram_product(E, D)
    return (total - diagonal) / (E.numel() // (n * m) * (n * n - n))


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


def aux_parent(model: "FlatSAE", output: ModelOutput, dead_P: Tensor) -> Tensor:
    """Error of rebuilding what x_hat leaves of x from the dead latents with the largest logits; 0 if none is dead.

    Dead latents get a gradient although they are never chosen (Gao et al., arXiv 2406.04093, section A.2).
    """
    error_Bd = (output.x - output.x_hat).detach()
    dead_BP = output.router_logits.masked_fill(~dead_P, -torch.inf)
    logit_Bk, index_Bk = torch.topk(dead_BP, min(model.config.aux_k, dead_BP.shape[1]), dim=1)
    rebuilt_Bd = model.ops.decode(Routing(index_Bk, model.n_parents), torch.relu(logit_Bk), model.D)
    error_B = model.ops.squared_error(error_Bd, rebuilt_Bd)
    return mean_error(error_B, model.width, model.config.recon_reduction) * dead_P.any()


def prefix_errors(model: "HierarchicalSAE", output: ModelOutput) -> Tensor:
    """The summed errors of rebuilding x by the first parents alone, one for each of `parent_prefixes`."""
    index, value = output.codes.parent_index, output.codes.parent_value
    routes, errors = Routing(index, model.n_parents), []
    for share in model.config.parent_prefixes:
        first = max(1, round(share * model.n_parents))
        x_hat = model.ops.decode(routes, torch.where(index < first, value, 0.0), model.D)
        x_hat = x_hat if model.b_dec is None else x_hat + model.b_dec
        errors.append(mean_error(model.ops.squared_error(output.x, x_hat), model.width, model.config.recon_reduction))
    return torch.stack(errors).sum()


def loss_terms(
    model: "HierarchicalSAE", output: ModelOutput, overrides: LossOverrides, dead_P: Tensor | None = None
) -> dict[str, tuple[float, Tensor]]:
    """Every term that is on, by name: (weight, value). The loss is the sum of weight * value.

    overrides: a stage's weights.
    """
    config = overrides.apply(model.config)
    router, children = model.router, model.child
    terms = {"recon": (1.0, mean_error(output.errors, model.width, config.recon_reduction))}
    if config.top_level_beta > 0:
        error_top = mean_error(output.errors_top, model.width, config.recon_reduction)
        terms["recon_top"] = (config.top_level_beta, error_top)
    if config.l1_parent > 0:
        terms["l1_parent"] = (config.l1_parent, router.l1(output))
    if config.l1_child > 0:
        terms["l1_child"] = (config.l1_child, children.l1(output))
    if config.biorth_lambda > 0 and config.use_offdiag_biorth == "jax":
        terms["biorth_router"] = (config.biorth_lambda, router.ops.biorth_jax(router.E, router.D))
    elif config.biorth_lambda > 0:
        for name, read, write in (("router", router.E, router.D), ("child", children.F, children.G)):
            value = (
                biorth_offdiag(read, write) if config.use_offdiag_biorth else biorth_identity(read, write, model.ops)
            )
            terms[f"biorth_{name}"] = (config.biorth_lambda, value)
    if config.gram_lambda > 0:
        terms["gram"] = (config.gram_lambda, biorth_offdiag(router.D, router.D))
    if config.causal_ortho_lambda > 0:
        metric = model.sigma_inv if config.causal_orth_form == "literal" else model.sigma
        value = causal_orthogonality(router.D, children.Up, children.G, metric, config.causal_orth_form)
        terms["causal_orth"] = (config.causal_ortho_lambda, value)
    if config.parent_prefixes and config.top_level_beta > 0:
        terms["recon_prefixes"] = (config.top_level_beta, prefix_errors(model, output))
    return terms
