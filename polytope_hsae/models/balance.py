"""Selection biases: added to logits for the choice only, they hold firing rates within limits.

See docs/method.md, section 1. Shapes: P parents, C children per parent.
"""

from collections.abc import Container

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from .children import DirectChildren
from .codes import Firings
from .router import Router

RARE = 0.3  # rows of a batch: a smallest rate below it moves its bias as fast as if it were that (docs/LOG.md)


class NoBalance(nn.Module):
    """No selection biases."""

    parent_bias: Tensor | None
    child_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("parent_bias", None)
        self.register_buffer("child_bias", None)

    def count(self, firings: Firings) -> None:
        """Nothing to count."""

    def move(self, router: Router, child: DirectChildren, frozen: Container[str]) -> None:
        """Nothing to move."""


class LoadBalancer(NoBalance):
    """Biases of the parents [P] and, with a smallest rate, of the children [P, C], moved once an optimiser step.

    A firing rate above the largest one (rate_cap of the rows, or rate_cap_spread times the mean rate if that is more)
    moves a parent's bias down (a lifted one to 0 at once), below it up again to 0. One below rate_floor times
    the mean moves a bias up by as much as it lacks, above it down again to 0. What a bias cannot lift goes to the
    encoder's bias.
    """

    def __init__(self, config: HSAEConfig):
        super().__init__()
        P, C = config.n_parents, config.n_children_per_parent
        self.rate, self.cap, self.spread = config.balance_rate, config.rate_cap, config.rate_cap_spread
        self.floor, self.n_children, self.rows = config.rate_floor, C, 0
        self.register_buffer("parent_bias", torch.zeros(P))
        self.register_buffer("child_bias", torch.zeros(P, C) if config.rate_floor > 0 else None)
        for name, shape in (("parent_firings", (P,)), ("child_firings", (P * C,)), ("sums", (2,))):
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    parent_bias: Tensor
    parent_firings: Tensor  # since the last step, as the two below
    child_firings: Tensor
    sums: Tensor  # of all parents' codes, and of all children's

    @torch.no_grad()
    def count(self, firings: Firings) -> None:
        """Add a micro-batch's firings."""
        self.rows += firings.rows
        self.parent_firings += firings.parents
        self.child_firings += firings.children
        self.sums += torch.stack([firings.codes.parent_value.sum(), firings.codes.child_value.sum()])

    @torch.no_grad()
    def move(self, router: Router, child: DirectChildren, frozen: Container[str]) -> None:
        """Move all biases by the firings since the last step; b_E and b_F too, unless they are frozen."""
        fired_P, fired_R = self.parent_firings, self.child_firings
        limit = None
        if self.cap is not None:
            limit = (self.spread * fired_P.mean()).clamp_min(self.cap * self.rows)
        lacking_P = self._step(self.parent_bias, fired_P, self.sums[0], limit)
        if router.b_E is not None and router.b_E.requires_grad and "b_E" not in frozen:
            router.b_E.add_(lacking_P)
        if self.child_bias is not None:
            # Half of a mean child's part of its parent's rows: if all of a rare parent's children asked for more, they
            # would take the rows from each other, and lift each other without end.
            part = fired_R.mean() / (2 * fired_P.mean().clamp_min(1e-6))
            within_R = (part * fired_P).repeat_interleave(self.n_children)
            lacking_R = self._step(self.child_bias.view(-1), fired_R, self.sums[1], within_m=within_R)
            if child.b_F is not None and child.b_F.requires_grad and "b_F" not in frozen:
                child.b_F.add_(lacking_R.view_as(child.b_F))
        self.rows = 0
        for counted in (self.parent_firings, self.child_firings, self.sums):
            counted.zero_()

    def _step(
        self,
        bias_m: Tensor,
        fired_m: Tensor,
        total: Tensor,
        limit: Tensor | None = None,
        within_m: Tensor | None = None,
    ) -> Tensor:
        """Move the biases in place by the rows in which each parent, or child, was on; at most `limit` rows are right.

        Below the floor a bias rises by the rate for every row that is lacking, at most one: so in the mean over batches
        even what is on in less than one row of a batch gets its share. Where that share is below RARE rows it moves
        faster, by RARE / share: else what is rare would rise too slowly. It rises to the mean code at most, with which
        a code just above 0 is chosen. total: the sum of all codes.

        Returns by how much each would have risen beyond that, [m], for the encoder's bias: mostly what is above 0
        nowhere. There the share is `within` [m] at most, the rows that a child can ask of its parent's.
        """
        highest, wanted = total / fired_m.sum().clamp_min(1), self.floor * fired_m.mean()
        speed = self.rate * (RARE / wanted.clamp(1e-6, RARE))
        step_m = speed * (wanted - fired_m).clamp(-1, 1)
        risen_m = bias_m + step_m
        up_m = risen_m.clamp_min(0).clamp_max(highest)
        if limit is None:
            bias_m.copy_(up_m)
        else:
            down_m = (bias_m + self.rate * (limit - fired_m).sign()).clamp_max(0)
            bias_m.copy_(torch.where((bias_m < 0) | (fired_m > limit), down_m, up_m))
        if within_m is not None:
            step_m = speed * (torch.minimum(wanted, within_m) - fired_m).clamp(-1, 1)
        return torch.minimum(step_m, risen_m - highest).clamp_min(0)
