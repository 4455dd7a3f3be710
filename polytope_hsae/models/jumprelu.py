"""JumpReLU (Rajamanoharan et al., arXiv 2407.14435): a learned threshold for every latent.

Shapes: B rows, d width, P latents, k' slots of a row's codes.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import JumpReLUConfig, LossOverrides
from .base import NormalizedBatches
from .codes import ModelOutput
from .flat import FlatSAE, pack
from .losses import mean_error
from .sparsity import level_for_l0

LOWEST_FACTOR = 1e-6  # of calibration, where even all positive logits are too few


class JumpReLU(torch.autograd.Function):
    """z where z > threshold, else 0. Gradient of the threshold: -threshold / bandwidth in the rectangle around it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        slope = -threshold / ctx.bandwidth * in_reach(z, threshold, ctx.bandwidth)
        return gradient * (z > threshold), gradient * slope, None


class Step(torch.autograd.Function):
    """1 where z > threshold, else 0. Gradient of the threshold: -1 / bandwidth inside the rectangle; z has none."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        return None, -gradient / ctx.bandwidth * in_reach(z, threshold, ctx.bandwidth), None


def in_reach(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel: 1 where z is less than half a bandwidth from its threshold, else 0."""
    return ((z - threshold).abs() < bandwidth / 2).to(z)


class JumpReLUSAE(FlatSAE):
    """Latents whose logit is above their own threshold; a penalty draws the mean L0 to k.

    AdamW changes every number by about the learning rate. The entries of a unit row are about 1/sqrt(d), so that rows
    change faster, relatively, than a logarithm does; the rate of log_threshold is sqrt(d) times the others' to keep up.
    Without that the L0 stays far from k in a short training.
    """

    config_block = JumpReLUConfig
    graphable = False
    tensor_names = (*FlatSAE.tensor_names, "log_threshold")

    def __init__(self, config: Any, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize, seed)
        start = math.log(config.initial_threshold or 1.0)
        self.log_threshold = nn.Parameter(torch.full((config.n_latents,), start))
        self.lr_mult = {"log_threshold": width**0.5}

    def select(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and codes [B, k']. In training, latents just below their threshold have slots too, with code 0.

        Through those slots the error tells a threshold that it should fall.
        """
        threshold_P = self.log_threshold.exp()
        reach = self.config.bandwidth / 2 if self.training else 0.0
        index_Bk, _ = pack(logits_BP, logits_BP > threshold_P - reach)
        z_Bk = logits_BP.gather(1, index_Bk)
        return index_Bk, JumpReLU.apply(z_Bk, threshold_P[index_Bk], self.config.bandwidth)

    def every(self, logits_BP: Tensor) -> Tensor:
        return JumpReLU.apply(logits_BP, self.log_threshold.exp().expand_as(logits_BP), self.config.bandwidth)

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead_P: Tensor | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """Those of every flat SAE and `l0`: (L0/k - 1)^2 times the batch's error of an empty code, b_dec alone."""
        terms = super().loss_terms(output, overrides, dead_P)
        config, index_Bk = self.config, output.codes.parent_index
        z_Bk, threshold_Bk = output.router_logits.detach(), self.log_threshold.exp()
        if index_Bk.shape == z_Bk.shape:  # a slot for every latent, in order or not
            threshold_Bk = threshold_Bk.expand_as(z_Bk)
        else:
            z_Bk, threshold_Bk = z_Bk.gather(1, index_Bk), threshold_Bk[index_Bk]
        l0 = Step.apply(z_Bk, threshold_Bk, config.bandwidth).sum(1).mean()
        empty_B = self.ops.squared_error(output.x, self.b_dec.detach().expand_as(output.x))
        empty = mean_error(empty_B, self.width, config.recon_reduction)
        return terms | {"l0": (config.l0_weight, (l0 / config.k - 1).square() * empty)}

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec at the geometric median; without `initial_threshold`, all thresholds where the L0 is k.

        The L0 is that of the first batch.
        """
        super().initialize_bias(batches)
        if self.config.initial_threshold is None:
            self.log_threshold.zero_()
            self.calibrate([next(iter(batches))], self.config.k)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        """Scale all thresholds by one factor, so that raw rows [B, d] have `target_l0` active latents on average."""
        rows, threshold_P = NormalizedBatches(self, batches), self.log_threshold.exp()
        factor = level_for_l0(lambda: (self.logits(x_Bd) / threshold_P for x_Bd in rows), target_l0)
        self.log_threshold.add_(math.log(max(LOWEST_FACTOR, factor)))
