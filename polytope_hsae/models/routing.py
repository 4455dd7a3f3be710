"""Choosing k of P parents, with a gradient through the choice when it is asked for (docs/method.md section 1)."""

import torch
from torch import Tensor

from .. import ops


def routing_noise(logits_BP: Tensor, temperature: float, kind: str, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise times the temperature, and for `relative` times the row's standard deviation too: [B, P]."""
    exponential = torch.empty_like(logits_BP, requires_grad=False).exponential_(generator=generator)
    gumbel = -torch.log(exponential)
    if kind == "relative":
        gumbel = gumbel * logits_BP.detach().std(dim=1, keepdim=True, correction=0)
    return gumbel * temperature


def straight_through_gate(logits_BP: Tensor, index_Bk: Tensor, temperature: float) -> Tensor:
    """A gate of value 1 on the selected parents whose gradient is that of the soft mask: [B, k].

    The soft mask is softmax(r / temperature) renormalised over the selected, that is, the softmax of the selected
    logits alone. With k = 1 that is constant, so the softmax over all parents stands in, not renormalised.
    """
    scaled_BP = logits_BP / temperature
    if index_Bk.shape[1] == 1:
        soft_Bk = torch.softmax(scaled_BP, dim=1).gather(1, index_Bk)
    else:
        soft_Bk = torch.softmax(scaled_BP.gather(1, index_Bk), dim=1)
    return 1.0 + (soft_Bk - soft_Bk.detach())


def topk_lowest(value_BP: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest entries of every row; among equal ones the lowest index comes first.

    `torch.topk` promises nothing about ties. They matter where many entries are exactly 0.
    """
    if ops.uses_kernels(value_BP):  # the kernel does it without waiting for the GPU
        return ops.largest(value_BP, k)
    value_Bk, index_Bk = torch.topk(value_BP, k, dim=1)
    tied_B = (value_BP >= value_Bk[:, -1:]).sum(1) > k
    tied_B |= (value_Bk[:, 1:] == value_Bk[:, :-1]).any(1)
    if bool(tied_B.any()):
        index_Bk[tied_B] = torch.sort(value_BP[tied_B], dim=1, descending=True, stable=True).indices[:, :k]
    return index_Bk
