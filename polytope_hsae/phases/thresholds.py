"""Set the encoder biases of a teacher's parents from train rows (docs/method.md section 4).

Shapes: N labelled rows, T distinct tokens of them, P concepts, Q of them in the teacher: the model's first parents.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..data.concepts import Concepts
from ..data.store import ActivationStore
from ..evaluation.concepts import LABEL_COLUMN, labelled_rows
from ..models.hsae import HierarchicalSAE
from .measure import concept_data
from .run import Run

BATCH_ROWS = 8192


@torch.no_grad()
def set_thresholds(
    run: Run, concepts: Concepts, names: tuple[str, ...], model: HierarchicalSAE, store: ActivationStore, share: float
) -> None:
    """Set b_E of the first parents, `names` by concept: r = 0 at `share` of the way from the mean logit of the other
    concepts to that of their own. A concept without train rows keeps its b_E.

    concepts: their train words label the rows; a permuted teacher has its own.
    """
    assert model.b_E is not None
    mean_PQ = mean_logits(run, concepts, len(names), model, store)
    concept_Q = [[parent.name for parent in concepts.parents].index(name) for name in names]
    seen_P = ~mean_PQ.isnan().any(dim=1)
    for slot, concept in enumerate(concept_Q):
        others_P = seen_P.clone()
        others_P[concept] = False
        if seen_P[concept] and others_P.any():
            own, other = mean_PQ[concept, slot], mean_PQ[others_P, slot].mean()
            model.b_E[slot] -= other + share * (own - other)


def mean_logits(run: Run, concepts: Concepts, n_slots: int, model: HierarchicalSAE, store: ActivationStore) -> Tensor:
    """Mean logit [P, Q] (float64, CPU) of every concept's train rows at the first parents, every token counting alike;
    NaN for a concept without rows.
    """
    data = replace(concept_data(run, run.config.eval.split), store=store, concepts=concepts)
    row_N, parent_N = labelled_rows(data, "train")
    token_N = store.column("train", LABEL_COLUMN[run.label]).cpu().numpy()[row_N]
    token_T, place_N, rows_T = np.unique(token_N, return_inverse=True, return_counts=True)
    sum_TQ = torch.zeros(len(token_T), n_slots, dtype=torch.float64)
    for start in range(0, len(row_N), BATCH_ROWS):
        batch = slice(start, start + BATCH_ROWS)
        x_Bd = model.to_normalized(store.acts("train", torch.from_numpy(row_N[batch])).to(run.device))[0]
        logits_BP = model.encode_parent(x_Bd if model.b_dec is None else x_Bd - model.b_dec)[2]
        sum_TQ.index_add_(0, torch.from_numpy(place_N[batch]), logits_BP[:, :n_slots].double().cpu())
    parent_T = torch.zeros(len(token_T), dtype=torch.int64)
    parent_T[torch.from_numpy(place_N)] = torch.from_numpy(parent_N)  # a token belongs to one concept
    mean_PQ = sum_TQ.new_zeros(concepts.n_parents, n_slots)
    mean_PQ.index_add_(0, parent_T, sum_TQ / torch.from_numpy(rows_T).unsqueeze(1))
    tokens_P = torch.bincount(parent_T, minlength=concepts.n_parents)
    return mean_PQ / tokens_P.unsqueeze(1)  # 0 / 0 is NaN
