"""The flat TopK autoencoder, the baseline an H-SAE is compared with (Gao et al., arXiv 2406.04093).

Shapes: B rows, d width, P latents, k active latents.
"""

from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import Block, LossOverrides
from ..ops import reference as ops
from .base import SparseAutoencoder
from .codes import Codes, Dead, ModelOutput
from .constraints import geometric_median, project_out, row_norms
from .hsae import unit_rows
from .losses import reconstruction_error


class TopKConfig(Block):
    """Shape of a flat TopK SAE."""

    n_latents: int = Field(ge=1, description="P: latents.")
    k: int = Field(ge=1, description="Active latents per row.")
    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    project_gradient: bool = Field(False, description="Remove the gradient along decoder rows before a step.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.k > self.n_latents:
            raise ValueError(f"k: found {self.k}, allowed: at most n_latents = {self.n_latents}")
        return self


class TopKSAE(SparseAutoencoder):
    """x_hat = b_dec + sum of relu(r_p) D_p over the k largest r = E (x - b_dec) + b_E; rows of D have unit norm."""

    config_block = TopKConfig
    tensor_names = ("E", "b_E", "D", "b_dec")
    n_children = 0

    def __init__(self, config: TopKConfig, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize)
        self.n_parents = config.n_latents
        self.D = nn.Parameter(unit_rows((config.n_latents, width), torch.Generator().manual_seed(seed)))
        self.E = nn.Parameter(self.D.detach().clone())
        self.b_E = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(width))

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows [B, d]."""
        x, row_scale = self.to_normalized(h_Bd)
        logits = torch.nn.functional.linear(x - self.b_dec, self.E, self.b_E)
        selected, index = torch.topk(logits, self.config.k, dim=1)
        empty = index.new_zeros(len(index), 0)
        codes = Codes(index, torch.relu(selected), empty, empty.to(x.dtype), row_scale)
        x_hat = self.decode_normalized(codes)
        return ModelOutput(x, x_hat, x_hat, codes, logits, x.new_zeros(len(x), self.config.k, 0))

    def decode_normalized(self, codes: Codes) -> Tensor:
        """x_hat [B, d]."""
        return ops.weighted_row_sum(self.D, codes.parent_index, codes.parent_value) + self.b_dec

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead: Dead | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """The reconstruction error; a flat SAE has no other term to override."""
        return {"recon": (1.0, reconstruction_error(output.x, output.x_hat, self.config.recon_reduction))}

    @torch.no_grad()
    def normalize_decoder_weights(self, geometry: Any = None) -> None:
        """Unit norm for D's rows (Euclidean)."""
        if self.D.requires_grad:
            self.D.div_(row_norms(self.D, None).clamp_min(1e-12))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the gradient's component along the rows of D."""
        if self.D.grad is not None:
            self.D.grad.copy_(project_out(self.D.grad, self.D))

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec at the geometric median of raw rows, given as batches [B, d]."""
        self.b_dec.copy_(geometric_median(self.normalized_batches(batches)))
