"""The terms of the training objective (docs/method.md section 2).

Shapes: B rows, d width, P parents, k active parents, C children, s subspace width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import HSAEConfig
from .codes import ModelOutput

PENALTIES = ("l1_parent", "l1_child", "biorth_router", "biorth_child", "causal_orth")


def reconstruction_error(x_Bd: Tensor, x_hat_Bd: Tensor, reduction: str) -> Tensor:
    """Mean over rows of the squared error summed over d (`sum`), or averaged over d (`mean`)."""
    error = (x_Bd - x_hat_Bd).square().sum(1).mean()
    return error / x_Bd.shape[1] if reduction == "mean" else error


def biorth_identity(E: Tensor, D: Tensor) -> Tensor:
    """|E D^T - I|_F^2 over the last two dimensions [n, m], summed over leading ones, in O(n m min(n, m)).

    For n > m the n x n product is never built: |E D^T|_F^2 = <E^T E, D^T D>, and the trace of E D^T is the sum of E*D.
    """
    n, m = E.shape[-2:]
    if n <= m:
        eye = torch.eye(n, dtype=E.dtype, device=E.device)
        return (E @ D.mT - eye).square().sum()
    grams = ((E.mT @ E) * (D.mT @ D)).sum()
    return grams - 2 * (E * D).sum() + E.numel() // m


def biorth_offdiag(E: Tensor, D: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of E D^T with unit rows, over the last two dimensions and all leading ones."""
    n, m = E.shape[-2:]
    if n == 1:
        return E.new_zeros(())
    E, D = torch.nn.functional.normalize(E, dim=-1), torch.nn.functional.normalize(D, dim=-1)
    diagonal = (E * D).sum(-1).square().sum()
    total = (E @ D.mT).square().sum() if n <= m else ((E.mT @ E) * (D.mT @ D)).sum()
    return (total - diagonal) / (E.numel() // (n * m) * (n * n - n))


def causal_orthogonality(D: Tensor, Up: Tensor, G: Tensor, sigma: Tensor | None, form: str) -> Tensor:
    """Mean over children of the squared causal inner product of a parent's row and its child's atom.

    `atom`: <D_p, A_pj> in the residual metric Sigma (None = Euclidean); no [P, C, d] tensor is built.
    `literal`: <D_p, A_pj - D_p>, and `sigma` is then expected to hold the metric of that form, Sigma^-1.
    """
    metric_D = D if sigma is None else D @ sigma
    inner_PC = torch.einsum("pcs,ps->pc", G, torch.einsum("psd,pd->ps", Up, metric_D))
    if form == "literal":
        inner_PC = inner_PC - (D * metric_D).sum(1, keepdim=True)
    return inner_PC.square().mean()


def loss_terms(
    output: ModelOutput,
    config: HSAEConfig,
    parameters: dict[str, Tensor],
    metric: Tensor | None,
) -> dict[str, tuple[float, Tensor]]:
    """Every term that is on, by name: (weight, value). The loss is the sum of weight * value.

    parameters: the model's tensors by name; metric: of the causal penalty [d, d], None = Euclidean.
    """
    terms = {"recon": (1.0, reconstruction_error(output.x, output.x_hat, config.recon_reduction))}
    if config.top_level_beta > 0:
        top = reconstruction_error(output.x, output.x_hat_top, config.recon_reduction)
        terms["recon_top"] = (config.top_level_beta, top)
    if config.l1_parent > 0:
        covered = output.codes.parent_value if config.l1_scope == "selected" else torch.relu(output.router_logits)
        terms["l1_parent"] = (config.l1_parent, covered.sum(1).mean())
    if config.l1_child > 0:
        covered = output.codes.child_value if config.l1_scope == "selected" else torch.relu(output.child_pre).flatten(1)
        terms["l1_child"] = (config.l1_child, covered.sum(1).mean())
    if config.biorth_lambda > 0:
        form: Callable[[Tensor, Tensor], Tensor] = biorth_offdiag if config.use_offdiag_biorth else biorth_identity
        terms["biorth_router"] = (config.biorth_lambda, form(parameters["E"], parameters["D"]))
        terms["biorth_child"] = (config.biorth_lambda, form(parameters["F"], parameters["G"]))
    if config.causal_ortho_lambda > 0:
        value = causal_orthogonality(
            parameters["D"], parameters["Up"], parameters["G"], metric, config.causal_orth_form
        )
        terms["causal_orth"] = (config.causal_ortho_lambda, value)
    return terms
