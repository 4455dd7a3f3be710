"""Codes whose number differs from row to row (docs/method.md section 1).

Shapes: B rows, P latents, k' slots of a row.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def pack(logits_BP: Tensor, keep_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The kept logits of every row: indices [B, k'] and values [B, k'], largest first.

    k' is the largest row's number, at least 1. Slots that a row does not need have value 0 and other indices.
    """
    slots = max(1, int(keep_BP.sum(1).max())) if len(keep_BP) else 1
    index_Bk = torch.topk(logits_BP.detach().masked_fill(~keep_BP, -torch.inf), slots, dim=1).indices
    return index_Bk, torch.where(keep_BP.gather(1, index_Bk), logits_BP.gather(1, index_Bk), 0.0)


def largest_of_batch(score_Bn: Tensor, most: int, wanted: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mask [B, n] of the `most` largest scores of the batch that are above 0, and the smallest one (0: all are).

    wanted: only that many of them, rounded; it may be a tensor, as nothing waits for its value.
    """
    kept = torch.topk(score_Bn.flatten(), min(most, score_Bn.numel()), sorted=wanted is not None)
    value_n = kept.values
    if wanted is not None:
        value_n = torch.where(first_slots(len(value_n), wanted, value_n.device), value_n, torch.inf)
    used_n = (value_n > 0) & (value_n < torch.inf)
    keep_N = torch.zeros_like(score_Bn, dtype=torch.bool).flatten().scatter(0, kept.indices, used_n)
    smallest = value_n.min().clamp_min(0) if value_n.numel() else score_Bn.new_zeros(())
    return keep_N.view_as(score_Bn), smallest


def first_slots(n: int, wanted: float | Tensor, device: torch.device) -> Tensor:
    """Mask [n] of the first `wanted` (rounded) of n slots."""
    return torch.arange(n, device=device) + 0.5 <= wanted


@torch.no_grad()
def running_mean_(mean: Tensor, batches: Tensor, value: Tensor, decay: float) -> None:
    """Take one batch's value into the running mean, in place; the first batches weigh alike. `batches` counts them."""
    batches += 1
    mean.lerp_(value, (1 / batches).clamp_min(1 - decay).to(value))


def level_for_l0(scores: Callable[[], Iterable[Tensor]], target_l0: float) -> float:
    """The level above which the scores, batches [B, P], number `target_l0` per row on average; -inf: all of them.

    Exact: only each batch's largest scores are kept, more of them if those turn out to be too few.
    """
    spare = 4.0
    while True:
        kept, rows, cut = [], 0, -math.inf
        for score_BP in scores():
            rows += len(score_BP)
            n = min(score_BP.numel(), math.ceil(spare * target_l0 * len(score_BP)))
            kept.append(torch.topk(score_BP.flatten(), n, sorted=False).values)
            if n < score_BP.numel():
                cut = max(cut, kept[-1].min().item())
        top = torch.cat(kept)
        wanted = round(target_l0 * rows)
        level = torch.topk(top, wanted + 1, sorted=False).values.min().item() if wanted < len(top) else -math.inf
        if level >= cut:
            return level
        spare *= 4
