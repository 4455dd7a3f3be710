"""Plain PyTorch peers: a flat TopK, and an H-SAE with the naive operations. None of our kernels runs.

Both train as ours does: AdamW, clipping, projected gradients and unit norms as the config says, bf16 autocast on a GPU.
Shapes: B rows, d width, P parents or latents, k active ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..config import LossOverrides, TopKConfig, TrainingConfig
from ..models.base import Part
from ..models.constraints import project_out, row_norms
from ..models.hsae import HierarchicalSAE
from ..ops import NAIVE


class FlatTopK(nn.Module):
    """TopK as its paper writes it: dense products on both sides of the k largest logits.

    `kind` as in `data.normalize`; `rms` leaves rows as they are, because the bench draws them at mean 0 and scale 1.
    """

    def __init__(self, config: TopKConfig, width: int, kind: str):
        super().__init__()
        self.config, self.kind = config, kind
        self.D = nn.Parameter(normalize(torch.randn(config.n_latents, width), dim=1))
        self.E = nn.Parameter(self.D.detach().clone())
        self.b_E = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(width))

    def forward(self, h_Bd: Tensor) -> Tensor:
        """The loss: the squared error, a mean over rows, summed or averaged over d."""
        x = h_Bd / (h_Bd.norm(dim=1, keepdim=True) + 1e-6) if self.kind == "unit_row" else h_Bd
        logits_BP = linear(x - self.b_dec, self.E, self.b_E)
        value_Bk, self.chosen_Bk = logits_BP.topk(self.config.k, dim=1)
        codes_BP = torch.zeros_like(logits_BP).scatter(1, self.chosen_Bk, value_Bk.relu())
        error_B = (x - (codes_BP @ self.D + self.b_dec)).square().sum(1)
        return error_B.mean() / (x.shape[1] if self.config.recon_reduction == "mean" else 1)

    @torch.no_grad()
    def project_gradients(self) -> None:
        assert self.D.grad is not None
        self.D.grad.copy_(project_out(self.D.grad, self.D))

    @torch.no_grad()
    def normalize_decoder_weights(self) -> None:
        self.D.div_(row_norms(self.D, None))


class NaiveHSAE(nn.Module):
    """An H-SAE whose operations are the naive ones on every device: each gathered weight is written out."""

    def __init__(self, model: HierarchicalSAE, loss: LossOverrides):
        super().__init__()
        self.model, self.config, self.loss, self.E = model.train(), model.config, loss, model.E
        self.project_gradients, self.normalize_decoder_weights = (
            model.project_gradients,
            model.normalize_decoder_weights,
        )
        for part in model.modules():
            if isinstance(part, Part):
                part.ops = NAIVE._replace(on_host=model.E.device.type == "cpu")

    def forward(self, h_Bd: Tensor) -> Tensor:
        """The weighted sum of all loss terms; penalties on weights are in float32 under autocast, too."""
        output = self.model(h_Bd)
        self.chosen_Bk = output.codes.parent_index
        with torch.autocast(h_Bd.device.type, enabled=False):
            terms = self.model.loss_terms(output, self.loss)
        return torch.stack([weight * value for weight, value in terms.values()]).sum()


class PeerStep:
    """A training step of a peer: forward, backward, constraints and AdamW."""

    def __init__(self, model: FlatTopK | NaiveHSAE, training: TrainingConfig, precision: str):
        self.model, self.training, self.precision = model, training, precision
        self.device = model.E.device.type
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=self.device == "cuda"
        )

    def __call__(self, h_Bd: Tensor) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(h_Bd)
        loss.backward()
        if self.model.config.project_gradient:
            self.model.project_gradients()
        if self.training.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.normalize_decoder_weights()
