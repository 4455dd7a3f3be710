"""Sparse codes, the common language of every autoencoder here."""

from typing import NamedTuple

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


def load(index_Bk: Tensor, value_Bk: Tensor, n: int) -> Tensor:
    """In how many rows each of n latents is active: [n], in the type of the codes. Nothing waits for a GPU."""
    used_Bk = (value_Bk > 0).to(value_Bk.dtype)
    return used_Bk.new_zeros(n).scatter_add_(0, index_Bk.flatten(), used_Bk.flatten())


class Dead(NamedTuple):
    """Masks of what has not been in use for too long: parents [P] (a flat SAE's latents), children [P*C]."""

    parents: Tensor
    children: Tensor


class ModelOutput(NamedTuple):
    """One forward pass in the model's normalised coordinates.

    x, x_hat, x_hat_top [B,d]: input, reconstruction, reconstruction by the parents alone; codes as encode returns them.
    router_logits [B,P] before selection; child_pre [B,k,C] pre-activations of the routed parents' children.
    A flat SAE has x_hat_top = x_hat, child_pre of width 0, and prefixes [n,B,d]: reconstructions by prefixes of its
    latents, the last one x_hat (n = 1 but for Matryoshka).
    parent_sum [B]: each row's summed parent codes, all P of them, where a kernel has taken it along; the logits then
    carry no gradient. errors: each row's squared error [B] of x_hat and of x_hat_top, where a kernel has taken them
    along; x_hat and x_hat_top then carry no gradient.
    """

    x: Tensor
    x_hat: Tensor
    x_hat_top: Tensor
    codes: Codes
    router_logits: Tensor
    child_pre: Tensor
    prefixes: Tensor | None = None
    parent_sum: Tensor | None = None
    errors: tuple[Tensor, Tensor] | None = None
