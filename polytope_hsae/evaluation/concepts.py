"""Do latents carry the labelled concepts? Purity, leakage and recall of parents (docs/method.md §5).

A row is labelled with a parent concept. Train rows come from train documents and train words, test rows from
test documents and test words (val likewise). The map concept -> latent is chosen on train rows, one-to-one by
Hungarian assignment on AUROC, for every model alike; the teacher's own slots can be given instead.

Edge cases, decided here once. *Concepts in use* (Q of them) have at least `min_rows` rows in the evaluated
fold and in train: this depends on the labels alone, so it is equal for every arm. A concept without a latent
(more concepts than latents, or an empty slot) counts as a latent that is always silent. A latent silent on
all evaluated rows has purity 0, recall 0, AUROC 0.5. Rows on which no mapped latent is active have no
leakage; they are left out and counted, and a concept all of whose rows are such has no leakage value. Purity
and leakage are averaged over rows within a concept first and over concepts second: with that, permuted labels
give exactly (Q - 1)/Q leakage on average, whatever the sizes of the concepts.

Shapes: N labelled rows, k active latents of a row, L latents, Q concepts in use, P parents of the ontology.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    Evaluation,
    FloatArray,
    Resampling,
    Units,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations, row_codes
from polytope_hsae.models.base import SparseAutoencoder

Label = Literal["current_token", "next_token", "belief"]
LABEL_COLUMN: dict[Label, str] = {"current_token": "token", "next_token": "next_token", "belief": "belief_token"}
CONCEPT_METRICS = ("purity", "purity_auroc", "leakage", "leakage_all_rows", "recall", "no_fire_rate")


class LabelledRows(NamedTuple):
    """Row numbers in the split [N] (ascending) and the parent each carries [N]."""

    row_N: IntArray
    parent_N: IntArray


class LabelledChildren(NamedTuple):
    """Row numbers in the split [N] (ascending) and the child concept (row of concepts.json) each carries [N]."""

    row_N: IntArray
    child_N: IntArray


@dataclass(frozen=True)
class ConceptEvaluation:
    """`result`: metrics and per-concept units; `parents_Q`: parent rows in use; `latent_P`: latent per
    parent, or -1; `rows_Q`: evaluated rows per concept in use; `lacking`: how many parents have too few rows, in words
    (empty: none).
    """

    result: Evaluation
    parents_Q: IntArray
    latent_P: IntArray
    rows_Q: IntArray
    lacking: str = ""

    def to_json(self) -> list[dict[str, Any]]:
        """One object per concept in use, with its value of every metric (None where it has none)."""
        out = []
        for q, parent in enumerate(self.parents_Q.tolist()):
            record = {"parent": parent, "latent": int(self.latent_P[parent]), "rows": int(self.rows_Q[q])}
            for name, units in self.result.units.items():
                present = bool(units.present_U[q])
                record[name] = float(units.numerator_U[q] / units.denominator_U[q]) if present else None
            out.append(record)
        return out


@dataclass(frozen=True)
class ConceptData:
    """Rows that carry concepts: what the concept metrics of all models share.

    label: `current_token`: a row carries a child concept whose token it is; `next_token`: whose token follows it;
    `belief`: on which the model puts at least `belief_threshold`, where the most probable of the concept's tokens is in
    the fold. fold: the held-out split and its words. min_rows: labelled rows that a concept needs. shrinkage: of the
    covariance behind probes. Raises ValueError for another label.
    """

    store: ActivationStore
    concepts: Concepts
    label: Label
    vocab_size: int
    fold: str = "test"
    belief_threshold: float = 0.3
    min_rows: int = 20
    shrinkage: float = 0.05
    resampling: Resampling = RESAMPLING

    def __post_init__(self) -> None:
        if self.label not in get_args(Label):
            raise ValueError(f"label: found {self.label!r}, allowed: {', '.join(get_args(Label))}")


def labelled_rows(data: ConceptData, split: str, words: str | None = None) -> LabelledRows:
    """Rows of a split that carry a parent through a word of the fold `words` (default: the split's)."""
    row_N, child_N = labelled_children(data, split, words)
    return LabelledRows(row_N, np.asarray(data.concepts.child_parent_R, dtype=np.int64)[child_N])


def labelled_children(data: ConceptData, split: str, words: str | None = None) -> LabelledChildren:
    """Rows of a split that carry a child concept through a word of the fold `words` (default: the split's)."""
    child_of_token_V = data.concepts.token_to_child(vocab_size=data.vocab_size, folds=(words or split,))

    def column(name: str) -> IntArray:
        return data.store.column(split, name).cpu().numpy().astype(np.int64)

    token_N = column(LABEL_COLUMN[data.label])
    child_N = np.where(token_N >= 0, child_of_token_V.cpu().numpy().astype(np.int64)[np.maximum(token_N, 0)], -1)
    if data.label == "belief":
        believed_N = data.store.column(split, "belief_prob").cpu().numpy() >= data.belief_threshold
        child_N = np.where((child_N >= 0) & believed_N, column("belief_concept"), -1)
    row_N = np.flatnonzero(child_N >= 0)
    return LabelledChildren(row_N, child_N[row_N])


def auroc_matrix(acts: SparseActivations, label_N: IntArray, n_labels: int) -> FloatArray:
    """AUROC [Q, L] of every latent for every label against the rows of all other labels, ties by average
    rank.

    Exact, and in memory O(N k + Q L): codes are never negative, so the zeros of a latent are its lowest tie
    group and only the active entries need sorting. A label without rows, or with all rows, gives NaN.
    """
    n_rows, n_latents = len(label_N), acts.n_latents
    row_M, latent_M, value_M = acts.positive()
    order_M = np.lexsort((value_M, latent_M))
    latent_M, value_M, label_M = latent_M[order_M], value_M[order_M], label_N[row_M[order_M]]
    active_L = np.bincount(latent_M, minlength=n_latents)
    silent_L = n_rows - active_L
    assert (silent_L >= 0).all(), "a latent occurs twice in one row"

    position_M = np.arange(len(latent_M)) - (np.cumsum(active_L) - active_L)[latent_M]
    new_group_M = np.ones(len(latent_M), dtype=bool)
    new_group_M[1:] = (np.diff(latent_M) != 0) | (np.diff(value_M) != 0)
    group_M = np.cumsum(new_group_M) - 1
    mean_position_M = (np.bincount(group_M, weights=position_M) / np.bincount(group_M))[group_M]
    rank_M = silent_L[latent_M] + mean_position_M + 1

    cell_M, cells = label_M * n_latents + latent_M, n_labels * n_latents
    active_QL = np.bincount(cell_M, minlength=cells).reshape(n_labels, n_latents)
    of_active_QL = np.bincount(cell_M, weights=rank_M, minlength=cells).reshape(n_labels, n_latents)
    n_pos_Q1 = np.bincount(label_N, minlength=n_labels)[:, None].astype(np.float64)
    rank_sum_QL = of_active_QL + (n_pos_Q1 - active_QL) * (silent_L + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (rank_sum_QL - n_pos_Q1 * (n_pos_Q1 + 1) / 2) / (n_pos_Q1 * (n_rows - n_pos_Q1))


def map_concepts(acts: SparseActivations, parent_N: IntArray, n_parents: int, min_rows: int = 20) -> IntArray:
    """Latent [P] of each parent, one-to-one, maximising the summed AUROC; -1: too few rows."""
    counts_P = np.bincount(parent_N, minlength=n_parents)
    auroc_PL = auroc_matrix(acts, parent_N, n_parents)
    candidates = np.flatnonzero((counts_P >= max(1, min_rows)) & np.isfinite(auroc_PL).all(axis=1))
    latent_P = np.full(n_parents, -1, dtype=np.int64)
    chosen, latents = linear_sum_assignment(auroc_PL[candidates], maximize=True)
    latent_P[candidates[chosen]] = latents
    return latent_P


def too_few_concepts(names: Iterable[str], n_concepts: int, lacking: str) -> Evaluation:
    """The metrics of these names without a value, because fewer than two concepts have enough rows."""
    why = f"2 concepts are needed, {n_concepts} {'has' if n_concepts == 1 else 'have'} enough rows"
    return Evaluation(dict.fromkeys(names, unavailable(f"{why}: {lacking}" if lacking else why)))


def concept_metrics(
    acts_NQ: NDArray[np.float32], label_N: IntArray, keys_Q: IntArray, resampling: Resampling = RESAMPLING
) -> Evaluation:
    """Metrics of mapped latents [N, Q] (column q is concept q's latent) on rows with labels 0 .. Q-1.

    `purity`: class-balanced mean activation of a concept's latent on its own rows over the sum across all
    concepts. `leakage`: share of a row's mapped activation on other concepts' latents. `leakage_all_rows`: the
    same with a row without any mapped activation counted as leaked, so that silence is no gain. `recall`: share
    of a concept's rows on which its latent is active; its chance is the rate on other concepts' rows.
    `purity_auroc`: own rows against the other concepts'. `no_fire_rate`: share of rows on which no
    concept's latent is on. `keys_Q` names the concepts, at least two.
    """
    n_concepts = acts_NQ.shape[1]
    rows_Q = np.bincount(label_N, minlength=n_concepts)
    assert len(keys_Q) == len(rows_Q)
    assert (rows_Q > 0).all(), "every concept in use has rows"
    acts_NQ = acts_NQ.astype(np.float64)
    own_QN = (label_N == np.arange(n_concepts)[:, None]).astype(np.float64)
    mean_QQ = own_QN @ acts_NQ / rows_Q[:, None]  # [concept of the rows, latent]
    rate_QQ = own_QN @ (acts_NQ > 0) / rows_Q[:, None]
    total_Q = mean_QQ.sum(axis=0)
    purity_Q = np.divide(np.diag(mean_QQ), total_Q, out=np.zeros(n_concepts), where=total_Q > 0)

    total_N = acts_NQ.sum(axis=1)
    active_N = total_N > 0
    own_N = acts_NQ[np.arange(len(label_N)), label_N]
    leak_N = np.divide(total_N - own_N, total_N, out=np.zeros(len(total_N)), where=active_N)
    with_sum_Q = np.bincount(label_N[active_N], minlength=n_concepts)
    leak_sum_Q = np.bincount(label_N, weights=leak_N, minlength=n_concepts)
    leakage_Q = np.divide(leak_sum_Q, with_sum_Q, out=np.full(n_concepts, np.nan), where=with_sum_Q > 0)
    silent_Q = rows_Q - with_sum_Q

    columns = np.broadcast_to(np.arange(n_concepts), acts_NQ.shape)
    auroc_Q = np.diag(auroc_matrix(SparseActivations(columns, acts_NQ, n_concepts), label_N, n_concepts))
    elsewhere = (rate_QQ.sum() - np.trace(rate_QQ)) / (n_concepts * (n_concepts - 1))
    units = {
        "purity": Units.mean(purity_Q, keys_Q),
        "purity_auroc": Units.mean(auroc_Q, keys_Q),
        "leakage": Units.mean(leakage_Q, keys_Q),
        "leakage_all_rows": Units.mean((leak_sum_Q + silent_Q) / rows_Q, keys_Q),
        "recall": Units.mean(np.diag(rate_QQ), keys_Q),
        "no_fire_rate": Units.ratio(silent_Q, rows_Q, keys_Q),
    }
    chance = {
        "purity": 1 / n_concepts,
        "purity_auroc": 0.5,
        "leakage": (n_concepts - 1) / n_concepts,
        "leakage_all_rows": 1 - float(active_N.mean()) / n_concepts,
        "recall": float(elsewhere),
    }
    return summarise(units, chance, *resampling)


def evaluate_concepts(sae: SparseAutoencoder, data: ConceptData, mapping: IntArray | None = None) -> ConceptEvaluation:
    """Concept metrics of one model on held-out documents and words, intervals over concepts.

    `mapping` [P] gives a latent per parent (-1: none), for instance the teacher's own slots; without it the
    map is chosen on train rows. Raises ValueError for a mapping of the wrong length or that uses a latent
    twice.
    """
    train, test = labelled_rows(data, "train"), labelled_rows(data, data.fold)
    n_parents, min_rows = data.concepts.n_parents, data.min_rows
    if mapping is None:
        train_acts = row_codes(sae, data.store, "train", train.row_N).parents
        latent_P = map_concepts(train_acts, train.parent_N, n_parents, min_rows)
    else:
        latent_P = _checked_mapping(mapping, n_parents, sae.n_parents)
    train_rows_P, test_rows_P = (np.bincount(found.parent_N, minlength=n_parents) for found in (train, test))
    parents_Q = np.flatnonzero(np.minimum(train_rows_P, test_rows_P) >= max(1, min_rows))
    n_used, n_lacking, lacking = len(parents_Q), n_parents - len(parents_Q), ""
    if n_lacking:
        lacking = f"{n_lacking} of {n_parents} parents have fewer than {min_rows} labelled rows in train or {data.fold}"
    if n_used < 2:
        result = too_few_concepts(CONCEPT_METRICS, n_used, lacking)
    else:
        used_N = np.isin(test.parent_N, parents_Q)
        test_acts = row_codes(sae, data.store, data.fold, test.row_N[used_N]).parents
        label_N = np.searchsorted(parents_Q, test.parent_N[used_N])
        result = concept_metrics(test_acts.columns(latent_P[parents_Q]), label_N, parents_Q, data.resampling)
    return ConceptEvaluation(result, parents_Q, latent_P, test_rows_P[parents_Q], lacking)


def _checked_mapping(mapping: IntArray, n_parents: int, n_latents: int) -> IntArray:
    latent_P = np.asarray(mapping, dtype=np.int64)
    used = latent_P[latent_P >= 0]
    if latent_P.shape != (n_parents,):
        raise ValueError(f"mapping: found shape {latent_P.shape}, allowed: one latent for each of {n_parents} parents")
    if len(np.unique(used)) != len(used) or (used >= n_latents).any():
        raise ValueError(f"mapping: found a repeated latent or one >= {n_latents}, allowed: each latent once")
    return latent_P
