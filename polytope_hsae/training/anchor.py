"""What holds a teacher's rows of E, D and b_E while all else trains, in every stage (docs/method.md section 4)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..config import TeacherConfig
from ..models.base import SparseAutoencoder


class Anchor:
    """Holds the first `n_rows` > 0 rows of E and D. With a `threshold` it also
    holds their b_E, bit for bit, under every kind.

    frozen: the rows do not change by one bit. slow: they take `anchor_lr_mult` of each update.
    pull: a penalty, anchor_weight * mean over rows of (1 - cos to the teacher's row), for E and D each.
    """

    def __init__(self, model: SparseAutoencoder, n_rows: int, config: TeacherConfig):
        self.model, self.n_rows = model, n_rows
        self.kind = config.anchor
        self.weight = config.anchor_weight
        self.share = 0.0 if config.anchor == "frozen" else config.anchor_lr_mult
        self.tensors = list({id(t): t for name, t in model.tensors().items() if name in ("E", "D")}.values())
        self.teacher = self._rows()
        bias = model.tensors().get("b_E") if config.threshold is not None else None
        self.bias = None if bias is None else bias.detach()[:n_rows]
        self.thresholds = None if self.bias is None else self.bias.clone()
        self.before: list[Tensor] = []

    def _rows(self) -> list[Tensor]:
        return [tensor.detach()[: self.n_rows].clone() for tensor in self.tensors]

    def terms(self) -> dict[str, tuple[float, Tensor]]:
        """The pull penalty as a loss term, name: (weight, value); nothing for the other kinds."""
        if self.kind != "pull":
            return {}
        pairs = zip(self.tensors, self.teacher, strict=True)
        distances = [(1 - cosine_similarity(tensor[: self.n_rows], rows, dim=1)).mean() for tensor, rows in pairs]
        return {"anchor_pull": (self.weight, torch.stack(distances).sum())}

    def before_step(self) -> None:
        """Remember the rows before the optimiser moves them."""
        if self.kind in ("frozen", "slow"):
            self.before = self._rows()

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the rows where the anchor wants them, after the optimiser and the constraints."""
        if self.bias is not None and self.thresholds is not None:
            self.bias.copy_(self.thresholds)
        if self.kind not in ("frozen", "slow"):
            return
        for tensor, old in zip(self.tensors, self.before, strict=True):
            rows = tensor[: self.n_rows]
            rows.copy_(old if self.share == 0 else old + self.share * (rows - old))
        if self.share > 0:
            self.model.normalize_decoder_weights()
