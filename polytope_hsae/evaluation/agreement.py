"""Do activations and tokens name the same directions? cos(m, l_tokens) per parent (docs/method.md §3).

At the final residual, in the unified coordinate: m = Sigma^(1/2) (mean of the rows that carry the parent - mean of all
rows), a vector, against the teacher's l_p, which comes from unembedding rows alone.

Shapes: Q parents compared, d residual width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.data.concepts import FOLDS
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import Resampling, Units, bootstrap_mean, bootstrap_units, paired
from polytope_hsae.evaluation.concepts import ConceptData, IntArray, labelled_rows
from polytope_hsae.teacher import Teacher

BATCH = 4096


def teacher_agreement(data: ConceptData, teacher: Teacher, train_mean_d: Tensor) -> dict[str, Any]:
    """cos(m_p, l_p) over parents with `data.min_rows` labelled train rows, by the words whose rows make m.

    `same_words`: train words, which l_p is made from; `other_words`: val and test words, which it has not seen. Each
    has `cosine` (mean over parents), `other_parents` (mean of cos(m_p, l_q), q != p), `random` (cos with a random
    direction in place of l_p), `margin` (own minus other parents', on the same resamples) and a value per parent.
    Intervals are over parents.
    """
    words = {"same_words": FOLDS[:1], "other_words": FOLDS[1:]}
    store, concepts = data.store, data.concepts
    drawn = teacher.random_like(data.resampling.seed).parent_unified
    row_of_name = {parent.name: row for row, parent in enumerate(concepts.parents)}
    rows_Q = np.array([row_of_name[name] for name in teacher.parent_names])
    found = {}
    for name, folds in words.items():
        labelled = [labelled_rows(data, "train", fold) for fold in folds]
        row_N = np.concatenate([each.row_N for each in labelled])
        parent_N = np.concatenate([each.parent_N for each in labelled])
        counts_P = np.bincount(parent_N, minlength=concepts.n_parents)
        used_Q = np.flatnonzero(counts_P[rows_Q] >= max(1, data.min_rows))
        means_Qd = _means(store, row_N, parent_N, concepts.n_parents)[rows_Q[used_Q]] - train_mean_d.double().cpu()
        m_Qd = torch.nn.functional.normalize(means_Qd @ teacher.sigma_sqrt, dim=1)
        found[name] = _cosines(m_Qd, teacher.parent_unified[used_Q], drawn[used_Q], rows_Q[used_Q], data.resampling)
    return {"label": data.label, **found}


def _means(store: ActivationStore, row_N: IntArray, parent_N: IntArray, n_parents: int) -> Tensor:
    """Mean activation of each parent's train rows, float64 [P, d]; 0 without rows."""
    sums_Pd = torch.zeros(n_parents, store.width, dtype=torch.float64)
    index_N, owner_N = torch.from_numpy(row_N), torch.from_numpy(parent_N)
    for rows_B, owner_B in zip(index_N.split(BATCH), owner_N.split(BATCH), strict=True):
        sums_Pd.index_add_(0, owner_B, store.acts("train", rows_B).double().cpu())
    return sums_Pd / torch.bincount(owner_N, minlength=n_parents).clamp_min(1)[:, None]


def _cosines(
    m_Qd: Tensor, teacher_Qd: Tensor, random_Qd: Tensor, keys_Q: IntArray, resampling: Resampling
) -> dict[str, Any]:
    cosine_QQ = (m_Qd @ torch.nn.functional.normalize(teacher_Qd, dim=1).T).numpy()
    random_Q = (m_Qd * torch.nn.functional.normalize(random_Qd, dim=1)).sum(1).numpy()
    own_Q, n = np.diag(cosine_QQ), len(keys_Q)
    others_Q = (cosine_QQ.sum(1) - own_Q) / (n - 1) if n > 1 else np.full(n, np.nan)
    own, others = Units.mean(own_Q, keys_Q), Units.mean(others_Q, keys_Q)
    return {
        "cosine": bootstrap_units(own, *resampling, 0.0).to_json(),
        "other_parents": bootstrap_units(others, *resampling).to_json(),
        "random": bootstrap_mean(random_Q, *resampling).to_json(),
        "margin": paired(others, own, "difference", *resampling).to_json(),
        "parents": {"parent": keys_Q.tolist(), "cosine": own_Q.tolist()},
    }
