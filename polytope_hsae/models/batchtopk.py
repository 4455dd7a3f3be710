"""BatchTopK (Bussmann et al., arXiv 2412.06410): rows share a batch's budget of codes.

Shapes: B rows, d width, P latents, k' slots of a row's codes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..config import BatchTopKConfig
from .flat import FlatSAE
from .selection import largest_of_batch, level_for_l0, pack, running_mean_


class BatchTopKSAE(FlatSAE):
    """In training the B k largest positive logits of the batch; afterwards, row by row, those above one threshold.

    The threshold is a running mean of the smallest kept activation until `calibrate` sets it. `batches` counts those
    that went into it: the first ones weigh alike.
    """

    config_block = BatchTopKConfig
    graphable = False
    threshold: Tensor
    batches: Tensor

    def __init__(self, config: Any, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize, seed)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def select(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and codes [B, k'], k' the largest row's number of codes."""
        return pack(logits_BP, self._kept(logits_BP) if self.training else logits_BP > self.threshold)

    def every(self, logits_BP: Tensor) -> Tensor | None:
        """As `FlatSAE.every`."""
        if not self.trains_whole(logits_BP):
            return None
        return torch.where(self._kept(logits_BP), logits_BP, 0.0)

    def _kept(self, logits_BP: Tensor) -> Tensor:
        """The batch's largest positive logits, as a mask [B, P]; the smallest of them is remembered."""
        budget = round(self.config.k * len(logits_BP))
        keep_BP, smallest = largest_of_batch(logits_BP.detach(), budget)
        if budget:
            running_mean_(self.threshold, self.batches, smallest, self.config.threshold_decay)
        return keep_BP

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        """Set the threshold at which raw rows [B, d] have `target_l0` active latents on average, or 0 if none is."""
        rows = self.normalized_batches(batches)
        self.threshold.fill_(max(0.0, level_for_l0(lambda: map(self.logits, rows), target_l0)))
