"""How many codes a row has: the same number for every row, or a budget that the rows of a batch share.

Shapes: B rows, P latents, k and K slots for a row's parents and children, n for either, C children per parent.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..ops import Children
from .codes import Codes
from .router import Parents

if TYPE_CHECKING:
    from .hsae import HierarchicalSAE

SHARE_STEP = 1e-3  # by which a step moves the parents' share of a joint budget
THRESHOLD_DECAY = 0.99  # memory of a batch budget's running mean of its smallest code, per batch


class PerRow(nn.Module):
    """Every row has the same budget: all of its slots are used."""

    of_batch = False
    smallest: Tensor  # the last batch's smallest kept score, under a batch's budget

    def keep(self, value_Bn: Tensor, score_Bn: Tensor, per_row: float | Tensor) -> Tensor:
        """The codes [B, n] as they are."""
        return value_Bn


class PerBatch(PerRow):
    """A budget that the rows of a batch share. In training the batch's largest positive scores are kept, in eval mode
    those above `threshold`: the running mean of the smallest kept score, until it is calibrated.

    A row has a fixed number of slots, more than it has codes on average. So no shape depends on the data, and nothing
    waits for a GPU. A row never has more codes than slots.
    """

    of_batch = True
    threshold: Tensor
    batches: Tensor  # that went into it

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def keep(self, value_Bn: Tensor, score_Bn: Tensor, per_row: float | Tensor) -> Tensor:
        """The codes [B, n] with 0 in the slots that are not kept: `per_row` on average in training, else by threshold.

        per_row may be a tensor on the GPU: nothing waits for its value.
        """
        score_Bn = score_Bn.detach()
        if not self.training:
            return torch.where(score_Bn > self.threshold, value_Bn, 0.0)
        wanted = len(value_Bn) * per_row
        if isinstance(wanted, Tensor):
            kept = torch.topk(score_Bn.flatten(), score_Bn.numel())  # all, in order
            first_n = torch.arange(score_Bn.numel(), device=score_Bn.device) + 0.5 <= wanted  # rounded
            largest_n = torch.where(first_n, kept.values, torch.inf)
        else:
            kept = torch.topk(score_Bn.flatten(), min(round(wanted), score_Bn.numel()), sorted=False)
            largest_n = kept.values
        if not len(largest_n):
            self.smallest = torch.zeros_like(self.threshold)
            return torch.zeros_like(value_Bn)
        used_n = (largest_n > 0) & (largest_n < torch.inf)
        keep_N = torch.zeros_like(score_Bn, dtype=torch.bool).flatten().scatter(0, kept.indices, used_n)
        self.smallest = largest_n.min().clamp_min(0)
        self.batches += 1
        weight = (1 / self.batches).clamp_min(1 - THRESHOLD_DECAY)
        self.threshold.lerp_(self.smallest, weight.to(self.smallest))
        return torch.where(keep_N.view_as(score_Bn), value_Bn, 0.0)

    @torch.no_grad()
    def calibrate(self, scores: Callable[[], Iterable[Tensor]], per_row: float) -> None:
        """Set the threshold above which a row has `per_row` scores on average; 0 where too few are positive."""
        self.threshold.zero_()  # so that scores of a model in eval mode are those of all its slots
        self.threshold.fill_(max(0.0, level_for_l0(scores, per_row)))


class Sparsity(nn.Module):
    """Which parents and children of a row keep their code."""

    share: Tensor | None  # of the parents in a joint budget
    gap: Tensor  # smallest kept score of a parent minus that of a child, summed since the last step

    def __init__(self, config: HSAEConfig):
        super().__init__()
        self.mean_parents, self.mean_children, self.total = config.topk_parent, config.active_children, config.total_l0
        self.child_slots = config.child_slots
        self.per_parent = config.topk_child if config.child_budget == "per_parent" else None
        self.parent_budget: PerRow = PerRow() if config.parent_budget == "per_row" else PerBatch()
        self.child_budget: PerRow = PerBatch() if config.child_budget == "batch" else PerRow()
        share = torch.tensor(config.topk_parent / config.total_l0)
        self.register_buffer("share", share if config.parent_budget == "joint" else None)
        self.register_buffer("gap", torch.zeros(()), persistent=False)

    def keep_parents(self, parents: Parents, bias: Tensor | None) -> Parents:
        """The parents with code 0 where the budget leaves them out. bias [P]: the selection biases."""
        wanted = self.mean_parents if self.share is None else self.share * self.total
        scores_Bk = scores(parents.value, None if bias is None else bias[parents.indices])
        value_Bk = self.parent_budget.keep(parents.value, scores_Bk, wanted)
        return parents._replace(value=value_Bk, used=value_Bk.detach() > 0 if self.parent_budget.of_batch else None)

    def keep_children(
        self, pre_BkC: Tensor, parents: Parents, code: Callable[[Tensor], Tensor], bias: Tensor | None
    ) -> Children:
        """The children that the budget keeps; a child's code is 0 where its parent's is not above 0.

        code: from pre-activation to code. bias [P, C]: the selection biases.
        """
        C = pre_BkC.shape[2]
        choice_BkC = scores(pre_BkC.detach(), None if bias is None else bias[parents.indices])
        open_Bk = parents.value.detach() > 0
        if self.per_parent:
            one = self.per_parent == 1  # which is found faster as a maximum
            best_Bkc = choice_BkC.argmax(2, keepdim=True) if one else choice_BkC.topk(self.per_parent).indices
            place_BK = (best_Bkc + C * torch.arange(pre_BkC.shape[1], device=pre_BkC.device)[:, None]).flatten(1)
            index_BK = (parents.indices.unsqueeze(2) * C + best_Bkc).flatten(1)
            value_BK = (code(pre_BkC.gather(2, best_Bkc)) * open_Bk.unsqueeze(2)).flatten(1)
        else:
            choice_BN = choice_BkC.masked_fill(~open_Bk.unsqueeze(2), -torch.inf).flatten(1)
            place_BK = choice_BN.topk(self.child_slots).indices
            slot_BK = place_BK // C
            index_BK = parents.indices.gather(1, slot_BK) * C + place_BK % C
            value_BK = code(pre_BkC.flatten(1).gather(1, place_BK)) * open_Bk.gather(1, slot_BK)
        if self.child_budget.of_batch:  # so not per parent
            wanted = self.mean_children if self.share is None else (1 - self.share) * self.total
            value_BK = self.child_budget.keep(value_BK, choice_BN.gather(1, place_BK), wanted)
        if self.share is not None and self.training:
            self.gap += self.parent_budget.smallest - self.child_budget.smallest
        return Children(index_BK, place_BK, value_BK)

    @torch.no_grad()
    def before_step(self) -> None:
        """Move the parents' share of a joint budget until parents and children have the same smallest kept score."""
        if self.share is None:
            return
        start = self.mean_parents / self.total
        self.share += SHARE_STEP * self.gap.sign()
        self.share.clamp_(start / 2, (1 + start) / 2)
        self.gap.zero_()


