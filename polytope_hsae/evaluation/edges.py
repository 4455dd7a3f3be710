"""Are the ontology's edges those of the model? An edge is parent concept -> child concept (docs/method.md section 5).

An edge is recovered when the latent matched to the child concept is a child of the latent matched to the parent
concept. Both matches are made on train rows, each one-to-one, and neither looks at the other.

Shapes: N rows, E child concepts (edges), P parent concepts, C children per parent of the model.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from polytope_hsae.evaluation.bootstrap import Evaluation, Units, summarise, unavailable
from polytope_hsae.evaluation.concepts import auroc_matrix
from polytope_hsae.evaluation.firings import FLAT
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations

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
    *,
    bootstrap: int = 1000,
    seed: int = 0,
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
    return summarise(units, chance, bootstrap, seed)
