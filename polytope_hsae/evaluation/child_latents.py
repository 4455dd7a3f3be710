"""Which latent stands for a child concept, chosen on labelled train rows for every model alike (docs/method.md §5).

In an H-SAE the children of the latent that the parent concept was mapped to are candidates, and they have to tell a
child's rows from its siblings'; in a flat model all latents are, against the rows of all child concepts asked for.

Shapes: N labelled rows, R child concepts, C children per parent of the model, K codes of a row.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.concepts import LabelledChildren, auroc_matrix
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations, row_codes
from polytope_hsae.models.base import SparseAutoencoder


def map_children(
    sae: SparseAutoencoder,
    store: ActivationStore,
    concepts: Concepts,
    train: LabelledChildren,
    children: list[int],
    latent_P: IntArray,
) -> IntArray:
    """Latent of each of `children` (rows of `concepts.json`), one-to-one by Hungarian assignment on AUROC; -1: none.

    Of an H-SAE the number is flat, parent * C + child; of a flat model it is a latent. `train`: labelled train rows;
    `latent_P`: the parents' latents, -1 where a parent has none, and then its children have none.
    """
    owner_R = np.asarray(concepts.child_parent_R, dtype=np.int64)
    wanted = np.isin(owner_R[train.child_N], owner_R[children])
    row_N, child_N = train.row_N[wanted], train.child_N[wanted]
    latent_R = np.full(concepts.n_children, -1, dtype=np.int64)
    parents, codes, _ = row_codes(sae, store, "train", row_N)
    if not sae.n_children:
        _assign(parents, child_N, np.unique(child_N), np.arange(sae.n_parents), latent_R)
        return latent_R[children]
    for parent in np.unique(owner_R[children]):
        latent = latent_P[parent]
        if latent < 0:
            continue
        rows = owner_R[child_N] == parent
        inside = codes.index_Nk[rows] // sae.n_children == latent
        slots = np.where(inside, codes.index_Nk[rows] % sae.n_children, 0)
        acts = SparseActivations(slots, np.where(inside, codes.value_Nk[rows], 0), sae.n_children)
        flat = latent * sae.n_children + np.arange(sae.n_children)
        _assign(acts, child_N[rows], np.unique(child_N[rows]), flat, latent_R)
    return latent_R[children]


def _assign(
    acts: SparseActivations, child_N: IntArray, present: IntArray, numbers_L: IntArray, latent_R: IntArray
) -> None:
    """Write the latents of the children that are present into `latent_R`; a lone child has no rows to be told from."""
    if len(present) < 2:
        return
    auroc_QL = auroc_matrix(acts, np.searchsorted(present, child_N), len(present))
    chosen, latents = linear_sum_assignment(auroc_QL, maximize=True)
    latent_R[present[chosen]] = numbers_L[latents]