def scores(value: Tensor, bias: Tensor | None) -> Tensor:
    """What codes are ranked by: the code, plus its selection bias where it is above 0."""
    return value if bias is None else torch.where(value > 0, value + bias, value)


@torch.no_grad()
def calibrate(model: "HierarchicalSAE", batches: Iterable[Tensor], target_l0: float) -> None:
    """Set the thresholds of a model's batch budgets so that raw rows [B, d] have `target_l0` codes on average.

    Parents get their share of them, k / (k + K_c) unless that was learned; children get what the parents leave.
    """
    sparsity, balance = model.sparsity, model.balance

    def codes() -> Iterator[Codes]:
        return (model.encode(h_Bd.to(model.data_mean)) for h_Bd in batches)

    if isinstance(sparsity.parent_budget, PerBatch):
        share = model.config.topk_parent / model.config.total_l0
        wanted = target_l0 * (share if sparsity.share is None else sparsity.share.item())
        bias = balance.parent_bias
        sparsity.parent_budget.calibrate(
            lambda: (scores(c.parent_value, None if bias is None else bias[c.parent_index]) for c in codes()), wanted
        )
    if isinstance(sparsity.child_budget, PerBatch):
        active = torch.cat([(c.parent_value > 0).sum(1) for c in codes()]).double().mean().item()
        of_child = None if balance.child_bias is None else balance.child_bias.flatten()
        sparsity.child_budget.calibrate(
            lambda: (scores(c.child_value, None if of_child is None else of_child[c.child_index]) for c in codes()),
            max(0.0, target_l0 - active),
        )


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
