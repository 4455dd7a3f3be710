"""Which latents stand for child concepts, and are the ontology's edges those of the model? (docs/method.md section 5)

An edge is parent concept -> child concept. It is recovered when the latent matched to the child concept is a child of
the latent matched to the parent concept. Both matches are made on train rows, each one-to-one, and neither looks at the
other. `map_children`, for steering, takes the parents' latents as given.

Shapes: N rows, E child concepts (edges), R child concepts in all, P parent concepts, C children of a latent.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from polytope_hsae.evaluation.bootstrap import RESAMPLING, Evaluation, Resampling, Units, summarise, unavailable
from polytope_hsae.evaluation.concepts import ConceptData, LabelledChildren, auroc_matrix
from polytope_hsae.evaluation.firings import FLAT
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations, row_codes
from polytope_hsae.models.base import SparseAutoencoder

EDGE_METRICS = ("edge_precision", "edge_recall")


def match_children(acts: SparseActivations, label_N: IntArray, n_concepts: int) -> IntArray:
    """Child latent of each concept [E], one-to-one, maximising summed AUROC on rows with labels 0 .. E-1; -1 where the
    latent is no better than a guess, or there are not enough. Memory: E times the latents that are on in these rows.
    """
    used = np.unique(acts.positive()[1])
    place_L = np.full(acts.n_latents, len(used))  # silent latents, and slots not in use, share the last column
    place_L[used] = np.arange(len(used))
    compact = SparseActivations(place_L[acts.index_Nk], acts.value_Nk, len(used) + 1)
    auroc_EL = auroc_matrix(compact, label_N, n_concepts)[:, : len(used)]
    latent_E = np.full(n_concepts, -1, dtype=np.int64)
    if not np.isfinite(auroc_EL).all() or not len(used):
        return latent_E
    chosen, places = linear_sum_assignment(auroc_EL, maximize=True)
    better = auroc_EL[chosen, places] > 0.5
    latent_E[chosen[better]] = used[places[better]]
    return latent_E


def edge_metrics(
    latent_E: IntArray,
    parent_E: IntArray,
    latent_P: IntArray,
    n_children: int,
    resampling: Resampling = RESAMPLING,
) -> Evaluation:
    """`edge_recall`, over all edges, and `edge_precision`, over those that the model has between matched latents.

    `latent_E`: the child latent (p * C + j) of each child concept, -1 for none; `parent_E`: its parent concept;
    `latent_P`: each parent concept's latent, -1 for none. The model has an edge to child concept e from the parent
    concept that the owner of its latent is matched to, if there is one. Intervals are over parent concepts. Chance: the
    matched child latents dealt out at random among the child concepts that have one.
    """
    if not n_children:
        return Evaluation({name: unavailable(FLAT) for name in EDGE_METRICS})
    if not len(latent_E):
        return Evaluation({name: unavailable("no child concept has enough train rows") for name in EDGE_METRICS})
    matched_E = latent_E >= 0
    owner_E = np.where(matched_E, latent_E // n_children, -2)  # -1 is a parent concept without a latent
    predicted_E = np.isin(owner_E, latent_P[latent_P >= 0])
    correct_E = owner_E == latent_P[parent_E]
    owned_E = (owner_E[matched_E][:, None] == latent_P[parent_E[matched_E]]).mean(axis=0)  # of all dealt latents
    by_chance = float(owned_E.sum()) if matched_E.any() else 0.0
    parents_U, unit_E = np.unique(parent_E, return_inverse=True)
    sums = {
        name: np.bincount(unit_E, weights=values_E, minlength=len(parents_U))
        for name, values_E in (("correct", correct_E), ("predicted", predicted_E), ("edges", np.ones(len(parent_E))))
    }
    units = {
        "edge_precision": Units.ratio(sums["correct"], sums["predicted"], parents_U),
        "edge_recall": Units.ratio(sums["correct"], sums["edges"], parents_U),
    }
    chance = {"edge_recall": by_chance / len(parent_E)}
    if predicted_E.any():
        chance["edge_precision"] = by_chance / float(predicted_E.sum())
    return summarise(units, chance, *resampling)


def map_children(
    sae: SparseAutoencoder, data: ConceptData, train: LabelledChildren, children: list[int], latent_P: IntArray
) -> IntArray:
    """Latent of each of `children` (rows of `concepts.json`), one-to-one by Hungarian assignment on AUROC; -1: none.

    In an H-SAE the children of the parent concept's latent are candidates, and they have to tell a child's rows from
    its siblings'. In a flat model all latents are, against the rows of all child concepts asked for. Of an H-SAE the
    number is flat, parent * C + child; of a flat model it is a latent. `train`: labelled train rows; `latent_P`: the
    parents' latents, -1 where a parent has none, and then its children have none.
    """
    owner_R = np.asarray(data.concepts.child_parent_R, dtype=np.int64)
    wanted = np.isin(owner_R[train.child_N], owner_R[children])
    row_N, child_N = train.row_N[wanted], train.child_N[wanted]
    latent_R = np.full(data.concepts.n_children, -1, dtype=np.int64)
    parents, codes, _ = row_codes(sae, data.store, "train", row_N)
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
