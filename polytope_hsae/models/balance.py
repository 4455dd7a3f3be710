"""Selection biases keep firing rates within limits. They are added to logits when latents are chosen, not to codes.

See docs/method.md, section 1. Shapes: P parents, C children per parent.
"""

from collections.abc import Container

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from .children import DirectChildren
from .codes import Firings
from .router import Router

RARE = 0.3  # rows of a batch: a floor of fewer rows moves a bias as fast as a floor of this many (docs/LOG.md)


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
    """Biases of the parents [P] and, with `rate_floor`, of the children [P, C], moved once an optimiser step.

    The largest firing rate of a parent is rate_cap, or rate_cap_spread times the mean rate if that is more. Above it
    the bias falls (a positive one goes to 0 at once), and below it a negative bias rises back to 0.
    The smallest firing rate is rate_floor times the mean. Below it the bias rises in proportion to the missing rows,
    and above it a positive bias falls back to 0. A bias that has reached its maximum passes the rest on to the
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
            # At most half of a mean child's share of its parent's rows. If all children of a rare parent wanted more,
            # they would take rows from each other and their biases would rise without end.
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
        """Move the biases in place, by the number of rows in which each latent was on. limit: the largest number.

        The floor is a number of rows. Below it a bias rises by balance_rate times the missing rows, at most one. So a
        latent meets its floor on average over batches, even if that is less than one row of a batch. A floor below RARE
        rows moves the bias faster, by RARE / floor. A bias is at most the mean code: then a code just above 0 is
        chosen. total: the sum of all codes.

        Returns how much each bias [m] would have risen beyond its maximum, for the encoder's bias; mostly of latents
        whose logit is above 0 on no row. For this, the floor of a child is at most `within` [m] rows.
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
