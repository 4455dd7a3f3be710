"""The children of a row's parents: their encoder and decoder (docs/method.md section 1).

Shapes: B rows, k parents of a row, P parents, C children per parent, s subspace width, d width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..ops import Routing, Rows
from .base import Part
from .codes import ModelOutput
from .constraints import atom_norms, gram, project_out, restore_gram, row_norms


class DirectChildren(Part):
    """Child j of parent p reads with F_pj and writes with the atom G_pj, both of width d."""

    F: nn.Parameter
    G: nn.Parameter
    Down: nn.Parameter | None
    Up: nn.Parameter | None
    gram_reference: Tensor | None

    def __init__(self, config: HSAEConfig, start: Mapping[str, nn.Parameter]):
        super().__init__()
        self.config = config
        self.F, self.G = start["F"], start["G"]
        for name in ("Down", "Up"):
            self.register_parameter(name, start.get(name))
        self.b_F = nn.Parameter(torch.zeros(self.F.shape[:2])) if config.use_encoder_bias else None
        self.code: Callable[[Tensor], Tensor] = torch.relu if config.magnitude == "relu" else torch.ones_like
        self.register_buffer("gram_reference", None)

    def encode(self, rows: Rows, routes: Routing) -> Tensor:
        """Pre-activations of every routed parent's children, [B, k, C]."""
        pre_BkC: Tensor = self.ops.encode_children(rows, routes, self.F, self.b_F, self.Down)
        return pre_BkC

    def decode(self, index_BK: Tensor, value_BK: Tensor) -> Tensor:
        """The children's part of x_hat, by their numbers p*C + j: [B, d]."""
        return self.ops.decode_children(index_BK, value_BK, self.G, self.Up)

    def atoms(self, parents: Tensor | slice | int) -> Tensor:
        """Atoms of the given parents [n] (or of one): [n, C, d]."""
        return self.G[parents]

    def readers(self, parents: Tensor | slice) -> Tensor:
        """Encoder rows of the children of the given parents [n]: [n, C, d]."""
        return self.F[parents]

    def l1(self, output: ModelOutput) -> Tensor:
        """A row's summed codes, mean over rows."""
        return output.codes.child_value.sum(1).mean()

    def norms(self, metric: Tensor | None) -> Tensor:
        """Norms [P, C, 1] that the constraint keeps at 1: of the atoms, or of G's rows."""
        return row_norms(self.G, None if self.config.normalize_child == "decoder" else metric)

    def hold_norms(self, metric: Tensor | None) -> None:
        """Prepare for a frozen G; direct children have nothing to prepare."""

    @torch.no_grad()
    def normalize_(self, metric: Tensor | None) -> None:
        """Unit norm for the atoms (or G's rows), unless G is frozen."""
        if not self.G.requires_grad:
            return
        if self.config.normalize_child == "decoder" or (metric is None and self.Up is None):
            self.ops.normalize_rows_(self.G)
        else:
            self.G.div_(self.norms(metric).clamp_min(1e-12))

    @torch.no_grad()
    def project_(self, metric: Tensor | None) -> None:
        """Remove from G's gradient what would change those norms at first order."""
        if self.G.grad is None:
            return
        if self.config.normalize_child == "decoder" or (metric is None and self.Up is None):
            self.ops.project_out_(self.G.grad, self.G.detach())
        else:
            self.G.grad.copy_(project_out(self.G.grad, self.G @ self._metric_of_rows(metric)))

    def _metric_of_rows(self, metric: Tensor | None) -> Tensor:
        """The metric that G's rows have as atoms."""
        assert metric is not None
        return metric


class FactoredChildren(DirectChildren):
    """The children of parent p live in subspaces of width s: they read F_pj Down_p x and write Up_p^T G_pj."""

    Down: nn.Parameter
    Up: nn.Parameter

    def atoms(self, parents: Tensor | slice | int) -> Tensor:
        return self.G[parents] @ self.Up[parents]

    def readers(self, parents: Tensor | slice) -> Tensor:
        return self.F[parents] @ self.Down[parents]

    def norms(self, metric: Tensor | None) -> Tensor:
        if self.config.normalize_child == "decoder":
            return row_norms(self.G, None)
        return atom_norms(self.Up, self.G, metric)

    def hold_norms(self, metric: Tensor | None) -> None:
        """While G is frozen, keep the Gram matrices of Up: they fix the atoms' norms."""
        held = not self.G.requires_grad and self.config.normalize_child == "atom"
        self.gram_reference = gram(self.Up.detach(), metric) if held else None

    @torch.no_grad()
    def normalize_(self, metric: Tensor | None) -> None:
        if self.gram_reference is None:
            super().normalize_(metric)
        elif self.Up.requires_grad:
            self.Up.copy_(restore_gram(self.Up, self.gram_reference, metric))

    def _metric_of_rows(self, metric: Tensor | None) -> Tensor:
        return gram(self.Up, metric)


CHILDREN: dict[str, type[DirectChildren]] = {"direct": DirectChildren, "factored": FactoredChildren}
