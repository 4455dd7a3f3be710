"""The router: which parents a row activates, and their codes (docs/method.md section 1).

Shapes: B rows, k parents of a row, P parents, d width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..ops import Routed, Rows
from ..ops.gate.naive import straight_through
from .base import Part
from .codes import ModelOutput
from .constraints import project_out, row_norms


class Parents(NamedTuple):
    """A row's parents: indices int64 [B, k], and value [B, k], their codes, 0 in an empty slot.

    logits [B, P] of all parents, without a gradient. code_sum [B]: the sum of all P codes, for the published form's L1.
    used (bool) [B, k]: slots with a code under a batch's budget; None: all.
    """

    indices: Tensor
    value: Tensor
    logits: Tensor
    code_sum: Tensor | None = None
    used: Tensor | None = None


class Router(Part):
    """Logits r = E x + b_E choose a row's parents, whose codes relu(r) weight the rows of D."""

    D: nn.Parameter
    E: nn.Parameter

    def __init__(self, config: HSAEConfig, start: Mapping[str, nn.Parameter]):
        super().__init__()
        self.config, self.slots = config, config.parent_slots
        self.D, self.E = start["D"], start["E"]
        self.b_E = nn.Parameter(torch.zeros(config.n_parents)) if config.use_encoder_bias else None
        self.code: Callable[[Tensor], Tensor] = torch.relu if config.magnitude == "relu" else torch.ones_like
        self.temperature: float | Tensor = config.router_temp_start

    def forward(self, rows: Rows, bias: Tensor | None = None, generator: torch.Generator | None = None) -> Parents:
        """The parents of rows x - b_dec. bias [P]: selection biases, which change the choice and not the codes."""
        noise = self._noise(generator) if self.training and self.config.gate == "straight_through" else None
        found = self.ops.route(rows, self.E, self.b_E, self.slots, bias=bias, noise=noise)
        if self.config.gate == "straight_through":
            return Parents(found.indices, self._through(found, rows), found.logits)
        return Parents(found.indices, self.code(found.logit), found.logits)

    def _noise(self, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
        """Gumbel noise times the temperature, and for `relative` times the row's standard deviation too."""

        def noise(logits_BP: Tensor) -> Tensor:
            exponential = torch.empty_like(logits_BP, requires_grad=False).exponential_(generator=generator)
            gumbel = -torch.log(exponential)
            if self.config.router_noise == "relative":
                gumbel = gumbel * logits_BP.detach().std(dim=1, keepdim=True, correction=0)
            return gumbel * self.temperature

        return noise

    def _through(self, found: Routed, rows: Rows) -> Tensor:
        """Codes times a gate of value 1 with the gradient of softmax(r / temperature), a straight-through estimate.

        The softmax is over the chosen parents. For k = 1 that would be constant, so it is over all P parents.
        """
        if self.slots == 1:
            soft_BP = torch.softmax(self.ops.linear(rows, self.E, self.b_E) / self.temperature, dim=1)
            return self.code(found.logit) * straight_through(soft_BP.gather(1, found.indices))
        if self.config.magnitude == "relu":
            return self.ops.gate(found.logit, self.temperature)
        return self.code(found.logit) * straight_through(torch.softmax(found.logit / self.temperature, dim=1))

    def l1(self, output: ModelOutput) -> Tensor:
        """A row's summed codes, mean over rows."""
        return output.codes.parent_value.sum(1).mean()

    @torch.no_grad()
    def normalize_(self, metric: Tensor | None) -> None:
        """Unit norm for D's rows, unless D is frozen."""
        if not self.D.requires_grad:
            return
        if metric is None:
            self.ops.normalize_rows_(self.D)
        else:
            self.D.div_(row_norms(self.D, metric).clamp_min(1e-12))

    @torch.no_grad()
    def project_(self, metric: Tensor | None) -> None:
        """Remove from D's gradient what would change its rows' norms."""
        if self.D.grad is None:
            return
        if metric is None:
            self.ops.project_out_(self.D.grad, self.D.detach())
        else:
            self.D.grad.copy_(project_out(self.D.grad, self.D @ metric))
