"""The size of a code as a function of its logit (docs/method.md section 1)."""

import torch
from torch import Tensor

CHILD_SLOPE = 0.01  # of leaky_offset below the threshold (docs/method.md section 6)


def parent_code(logit: Tensor, kind: str, threshold: Tensor | None) -> Tensor:
    """Parents' codes before selection: relu, 1 (`binary`), or the logit from the threshold up and 0 below it."""
    return _code(logit, kind, threshold, 0.0)


def child_code(logit: Tensor, kind: str, threshold: Tensor | None) -> Tensor:
    """Children's codes before selection: as parents', but `leaky_offset` keeps a hundredth below the threshold."""
    return _code(logit, kind, threshold, CHILD_SLOPE)


def _code(logit: Tensor, kind: str, threshold: Tensor | None, slope: float) -> Tensor:
    if kind == "binary":
        return torch.ones_like(logit)
    if kind == "relu":
        return torch.relu(logit)
    assert threshold is not None
    return torch.where(logit >= threshold, logit, slope * logit)
