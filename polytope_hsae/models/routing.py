"""Choosing k of P parents, with a gradient through the choice when it is asked for (docs/method.md section 1)."""

import torch
from torch import Tensor

from .. import ops

RARE = 0.3  # rows of a batch: a smallest load below it moves its bias as fast as if it were that (docs/LOG.md)


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


def balanced_scores(value_Bn: Tensor, balance_m: Tensor | None, index_Bn: Tensor) -> Tensor:
    """What codes compete with: themselves, or where they are above 0 themselves plus the bias of the choice.

    A score is not above 0 where the code is not. value [B, n] with a bias [m], or [B, n, C] with one of [m, C].
    """
    if balance_m is None:
        return value_Bn
    return torch.where(value_Bn > 0, value_Bn + balance_m[index_Bn], value_Bn)


@torch.no_grad()
def move_balance_(
    balance_m: Tensor,
    load_m: Tensor,
    value_Bn: Tensor,
    rate: float,
    least: float,
    limit: Tensor | None = None,
    within_m: Tensor | None = None,
) -> Tensor:
    """Move the biases of the choice, in place, by the rows of a batch in which each parent, or child, is on.

    Above `limit` rows a bias falls by `rate`; below that it rises again, up to 0. Below `least` times the mean it rises
    by `rate` for every row that is lacking, at most one, and above that it falls again, down to 0: so in the mean over
    batches even what is on in less than one row of a batch gets its share. Where that share is below 0.3 rows both are
    faster, by 0.3 / share: else what is rare would rise too slowly. It rises to the mean of the batch's codes value
    [B, n] at most, with which a code just above 0 is chosen.

    Returns by how much each would have risen beyond that, [m], for the encoder's bias: mostly what is above 0 nowhere.
    There the share is `within` [m] at most, the rows of this batch that a child can ask of its parent's.
    """
    mean = load_m.mean()
    highest, wanted = value_Bn.sum() / load_m.sum().clamp_min(1), least * mean
    speed = rate * (RARE / wanted.clamp(1e-6, RARE))
    step_m = speed * (wanted - load_m).clamp(-1, 1)
    risen_m = balance_m + step_m
    up_m = risen_m.clamp_min(0).clamp_max(highest)
    if limit is None:
        balance_m.copy_(up_m)
    else:
        down_m = (balance_m + rate * (limit - load_m).sign()).clamp_max(0)
        balance_m.copy_(torch.where((balance_m < 0) | (load_m > limit), down_m, up_m))
    if within_m is not None:
        step_m = speed * (torch.minimum(wanted, within_m) - load_m).clamp(-1, 1)
    return torch.minimum(step_m, risen_m - highest).clamp_min(0)
