"""How many codes a row has: the same number for every row, or one number for a batch, which its rows share.

Shapes: B rows, n slots per row.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .codes import Codes
from .selection import first_slots, largest_of_batch, level_for_l0, running_mean_

if TYPE_CHECKING:
    from .hsae import HierarchicalSAE


class Budget(nn.Module):
    """Which of every row's slots are in use; slots come largest code first.

    For a batch's budget a row has more slots than codes on average, always the same number of them: so no shape depends
    on the data, and nothing has to wait for a GPU. What a row would have beyond its slots is cut.

    Args:
        per_row: codes per row, on average where rows share them.
        of_batch: whether rows share them. In training the B * per_row largest positive codes of the batch are in use,
            afterwards those above `threshold`: the running mean of the smallest code in use, until it is calibrated.
            With scores, these decide instead.
        spare: slots per row of a batch's budget, as a multiple of per_row.
        decay: memory of the running mean, per batch.
        start: codes per row at the start of training, where they are annealed.
    """

    threshold: Tensor
    batches: Tensor
    smallest: Tensor  # code in use of the last batch

    def __init__(self, per_row: int, of_batch: bool, spare: float, decay: float, start: int | None):
        super().__init__()
        self.start = per_row if start is None else start
        self.per_row, self.of_batch, self.spare, self.decay = per_row, of_batch, spare, decay
        if of_batch:
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def slots(self, most: int, annealing: bool) -> int:
        """Slots of a row, at most `most`; while k is annealed as many as for the largest k."""
        per_row = max(self.per_row, self.start) if annealing and self.training else self.per_row
        return min(most, math.ceil(self.spare * per_row) if self.of_batch else per_row)

    def at(self, progress: float | Tensor | None) -> float | Tensor:
        """Codes per row: from `start` (progress 0) to `per_row` (progress 1, or None)."""
        return self.per_row if progress is None else self.start + (self.per_row - self.start) * progress

    def keep(self, code_Bn: Tensor, now: float | Tensor | None = None, score_Bn: Tensor | None = None) -> Tensor:
        """The codes [B, n], largest first in each row, with 0 in the slots that are not in use.

        now: codes per row in training, where it is not `per_row`; nothing waits for its value. score_Bn: what decides
        instead of the code under a batch's budget; a slot whose score is not above 0 is not in use.
        """
        score_Bn = code_Bn.detach() if score_Bn is None else score_Bn.detach()
        if not self.training:
            now = None
        if not self.of_batch:
            if now is None:
                return code_Bn
            return torch.where(first_slots(code_Bn.shape[1], now, code_Bn.device), code_Bn, 0.0)
        if not self.training:
            return torch.where(score_Bn > self.threshold, code_Bn, 0.0)
        B = len(code_Bn)
        if now is None:
            keep_Bn, self.smallest = largest_of_batch(score_Bn, B * self.per_row)
        else:
            keep_Bn, self.smallest = largest_of_batch(score_Bn, score_Bn.numel(), B * now)
        running_mean_(self.threshold, self.batches, self.smallest, self.decay)
        return torch.where(keep_Bn, code_Bn, 0.0)


@torch.no_grad()
def calibrate(model: "HierarchicalSAE", batches: Iterable[Tensor], target_l0: float) -> None:
    """Set the thresholds of a model's batch budgets so that raw rows [B, d] have `target_l0` codes on average.

    Parents get their share of them, k / (k + K_c) unless that was learned; children get what the parents leave.
    """

    def codes() -> Iterator[Codes]:
        return (model.encode(h_Bd.to(model.data_mean)) for h_Bd in batches)

    if model.parent_budget.of_batch:
        share = model.config.topk_parent / model.config.total_l0
        parents = target_l0 * (share if model.parent_share is None else model.parent_share.item())
        model.parent_budget.threshold.zero_()  # every positive code, up to the number of slots
        level = level_for_l0(
            lambda: (model.parent_scores(each.parent_index, each.parent_value) for each in codes()), parents
        )
        model.parent_budget.threshold.fill_(max(0.0, level))
    if model.child_budget.of_batch:
        active = torch.cat([(each.parent_value > 0).sum(1) for each in codes()]).double().mean().item()
        model.child_budget.threshold.zero_()
        level = level_for_l0(
            lambda: (model.child_scores(each.child_index, each.child_value) for each in codes()),
            max(0.0, target_l0 - active),
        )
        model.child_budget.threshold.fill_(max(0.0, level))
