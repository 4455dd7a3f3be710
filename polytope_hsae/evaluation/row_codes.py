"""The codes of chosen rows, sparse and on the CPU: what every concept metric reads.

Shapes: N rows, k slots of a row, L latents, P parents, C children per parent, Q chosen latents, M positive codes.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from polytope_hsae.data.store import ActivationStore
from polytope_hsae.models.base import SparseAutoencoder

IntArray = NDArray[np.int64]


class SparseActivations(NamedTuple):
    """Codes of N rows: latent index and value, [N, k] each; a latent occurs at most once with value > 0, and only
    those values count.
    """

    index_Nk: IntArray
    value_Nk: NDArray[np.float32]
    n_latents: int

    def columns(self, latents_Q: IntArray) -> NDArray[np.float32]:
        """Dense values [N, Q] of the given latents; -1 stands for a latent that is always silent."""
        column_of_latent_L = np.full(self.n_latents, -1)
        wanted_Q = np.flatnonzero(latents_Q >= 0)
        column_of_latent_L[latents_Q[wanted_Q]] = wanted_Q
        dense_NQ = np.zeros((len(self.index_Nk), len(latents_Q)), dtype=np.float32)
        column_Nk = column_of_latent_L[self.index_Nk]
        row_M, slot_M = np.nonzero((column_Nk >= 0) & (self.value_Nk > 0))
        dense_NQ[row_M, column_Nk[row_M, slot_M]] = self.value_Nk[row_M, slot_M]
        return dense_NQ

    def positive(self) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
        """Row, latent and value of every positive code, [M] each."""
        row_M, slot_M = np.nonzero(self.value_Nk > 0)
        return row_M, self.index_Nk[row_M, slot_M], self.value_Nk[row_M, slot_M]

    def of_rows(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "SparseActivations":
        """The codes of some of the rows."""
        return SparseActivations(self.index_Nk[rows], self.value_Nk[rows], self.n_latents)


class RowCodes(NamedTuple):
    """Codes of N rows: of parents (a flat model's latents) and of children, and what a code of 1 writes, in units of
    its decoder row: scale [N].
    """

    parents: SparseActivations
    children: SparseActivations
    scale_N: NDArray[np.float32]

    def together(self) -> SparseActivations:
        """Parents and children as one dictionary: parents first, then child p * C + j as latent P + p * C + j."""
        parents, children = self.parents, self.children
        return SparseActivations(
            np.concatenate([parents.index_Nk, children.index_Nk + parents.n_latents], axis=1),
            np.concatenate([parents.value_Nk, children.value_Nk], axis=1),
            parents.n_latents + children.n_latents,
        )

    def of_rows(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "RowCodes":
        """The codes of some of the rows."""
        return RowCodes(self.parents.of_rows(rows), self.children.of_rows(rows), self.scale_N[rows])


@torch.no_grad()
def row_codes(
    sae: SparseAutoencoder, store: ActivationStore, split: str, row_N: IntArray, batch_size: int = 4096
) -> RowCodes:
    """Codes of the given rows of a split, kept sparse. Raises ValueError for a model in training mode."""
    device = sae.write_directions().device
    empty = np.zeros((0, 0))
    parents, children, scale = [(empty, empty)], [(empty, empty)], [np.zeros(0, np.float32)]
    for start in range(0, len(row_N), batch_size):
        acts_Bd = store.acts(split, torch.from_numpy(row_N[start : start + batch_size])).to(device)
        codes = sae.encode(acts_Bd)
        parents.append((codes.parent_index.cpu().numpy(), codes.parent_value.float().cpu().numpy()))
        children.append((codes.child_index.cpu().numpy(), codes.child_value.float().cpu().numpy()))
        scale_B = sae.data_scale.expand(len(acts_Bd)) if codes.row_scale is None else codes.row_scale
        scale.append(scale_B.float().cpu().numpy())
    n_children = sae.n_parents * sae.n_children
    return RowCodes(_joined(parents, sae.n_parents), _joined(children, n_children), np.concatenate(scale))


def _joined(batches: list[tuple[NDArray[Any], NDArray[Any]]], n_latents: int) -> SparseActivations:
    """Indices and values [B, k] of batches, whose numbers of slots may differ."""
    shape = sum(len(index_Bk) for index_Bk, _ in batches), max(index_Bk.shape[1] for index_Bk, _ in batches)
    index_Nk, value_Nk, start = np.zeros(shape, np.int64), np.zeros(shape, np.float32), 0
    for index_Bk, value_Bk in batches:
        place = slice(start, start + len(index_Bk)), slice(index_Bk.shape[1])
        index_Nk[place], value_Nk[place] = index_Bk, value_Bk
        start += len(index_Bk)
    return SparseActivations(index_Nk, value_Nk, n_latents)
