"""What only the published JAX H-SAE has (docs/method.md section 6): codes with an offset, an L1 over all codes, and an
orthogonality penalty. A parent's code is its logit from 1/sqrt(d) up and 0 below it; a child's is a hundredth of its
pre-activation below it. Parents are chosen by their codes, of which many are 0: among equal ones the first come first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..ops import Rows
from .children import FactoredChildren
from .codes import ModelOutput
from .router import Parents, Router

CHILD_SLOPE = 0.01  # below the threshold


class JaxRouter(Router):
    """A router whose codes are logits from a threshold up."""

    threshold: Tensor

    def __init__(self, config: HSAEConfig, start: Mapping[str, nn.Parameter]):
        super().__init__(config, start)
        self.register_buffer("threshold", torch.tensor(self.D.shape[1] ** -0.5))

    def forward(self, rows: Rows, bias: Tensor | None = None, generator: torch.Generator | None = None) -> Parents:
        wants_sum = self.config.l1_parent > 0
        found = self.ops.route(
            rows, self.E, self.b_E, self.slots, bias=bias, threshold=self.threshold, sum_codes=wants_sum
        )
        value = torch.where(found.logit >= self.threshold, found.logit, 0.0)
        return Parents(found.indices, value, found.logits, found.code_sum)

    def l1(self, output: ModelOutput) -> Tensor:
        """The summed codes of all P parents, mean over rows."""
        assert output.code_sum is not None
        return output.code_sum.mean()


class JaxChildren(FactoredChildren):
    """Factored children whose codes below a threshold are a hundredth of their pre-activations."""

    threshold: Tensor

    def __init__(self, config: HSAEConfig, start: Mapping[str, nn.Parameter]):
        super().__init__(config, start)
        self.register_buffer("threshold", torch.tensor(self.Up.shape[2] ** -0.5), persistent=False)
        self.code = self._code

    def _code(self, pre: Tensor) -> Tensor:
        return torch.where(pre >= self.threshold, pre, CHILD_SLOPE * pre)

    def l1(self, output: ModelOutput) -> Tensor:
        """The summed sizes of all opened children's codes, mean over rows."""
        return self.ops.l1(output.child_pre, self.threshold, CHILD_SLOPE).mean()
