"""Products of rows with the weights of the parents that each row was routed to.

`naive` says what is computed, `cpu` and `triton` compute it faster. Shapes: B rows, k slots per row, P parents,
C children per parent, K children per row, s subspace width, d width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

UNIT_ROW_EPS = 1e-6


class Rows(NamedTuple):
    """Rows that a product reads.

    values [B, d]; origin [d] or None: what was subtracted from them, where that is learned and the rows themselves pass
    no gradient on: the product then gives it its gradient from sums over the batch.
    """

    values: Tensor
    origin: Tensor | None = None


@dataclass
class Routing:
    """The parents that each row is routed to, int64 [B, k]. used (bool) [B, k]: the slots in use; None: all.

    `plan` is the kernels' own: their pairs of a row and a parent, grouped by parent.
    """

    parent_Bk: Tensor
    n_parents: int
    used_Bk: Tensor | None = None
    plan: Any = None


class Routed(NamedTuple):
    """The chosen parents: indices int64 [B, k], logit [B, k]; logits [B, P] of all, without a gradient.

    code_sum [B] or None: the sum of all of a row's codes.
    """

    indices: Tensor
    logit: Tensor
    logits: Tensor
    code_sum: Tensor | None


class Children(NamedTuple):
    """A row's children: indices [B, K], as p*C + j; place [B, K], among the row's k*C; value [B, K], their codes."""

    indices: Tensor
    place: Tensor
    value: Tensor


class Decoded(NamedTuple):
    """x_hat, x_hat_top [B, d], and their rows' squared errors [B] against x."""

    x_hat: Tensor
    x_hat_top: Tensor
    error: Tensor
    error_top: Tensor
