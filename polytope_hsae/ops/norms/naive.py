"""Unit norms of rows, in place."""

import torch
from torch import Tensor


def normalize_rows_(rows: Tensor) -> None:
    """Divide every row [..., d] by its norm."""
    rows.div_(rows.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12))


def project_out_(grad: Tensor, normal: Tensor) -> None:
    """Remove from every row of grad [..., d] its component along the row of `normal`."""
    unit = torch.nn.functional.normalize(normal, dim=-1)
    grad.sub_((grad * unit).sum(-1, keepdim=True) * unit)
