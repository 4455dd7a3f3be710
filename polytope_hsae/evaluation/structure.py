"""How concepts lie in a model's dictionary: split, absorbed, along the ontology's edges, in line with its probes.

Shapes: N labelled rows, d residual width, Q parent concepts in use, E child concepts, P parent concepts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.absorption import ParentProbes, absorption_metrics, parent_probes
from polytope_hsae.evaluation.bootstrap import Evaluation
from polytope_hsae.evaluation.concepts import ConceptEvaluation, Label, LabelledRows, labelled_rows
from polytope_hsae.evaluation.edges import edge_metrics, match_children
from polytope_hsae.evaluation.hierarchy import Probes, child_probes, first_of_each, probe_metrics, read_classes
from polytope_hsae.evaluation.row_codes import IntArray, row_codes
from polytope_hsae.evaluation.splitting import split_metrics
from polytope_hsae.models.base import SparseAutoencoder

ROWS_PER_CHILD = 64  # train rows of a child concept that are encoded
ROWS_PER_PARENT = 512  # held-out rows of a parent concept that are encoded


@dataclass(frozen=True)
class LabelledSample:
    """What depends on the store and the labels alone, so that all models share it.

    `probes` of child concepts with enough train rows, and a sample of these rows; `concept_E`: which child concepts
    these are; `parents`: probes of parent concepts; `held_out`: rows of `fold` and the parent concept of each.
    """

    probes: Probes
    concept_E: IntArray
    parents: ParentProbes
    fold: str
    held_out: LabelledRows


def labelled_sample(
    store: ActivationStore,
    concepts: Concepts,
    *,
    label: Label,
    vocab_size: int,
    fold: str,
    belief_threshold: float = 0.3,
    min_rows: int = 20,
    shrinkage: float = 0.05,
    seed: int = 0,
) -> LabelledSample:
    """Probes from at most about a million train rows, and at most so many rows of every concept."""
    labels: dict[str, Any] = {"label": label, "vocab_size": vocab_size}
    classes = read_classes(store, concepts, belief_threshold=belief_threshold, seed=seed, **labels)
    probes = child_probes(classes, rows_per_child=ROWS_PER_CHILD, min_rows=min_rows, shrinkage=shrinkage, seed=seed)
    concept_E = (classes.stats.counts >= min_rows).nonzero().squeeze(1).numpy()
    parents = parent_probes(classes.stats, concepts.child_parent_R, concepts.n_parents, shrinkage)
    found = labelled_rows(store, fold, concepts, fold=fold, belief_threshold=belief_threshold, **labels)
    kept_N = first_of_each(torch.from_numpy(found.parent_N), ROWS_PER_PARENT, seed).numpy()
    return LabelledSample(probes, concept_E, parents, fold, LabelledRows(found.row_N[kept_N], found.parent_N[kept_N]))


def evaluate_structure(
    sae: SparseAutoencoder,
    store: ActivationStore,
    concepts: Concepts,
    sample: LabelledSample,
    mapped: ConceptEvaluation,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Split, absorption, edges and cosines of probes of one model; `mapped` has the concepts in use and their latents.

    Edges and cosines concern all child concepts with enough train rows.
    """
    common: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
    probes, parents_Q = sample.probes, mapped.parents_Q
    train_codes = row_codes(sae, store, "train", probes.row_N.numpy())
    child_N = probes.child_N.numpy()
    parent_of_E = np.asarray(concepts.child_parent_R, dtype=np.int64)[sample.concept_E]
    result = Evaluation(probe_metrics(sae, store, probes, seed))
    matched_E = match_children(train_codes.children, child_N, len(sample.concept_E))
    result |= edge_metrics(matched_E, parent_of_E, mapped.latent_P, sae.n_children, **common)

    used_N = np.isin(sample.held_out.parent_N, parents_Q)
    row_N, label_N = sample.held_out.row_N[used_N], np.searchsorted(parents_Q, sample.held_out.parent_N[used_N])
    codes = row_codes(sae, store, sample.fold, row_N)
    in_use_N = np.isin(parent_of_E[child_N], parents_Q)
    train_label_N = np.searchsorted(parents_Q, parent_of_E[child_N[in_use_N]])
    train = train_codes.of_rows(in_use_N).together()
    common["lacking"] = mapped.lacking
    result |= split_metrics(train, train_label_N, codes.together(), label_N, parents_Q, **common)
    acts_Nd = store.acts(sample.fold, torch.from_numpy(row_N))
    latent_Q = mapped.latent_P[parents_Q]
    return result | absorption_metrics(sae, codes, acts_Nd, label_N, latent_Q, sample.parents, parents_Q, **common)
