"""What the routed operations compute, in plain PyTorch: every gathered row is written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import UNIT_ROW_EPS, Children, Decoded, Routed, Routing, Rows


def enter(
    h: Tensor, normalize: str, mean_d: Tensor, scale: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Rows, Tensor | None]:
    """Normalised rows x [B, d], x - b_dec as products read it, and the norms [B] that `unit_row` divides by, or None.

    x = (h - mean) / scale (`rms`), h / (|h| + 1e-6) (`unit_row`) or h (`none`), in the type of mean.
    """
    x, norm_B = h.to(mean_d.dtype), None
    if normalize == "unit_row":
        norm_B = x.norm(dim=1) + UNIT_ROW_EPS
        x = x / norm_B[:, None]
    elif normalize == "rms":
        x = (x - mean_d) / scale
    return x, Rows(x if b_dec is None else x - b_dec), norm_B


def linear(rows: Rows, weight_Pd: Tensor, bias_P: Tensor | None) -> Tensor:
    """Logits x W^T + b: [B, P]."""
    return torch.nn.functional.linear(rows.values, weight_Pd, bias_P)


def route(
    rows: Rows,
    E: Tensor,
    b_E: Tensor | None,
    k: int,
    *,
    bias: Tensor | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
    threshold: Tensor | None = None,
    sum_codes: bool = False,
) -> Routed:
    """The k parents of every row with the largest E x + b_E, largest first.

    bias [P]: added for the choice alone, where a logit is above 0; noise: a function of the logits, likewise. With a
    threshold parents are chosen by their codes, which are the logits from there up and 0 below it: among equal ones the
    lowest numbers first. sum_codes: ask for `code_sum`, of those codes, or else of the logits above 0.
    """
    return chosen(linear(rows, E, b_E), k, bias=bias, noise=noise, threshold=threshold, sum_codes=sum_codes)


def chosen(
    logits_BP: Tensor, k: int, *, bias: Any = None, noise: Any = None, threshold: Any = None, sum_codes: bool = False
) -> Routed:
    """`route` from the logits on."""
    codes_BP = logits_BP
    if sum_codes or threshold is not None:
        codes_BP = torch.where(logits_BP >= (0.0 if threshold is None else threshold), logits_BP, 0.0)
    choice_BP = (logits_BP if threshold is None else codes_BP).detach()
    if bias is not None or noise is not None:
        choice_BP = choice_BP + added(logits_BP.detach(), bias, noise)
    index_Bk = torch.topk(choice_BP, k, dim=1).indices if threshold is None else largest(choice_BP, k)
    code_sum = codes_BP.sum(1) if sum_codes else None
    return Routed(index_Bk, logits_BP.gather(1, index_Bk), logits_BP.detach(), code_sum)


def added(logits_BP: Tensor, bias: Tensor | None, noise: Callable[[Tensor], Tensor] | None) -> Tensor:
    """What is added for the choice alone: [B, P]."""
    if bias is None:
        assert noise is not None
        return noise(logits_BP)
    biased_BP = torch.where(logits_BP > 0, bias, 0.0)
    return biased_BP if noise is None else noise(logits_BP) + biased_BP


def largest(value_BN: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest entries of every row, largest first; among equal ones the lowest index first."""
    value_Bk, index_Bk = torch.topk(value_BN, k, dim=1)  # promises nothing about equal ones
    tied_B = (value_BN >= value_Bk[:, -1:]).sum(1) > k
    tied_B |= (value_Bk[:, 1:] == value_Bk[:, :-1]).any(1)
    if bool(tied_B.any()):
        index_Bk[tied_B] = torch.sort(value_BN[tied_B], dim=1, descending=True, stable=True).indices[:, :k]
    return index_Bk


def decode(routes: Routing, value_Bk: Tensor, D: Tensor) -> Tensor:
    """What the parents write, sum over k of value * D[index]: [B, d]."""
    return (value_Bk.unsqueeze(2) * D[routes.parent_Bk]).sum(1)


def encode_children(
    rows: Rows, routes: Routing, F: Tensor, b_F: Tensor | None = None, Down: Tensor | None = None
) -> Tensor:
    """Pre-activations of every routed parent's children, q = F_p x + b_F,p or F_p Down_p x + b_F,p: [B, k, C].

    Without Down F is [P, C, d], else [P, C, s] with Down [P, s, d]. 0 in slots that are not in use.
    """
    parent_Bk = routes.parent_Bk
    if Down is None:
        pre_BkC = torch.einsum("bd,bkcd->bkc", rows.values, F[parent_Bk])
    else:
        subspace_Bks = torch.einsum("bd,bksd->bks", rows.values, Down[parent_Bk])
        pre_BkC = torch.einsum("bks,bkcs->bkc", subspace_Bks, F[parent_Bk])
    if b_F is not None:
        pre_BkC = pre_BkC + b_F[parent_Bk]
    return pre_BkC if routes.used_Bk is None else torch.where(routes.used_Bk.unsqueeze(2), pre_BkC, 0.0)


def decode_children(index_BK: Tensor, value_BK: Tensor, G: Tensor, Up: Tensor | None = None) -> Tensor:
    """What children write, by their numbers p*C + j: sum of value * G_pj, or of value * Up_p^T G_pj: [B, d]."""
    atoms_BKs = G.flatten(0, 1)[index_BK]
    if Up is not None:
        atoms_BKs = torch.einsum("bks,bksd->bkd", atoms_BKs, Up[index_BK // G.shape[1]])
    return (value_BK.unsqueeze(2) * atoms_BKs).sum(1)


def reconstruct(
    x: Tensor, top: Tensor | None, routes: Routing, value_Bk: Tensor, children: Children,
    D: Tensor, b_dec: Tensor | None, G: Tensor, Up: Tensor | None,
) -> Decoded:  # fmt: skip
    """x_hat = top + what the children write, and both errors. top [B, d]: b_dec and the parents; None: made here.

    value [B, k]: the parents' codes.
    """
    if top is None:
        top = decode(routes, value_Bk, D)
        top = top if b_dec is None else top + b_dec
    x_hat = top + decode_children(children.indices, children.value, G, Up)
    return Decoded(x_hat, top, squared_error(x, x_hat), squared_error(x, top))


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Each row's squared error: [B]."""
    return (x - x_hat).square().sum(1)
