"""What ours is measured against in PyTorch: a flat TopK, and the H-SAE as a loop over parents. No kernel of ours runs.

Both train as ours does: AdamW, clipping, projected gradients and unit norms as the config says, bf16 autocast on a GPU.
Shapes: B rows, d width, P parents or latents, k active ones, C children per parent, K active children.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..config import HSAEConfig, TopKConfig, TrainingConfig
from ..models.constraints import atom_norms, gram, project_out, row_norms
from ..models.hsae import HierarchicalSAE
from ..models.jax_compat import CHILD_SLOPE
from ..models.losses import biorth_identity, biorth_offdiag, causal_orthogonality


def scaled(h_Bd: Tensor, kind: str) -> Tensor:
    """What the model reads; under `rms` rows have mean 0 and scale 1 here."""
    return h_Bd / (h_Bd.norm(dim=1, keepdim=True) + 1e-6) if kind == "unit_row" else h_Bd


def mean_error(x_Bd: Tensor, x_hat_Bd: Tensor, reduction: str) -> Tensor:
    """Mean over rows of the squared error, summed or averaged over d."""
    error_B = (x_Bd - x_hat_Bd).square().sum(1)
    return error_B.mean() / (x_Bd.shape[1] if reduction == "mean" else 1)


class FlatTopK(nn.Module):
    """TopK as its paper writes it: dense products on both sides of the k largest logits."""

    def __init__(self, config: TopKConfig, width: int, kind: str):
        super().__init__()
        self.config, self.kind = config, kind
        self.D = nn.Parameter(normalize(torch.randn(config.n_latents, width), dim=1))
        self.E = nn.Parameter(self.D.detach().clone())
        self.b_E = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(width))

    def forward(self, h_Bd: Tensor) -> Tensor:
        x = scaled(h_Bd, self.kind)
        logits_BP = linear(x - self.b_dec, self.E, self.b_E)
        value_Bk, self.chosen_Bk = logits_BP.topk(self.config.k, dim=1)
        codes_BP = torch.zeros_like(logits_BP).scatter(1, self.chosen_Bk, value_Bk.relu())
        return mean_error(x, codes_BP @ self.D + self.b_dec, self.config.recon_reduction)

    @torch.no_grad()
    def project_gradients(self) -> None:
        assert self.D.grad is not None
        self.D.grad.copy_(project_out(self.D.grad, self.D))

    @torch.no_grad()
    def normalize_decoder_weights(self) -> None:
        self.D.div_(row_norms(self.D, None))


class LoopHSAE(nn.Module):
    """An H-SAE that opens its parents one after the other, each for the rows that a mask finds.

    It starts from `model`'s tensors and gives the same loss and gradients; causal norms it lacks.
    """

    E: nn.Parameter
    D: nn.Parameter
    Down: nn.Parameter
    Up: nn.Parameter
    F: nn.Parameter
    G: nn.Parameter
    b_E: nn.Parameter | None
    b_F: nn.Parameter | None
    b_dec: nn.Parameter | None

    def __init__(self, model: HierarchicalSAE, losses: HSAEConfig):
        super().__init__()
        self.config, self.kind, self.temperature = losses, model.normalize, model.router_temperature
        self.b_E = self.b_F = self.b_dec = None
        copies = {id(tensor): nn.Parameter(tensor.detach().clone()) for tensor in model.tensors().values()}
        for name, tensor in model.tensors().items():
            setattr(self, name, copies[id(tensor)])
        self.threshold = getattr(model.router, "threshold", None)

    def forward(self, h_Bd: Tensor) -> Tensor:
        config = self.config
        x = scaled(h_Bd, self.kind)
        rows = x if self.b_dec is None else x - self.b_dec
        logits_BP = linear(rows, self.E, self.b_E)
        self.chosen_Bk, value_Bk = self._choose_parents(logits_BP)
        top = torch.zeros_like(logits_BP).scatter(1, self.chosen_Bk, value_Bk.to(logits_BP.dtype)) @ self.D
        if config.child_input == "residual":
            rows = rows - top
        where = [(self.chosen_Bk == p).nonzero(as_tuple=True) for p in range(config.n_parents)]
        pre_BkC = self._encode_children(rows, where)
        place_BK, code_BK = self._choose_children(pre_BkC, value_Bk)
        if self.b_dec is not None:
            top = top + self.b_dec
        x_hat = top + self._decode_children(
            torch.zeros_like(pre_BkC).flatten(1).scatter(1, place_BK, code_BK), where, x
        )
        loss = mean_error(x, x_hat, config.recon_reduction)
        loss = loss + config.top_level_beta * mean_error(x, top, config.recon_reduction)
        return loss + self._penalties(logits_BP, value_Bk, pre_BkC, code_BK)

    def _choose_parents(self, logits_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and codes [B, k]."""
        config = self.config
        score_BP = logits_BP.detach()
        if self.threshold is not None:
            score_BP = self._code(score_BP, 0.0)
        if config.gate == "straight_through" and self.training:
            scale = 1.0 if config.router_noise == "absolute" else score_BP.std(dim=1, keepdim=True, correction=0)
            score_BP = score_BP - self.temperature * scale * torch.empty_like(score_BP).exponential_().log()
        index_Bk = score_BP.topk(config.topk_parent, dim=1).indices
        logit_Bk = logits_BP.gather(1, index_Bk)
        value_Bk = self._code(logit_Bk, 0.0)
        if config.gate == "straight_through":
            soft_Bk = torch.softmax(logit_Bk / self.temperature, dim=1)
            value_Bk = value_Bk * (1 + soft_Bk - soft_Bk.detach())
        return index_Bk, value_Bk

    def _code(self, logit: Tensor, slope: float) -> Tensor:
        """relu, or the published form's offset with a slope below it."""
        if self.threshold is None:
            return torch.relu(logit)
        return torch.where(logit >= self.threshold, logit, slope * logit)

    def _encode_children(self, rows_Bd: Tensor, where: list[tuple[Tensor, ...]]) -> Tensor:
        """Pre-activations [B, k, C]."""
        pieces = [rows_Bd[row] @ Down.T @ F.T for (row, _), Down, F in zip(where, self.Down, self.F, strict=True)]
        places = torch.cat([row * self.config.topk_parent + slot for row, slot in where])
        stacked = torch.cat(pieces)
        pre_BkC = torch.zeros_like(stacked).index_copy(0, places, stacked).view(*self.chosen_Bk.shape, -1)
        return pre_BkC if self.b_F is None else pre_BkC + self.b_F[self.chosen_Bk]

    def _choose_children(self, pre_BkC: Tensor, value_Bk: Tensor) -> tuple[Tensor, Tensor]:
        """Where in [k*C] the children stand, and their codes, [B, K]."""
        config, (B, k, C) = self.config, pre_BkC.shape
        open_BkC = (value_Bk > 0).unsqueeze(2).expand(B, k, C)
        score_BkC = pre_BkC.detach().masked_fill(~open_BkC, -torch.inf)
        if config.child_budget == "shared":
            place_BK = score_BkC.flatten(1).topk(config.active_children, dim=1).indices
        else:
            offset_k1 = C * torch.arange(k, device=pre_BkC.device).unsqueeze(1)
            place_BK = (score_BkC.topk(config.topk_child, dim=2).indices + offset_k1).flatten(1)
        code_BK = self._code(pre_BkC.flatten(1).gather(1, place_BK), CHILD_SLOPE)
        return place_BK, code_BK * open_BkC.flatten(1).gather(1, place_BK)

    def _decode_children(self, codes_Bn: Tensor, where: list[tuple[Tensor, ...]], x_Bd: Tensor) -> Tensor:
        """Sum of code * (Up_p^T G_pj), [B, d]; codes [B, k*C]."""
        k, C = self.config.topk_parent, self.config.n_children_per_parent
        places = torch.cat([row * k + slot for row, slot in where])
        pieces = codes_Bn.reshape(-1, C)[places].split([len(row) for row, _ in where])
        decoded = torch.zeros_like(x_Bd)
        for (row, _), codes, Up, G in zip(where, pieces, self.Up, self.G, strict=True):
            decoded.index_add_(0, row, (codes @ G @ Up).to(decoded.dtype))
        return decoded

    def _penalties(self, logits_BP: Tensor, value_Bk: Tensor, pre_BkC: Tensor, code_BK: Tensor) -> Tensor:
        config = self.config
        total = logits_BP.new_zeros((), dtype=self.D.dtype)
        if self.threshold is not None:
            value_Bk, code_BK = self._code(logits_BP, 0.0), self._code(pre_BkC, CHILD_SLOPE).flatten(1)
        total = total + config.l1_parent * value_Bk.abs().sum(1, dtype=total.dtype).mean()
        total = total + config.l1_child * code_BK.abs().sum(1, dtype=total.dtype).mean()
        if config.biorth_lambda > 0:
            total = total + config.biorth_lambda * self._biorth()
        if config.gram_lambda > 0:
            total = total + config.gram_lambda * biorth_offdiag(self.D, self.D)
        if config.causal_ortho_lambda > 0:
            causal = causal_orthogonality(self.D, self.Up, self.G, None, config.causal_orth_form)
            total = total + config.causal_ortho_lambda * causal
        return total

    def _biorth(self) -> Tensor:
        if self.config.use_offdiag_biorth == "jax":
            E, D = (rows / (rows.norm(dim=1, keepdim=True) + 1e-6) for rows in (self.E, self.D))
            M = D @ E.T
            return torch.linalg.norm(M - M.diagonal()) / (len(M) ** 2 - len(M))
        form = biorth_offdiag if self.config.use_offdiag_biorth else biorth_identity
        return form(self.E, self.D) + form(self.F, self.G)

    @torch.no_grad()
    def project_gradients(self) -> None:
        assert self.D.grad is not None
        assert self.G.grad is not None
        self.D.grad.copy_(project_out(self.D.grad, self.D))
        normal_PCs = self.G @ gram(self.Up, None) if self.config.normalize_child == "atom" else self.G
        self.G.grad.copy_(project_out(self.G.grad, normal_PCs))

    @torch.no_grad()
    def normalize_decoder_weights(self) -> None:
        if self.config.normalize_decoder:
            self.D.div_(row_norms(self.D, None))
            norms = (
                atom_norms(self.Up, self.G, None) if self.config.normalize_child == "atom" else row_norms(self.G, None)
            )
            self.G.div_(norms)


class PeerStep:
    """A training step of a peer: forward, backward, constraints and AdamW."""

    def __init__(self, model: FlatTopK | LoopHSAE, training: TrainingConfig, precision: str):
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
