"""BatchTopK (Bussmann et al., arXiv 2412.06410): rows share a batch's budget of codes.

Shapes: B rows, d width, P latents, k' slots of a row's codes.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import BatchTopKConfig
from .base import NormalizedBatches
from .flat import FlatSAE, pack
from .sparsity import PerBatch


class BatchTopKSAE(FlatSAE):
    """In training the B k largest positive logits of the batch; afterwards, row by row, those above one threshold.

    The threshold is a running mean of the smallest kept activation until `calibrate` sets it.
    """

    config_block = BatchTopKConfig
    graphable = False
    file_names: ClassVar[dict[str, str]] = {"budget.threshold": "threshold", "budget.batches": "batches"}

    def __init__(self, config: Any, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize, seed)
        self.budget = PerBatch()

    def select(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and codes [B, k'], k' the largest row's number of codes."""
        return pack(logits_BP, self.budget.keep(logits_BP.detach(), logits_BP, self.config.k) > 0)

    def every(self, logits_BP: Tensor) -> Tensor:
        return self.budget.keep(logits_BP, logits_BP, self.config.k)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        rows = NormalizedBatches(self, batches)
        self.budget.calibrate(lambda: map(self.logits, rows), target_l0)
