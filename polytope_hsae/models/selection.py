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
