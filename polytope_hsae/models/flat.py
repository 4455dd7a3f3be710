"""Flat autoencoders, the baselines of an H-SAE: their base class, and TopK (Gao et al., arXiv 2406.04093).

Shapes: B rows, d width, P latents, k' slots of a row's codes.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import LossOverrides, TopKConfig
from ..ops import Routing, Rows
from .base import NormalizedBatches, SparseAutoencoder
from .codes import Codes, ModelOutput
from .constraints import geometric_median
from .init import unit_rows
from .losses import aux_parent, mean_error


class FlatSAE(SparseAutoencoder):
    """x_hat = b_dec + the chosen latents' codes times D, chosen by logits r = E (x - b_dec) + b_E.

    E starts equal to D, or is D where it is tied; rows of D have unit norm. A kind says which latents are chosen, in
    `select`.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("D", "E", "b_E", "b_dec")
    n_children = 0

    def __init__(self, config: Any, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize)
        self.n_parents = config.n_latents
        self.D = nn.Parameter(unit_rows((config.n_latents, width), torch.Generator().manual_seed(seed)))
        self.E = self.D if config.tied else nn.Parameter(self.D.detach().clone())
        self.b_E = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(width))

    # what each kind defines

    def select(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, k'], distinct within a row, and codes [B, k'] >= 0; a slot of code 0 is not in use."""
        raise NotImplementedError

    def every(self, logits_BP: Tensor) -> Tensor | None:
        """The codes of all latents [B, P]; None for a kind whose rows all have the same number of codes."""
        return None

    def trains_whole(self) -> bool:
        """Whether `every` stands in for `select`: in training on a GPU.

        `select` would wait there for the largest number of codes in a row, and one dense product is faster than
        gathering. Codes, losses and gradients are the same.
        """
        return self.training and not self.ops.on_host

    # forward pass

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows [B, d]."""
        x, row_scale = self.to_normalized(h_Bd)
        logits = self.logits(x)
        whole = self.every(logits) if self.trains_whole() else None
        if whole is None:
            index, value = self.select(logits)
        else:
            index, value = torch.arange(self.n_parents, device=logits.device).expand(logits.shape), whole
        empty = index.new_zeros(len(index), 0)
        codes = Codes(index, value, empty, empty.to(x.dtype), row_scale)
        prefixes = self.decode_prefixes(codes) if whole is None else self.decode_whole(whole)
        x_hat, errors = prefixes[-1], [self.ops.squared_error(x, prefix) for prefix in prefixes]
        return ModelOutput(x, x_hat, x_hat, codes, logits, errors[-1], errors[-1], prefix_errors=torch.stack(errors))

    def logits(self, x_Bd: Tensor) -> Tensor:
        """r [B, P] of normalised rows."""
        return self.ops.linear(Rows(x_Bd - self.b_dec), self.E, self.b_E)

    def decode_normalized(self, codes: Codes) -> Tensor:
        return self.ops.decode(Routing(codes.parent_index, self.n_parents), codes.parent_value, self.D) + self.b_dec

    def decode_prefixes(self, codes: Codes) -> Tensor:
        """Reconstructions [n, B, d] by the first latents, by more, ..., by all; the loss is their mean error."""
        return self.decode_normalized(codes).unsqueeze(0)

    def decode_whole(self, value_BP: Tensor) -> Tensor:
        """The same from the codes of all latents."""
        return (value_BP @ self.D + self.b_dec).unsqueeze(0)

    # training

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead_P: Tensor | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """The reconstruction error and, with `aux_weight`, what dead latents make of the error."""
        config = self.config
        assert output.prefix_errors is not None
        errors = [mean_error(error_B, self.width, config.recon_reduction) for error_B in output.prefix_errors]
        terms = {"recon": (1.0, torch.stack(errors).mean())}
        aux_weight = config.aux_weight if overrides.aux_weight is None else overrides.aux_weight
        if aux_weight > 0 and dead_P is not None:
            terms["aux_parent"] = (aux_weight, aux_parent(self, output, dead_P))
        return terms

    @torch.no_grad()
    def normalize_decoder_weights(self) -> None:
        if self.D.requires_grad:
            self.ops.normalize_rows_(self.D)

    @torch.no_grad()
    def project_gradients(self) -> None:
        if self.D.grad is not None:
            self.ops.project_out_(self.D.grad, self.D.detach())

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        self.b_dec.copy_(geometric_median(NormalizedBatches(self, batches)))


class TopKSAE(FlatSAE):
    """The k largest logits of every row."""

    config_block = TopKConfig

    def select(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and codes [B, k]; a chosen latent with a logit below 0 has code 0."""
        selected_Bk, index_Bk = torch.topk(logits_BP, self.config.k, dim=1)
        return index_Bk, torch.relu(selected_Bk)


def pack(logits_BP: Tensor, keep_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The kept logits of every row: indices [B, k'] and values [B, k'], largest first.

    k' is the largest row's number, at least 1. Slots that a row does not need have value 0 and other indices.
    """
    slots = max(1, int(keep_BP.sum(1).max())) if len(keep_BP) else 1
    index_Bk = torch.topk(logits_BP.detach().masked_fill(~keep_BP, -torch.inf), slots, dim=1).indices
    return index_Bk, torch.where(keep_BP.gather(1, index_Bk), logits_BP.gather(1, index_Bk), 0.0)
