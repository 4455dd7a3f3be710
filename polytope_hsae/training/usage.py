"""Which parents and children are in use: two counters, never one (docs/method.md section 2)."""

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..models.codes import Codes, Dead


class Usage:
    """Counts, for every parent, tokens since it was last active; for every child, its parent's routed tokens since.

    idle_parent [P] and idle_child [P*C], int64.
    """

    def __init__(self, n_parents: int, n_children: int, device: torch.device):
        self.n_children = n_children
        self.idle_parent = torch.zeros(n_parents, dtype=torch.int64, device=device)
        self.idle_child = torch.zeros(n_parents * n_children, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: Codes) -> None:
        """Count one batch."""
        used_Bk = (codes.parent_value > 0).to(torch.int64)  # no boolean indexing: a GPU would wait for its size
        index_Bk = codes.parent_index
        if index_Bk.stride(0) == 0:  # all rows have the same slots: they are added up first
            index_Bk, used_Bk = index_Bk[:1], used_Bk.sum(0, keepdim=True)
        routed_P = torch.zeros_like(self.idle_parent).scatter_add_(0, index_Bk.flatten(), used_Bk.flatten())
        self.idle_parent.copy_(torch.where(routed_P > 0, 0, self.idle_parent + len(codes.parent_index)))
        if self.n_children:
            idle_R = self.idle_child + routed_P.repeat_interleave(self.n_children)
            fired_BK = (codes.child_value > 0).to(torch.int64)
            fired_R = torch.zeros_like(idle_R).scatter_add_(0, codes.child_index.flatten(), fired_BK.flatten())
            self.idle_child.copy_(torch.where(fired_R > 0, 0, idle_R))

    def dead_parents(self, after: int) -> Tensor:
        """Mask [P] of parents not active for `after` tokens."""
        return self.idle_parent >= after

    def dead_children(self, after_routed: int) -> Tensor:
        """Mask [P*C] of children whose parent was active for `after_routed` tokens without them."""
        return self.idle_child >= after_routed

    @torch.no_grad()
    def restart(self, parent_n: Tensor) -> None:
        """Count from 0 for these parents and their children."""
        self.idle_parent[parent_n] = 0
        if self.n_children:
            self.idle_child.view(-1, self.n_children)[parent_n] = 0

    def dead(self, config: TrainingConfig) -> Dead:
        """Both masks, by the config's two limits."""
        return Dead(self.dead_parents(config.dead_after), self.dead_children(config.dead_after_routed))

    def state_dict(self) -> dict[str, Tensor]:
        return {"idle_parent": self.idle_parent, "idle_child": self.idle_child}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.idle_parent.copy_(state["idle_parent"])
        self.idle_child.copy_(state["idle_child"])
