"""Sparse codes, the common language of every autoencoder here."""

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Sparse codes of B rows.

    parent_index [B,k] int64 and parent_value [B,k] >= 0: the active parents (a flat SAE's latents).
    child_index [B,K] int64, flat as parent * C + child, and child_value [B,K] >= 0 (K = 0 for a flat SAE).
    row_scale [B] or None: norms of the input rows, which data.normalize = unit_row divides by.
    A slot whose value is 0 is not in use. With `magnitude: leaky_offset` a child's value may be slightly negative; it
    takes part in decoding and is not counted as active.
    """

    parent_index: Tensor
    parent_value: Tensor
    child_index: Tensor
    child_value: Tensor
    row_scale: Tensor | None = None

    def l0(self) -> Tensor:
        """Active parents and children of each row: [B] int64."""
        return (self.parent_value > 0).sum(1) + (self.child_value > 0).sum(1)

    def dense_parents(self, n_parents: int) -> Tensor:
        """Parent codes as [B, P]; built on request only."""
        dense = self.parent_value.new_zeros(len(self.parent_value), n_parents)
        return dense.scatter_add(1, self.parent_index, self.parent_value)


class Firings(NamedTuple):
    """A batch's codes, its rows, and in how many of them each parent [P] and each child [P*C] is on, as floats."""

    codes: Codes
    rows: int
    parents: Tensor
    children: Tensor


@torch.no_grad()
def firings(codes: Codes, n_parents: int, n_children: int) -> Firings:
    """Count what fires, of P parents and, of all, n_children = P*C children. Nothing waits for a GPU."""
    parents_P = _count(codes.parent_index, codes.parent_value, n_parents)
    children_R = _count(codes.child_index, codes.child_value, n_children)
    return Firings(codes, len(codes.parent_index), parents_P, children_R)


def _count(index_Bn: Tensor, value_Bn: Tensor, n: int) -> Tensor:
    used_Bn = torch.gt(value_Bn, 0, out=torch.empty_like(value_Bn))
    if index_Bn.stride(0) == 0:  # all rows have the same slots: they are added up first
        index_Bn, used_Bn = index_Bn[:1], used_Bn.sum(0, keepdim=True)
    return used_Bn.new_zeros(n).scatter_add_(0, index_Bn.flatten(), used_Bn.flatten())


class ModelOutput(NamedTuple):
    """One forward pass in the model's normalised coordinates.

    x, x_hat, x_hat_top [B,d]: input, reconstruction, reconstruction by the parents alone; codes as encode returns them.
    errors, errors_top [B]: the rows' squared errors of the two reconstructions. router_logits [B,P] before selection,
    in an H-SAE without a gradient. It has child_pre [B,k,C], the pre-activations of the routed parents' children,
    and under the published form code_sum [B], each row's summed parent codes, all P of them. A flat SAE has
    x_hat_top = x_hat, and prefix_errors [n,B]: those of reconstructions by prefixes of its latents, the last one x_hat
    (n = 1 but for Matryoshka).
    """

    x: Tensor
    x_hat: Tensor
    x_hat_top: Tensor
    codes: Codes
    router_logits: Tensor
    errors: Tensor
    errors_top: Tensor
    child_pre: Tensor | None = None
    code_sum: Tensor | None = None
    prefix_errors: Tensor | None = None
