"""Dead parents and dead children, each with its own counter (docs/method.md section 2)."""

import torch
from torch import Tensor

from ..models.codes import Firings


class Usage:
    """idle_parent int64 [P]: tokens since each parent last fired.

    idle_child int64 [P*C]: tokens routed to its parent since each child last fired.
    """

    def __init__(self, n_parents: int, n_children: int, device: torch.device):
        self.n_children = n_children
        self.idle_parent = torch.zeros(n_parents, dtype=torch.int64, device=device)
        self.idle_child = torch.zeros(n_parents * n_children, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired: Firings) -> None:
        """Count one batch."""
        self.idle_parent.add_(fired.rows).masked_fill_(fired.parents > 0, 0)
        if self.n_children:
            self.idle_child.view(-1, self.n_children).add_(fired.parents.long().unsqueeze(1))
            self.idle_child.masked_fill_(fired.children > 0, 0)

    def dead_parents(self, after: int) -> Tensor:
        """Mask [P] of parents not active for `after` tokens."""
        return self.idle_parent >= after

    def dead_children(self, after_routed: int) -> Tensor:
        """Mask [P*C] of children whose parent was active for `after_routed` tokens without them."""
        return self.idle_child >= after_routed

    def state_dict(self) -> dict[str, Tensor]:
        return {"idle_parent": self.idle_parent, "idle_child": self.idle_child}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.idle_parent.copy_(state["idle_parent"])
        self.idle_child.copy_(state["idle_child"])
