"""The unit norms of an H-SAE's decoder rows and atoms, and what keeps them (docs/method.md section 2).

Shapes: d residual width, P parents, C children per parent, s subspace width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import SparseAutoencoder
from .constraints import atom_norms, gram, project_out, restore_gram, row_norms


class ConstrainedDecoders(SparseAutoencoder):
    """What an H-SAE does to hold D's rows and its atoms (or G's rows) at norm 1, Euclidean or in a metric."""

    D: nn.Parameter
    Up: nn.Parameter | None
    G: nn.Parameter
    sigma: Tensor | None
    sigma_inv: Tensor | None
    gram_reference: Tensor | None

    def freeze(self, names: Any) -> None:
        """Freeze exactly the named tensors; a frozen G fixes the Gram matrices of Up, hence the atoms' norms."""
        super().freeze(names)
        held = not self.G.requires_grad and self.config.normalize_child == "atom"
        metric = self.norm_metric()
        self.gram_reference = gram(self.Up.detach(), metric) if held and self.Up is not None else None

    def set_metric(self, sigma_dd: Tensor) -> None:
        """Set Sigma, the residual metric of the causal penalty and norms; a model that uses neither ignores it.

        Causal norms are restored at once: a stage that freezes D or G keeps the norms it finds.
        """
        if self.sigma is not None:
            self.sigma.copy_(sigma_dd)
        if self.sigma_inv is not None:
            self.sigma_inv.copy_(torch.linalg.inv(sigma_dd.double()))
        if self.config.norm_metric == "causal":
            self.normalize_decoder_weights()

    def norm_metric(self, geometry: Any = None) -> Tensor | None:
        """The metric [d, d] of the constraint: `geometry`'s, else the configured one; None is Euclidean."""
        if geometry is not None:
            return geometry.sigma.to(self.D)
        return self.sigma if self.config.norm_metric == "causal" else None

    @torch.no_grad()
    def normalize_decoder_weights(self, geometry: Any = None) -> None:
        """Unit norm for D's rows and for the atoms (or G's rows), in the configured norm or in `geometry`'s.

        Does nothing when `normalize_decoder` is off.
        """
        if not self.config.normalize_decoder:
            return
        metric = self.norm_metric(geometry)
        if self.D.requires_grad and not (metric is None and ops.normalize_rows_(self.D)):
            self.D.div_(row_norms(self.D, metric).clamp_min(1e-12))
        if self.gram_reference is not None:
            assert self.Up is not None
            if self.Up.requires_grad:
                self.Up.copy_(restore_gram(self.Up, self.gram_reference, metric))
        elif self.G.requires_grad:
            plain = self.config.normalize_child == "decoder" or (self.Up is None and metric is None)
            if plain and ops.normalize_rows_(self.G):
                return
            self.G.div_(self.child_norms(geometry).clamp_min(1e-12))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradients of D and G what would change a constrained norm at first order."""
        metric = self.norm_metric()
        if self.D.grad is not None and not (metric is None and ops.project_out_(self.D.grad, self.D.detach())):
            normal_Pd = self.D if metric is None else self.D @ metric
            self.D.grad.copy_(project_out(self.D.grad, normal_Pd))
        atoms = self.config.normalize_child == "atom"
        if self.G.grad is not None and (atoms or not ops.project_out_(self.G.grad, self.G.detach())):
            of_atoms = metric if self.Up is None else gram(self.Up, metric)
            normal_PCs = self.G @ of_atoms if atoms and of_atoms is not None else self.G
            self.G.grad.copy_(project_out(self.G.grad, normal_PCs))

    def child_norms(self, geometry: Any = None) -> Tensor:
        """Norms [P, C, 1] of what the constraint on G holds at 1."""
        if self.config.normalize_child == "decoder":
            return row_norms(self.G, None)
        metric = self.norm_metric(geometry)
        return row_norms(self.G, metric) if self.Up is None else atom_norms(self.Up, self.G, metric)
