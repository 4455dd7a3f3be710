"""How concepts lie in a model's dictionary: split, absorbed, along the ontology's edges, in line with its probes.

Shapes: N labelled rows, d residual width, Q parent concepts in use, E child concepts, P parent concepts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from polytope_hsae.evaluation.absorption import ABSORB_METRICS, ParentProbes, absorption_metrics, parent_probes
from polytope_hsae.evaluation.bootstrap import Evaluation
from polytope_hsae.evaluation.concepts import (
    ConceptData,
    ConceptEvaluation,
    LabelledRows,
    labelled_rows,
    too_few_concepts,
)
from polytope_hsae.evaluation.edges import edge_metrics, match_children
from polytope_hsae.evaluation.hierarchy import Probes, child_probes, first_of_each, probe_metrics, read_classes
from polytope_hsae.evaluation.row_codes import IntArray, row_codes
from polytope_hsae.evaluation.splitting import SPLIT_METRICS, split_metrics
from polytope_hsae.models.base import SparseAutoencoder

ROWS_PER_CHILD = 64  # train rows of a child concept that are encoded
ROWS_PER_PARENT = 512  # held-out rows of a parent concept that are encoded


@dataclass(frozen=True)
class LabelledSample:
    """What depends on the store and the labels alone, so that all models share it.

    `probes` of child concepts with enough train rows, and a sample of these rows; `concept_E`: which child concepts
    these are; `parents`: probes of parent concepts; `held_out`: rows of the fold and the parent concept of each.
    """

    probes: Probes
    concept_E: IntArray
    parents: ParentProbes
    held_out: LabelledRows


def labelled_sample(data: ConceptData) -> LabelledSample:
    """Probes from at most about a million train rows, and at most so many rows of every concept."""
    classes, concepts = read_classes(data), data.concepts
    probes = child_probes(classes, data, ROWS_PER_CHILD)
    concept_E = (classes.stats.counts >= data.min_rows).nonzero().squeeze(1).numpy()
    parents = parent_probes(classes.stats, concepts.child_parent_R, concepts.n_parents, data.shrinkage)
    found = labelled_rows(data, data.fold)
    kept_N = first_of_each(torch.from_numpy(found.parent_N), ROWS_PER_PARENT, data.resampling.seed).numpy()
    return LabelledSample(probes, concept_E, parents, LabelledRows(found.row_N[kept_N], found.parent_N[kept_N]))


def evaluate_structure(
    sae: SparseAutoencoder, data: ConceptData, sample: LabelledSample, mapped: ConceptEvaluation
) -> Evaluation:
    """Split, absorption, edges and cosines of probes of one model; `mapped` has the concepts in use and their latents.

    Edges and cosines concern all child concepts with enough train rows.
    """
    store, probes, parents_Q, resampling = data.store, sample.probes, mapped.parents_Q, data.resampling
    train_codes = row_codes(sae, store, "train", probes.row_N.numpy())
    child_N = probes.child_N.numpy()
    parent_of_E = np.asarray(data.concepts.child_parent_R, dtype=np.int64)[sample.concept_E]
    result = Evaluation(probe_metrics(sae, train_codes.children, probes, resampling.seed))
    matched_E = match_children(train_codes.children, child_N, len(sample.concept_E))
    result |= edge_metrics(matched_E, parent_of_E, mapped.latent_P, sae.n_children, resampling)
    if len(parents_Q) < 2:
        return result | too_few_concepts(SPLIT_METRICS + ABSORB_METRICS, len(parents_Q), mapped.lacking)

    used_N = np.isin(sample.held_out.parent_N, parents_Q)
    row_N, label_N = sample.held_out.row_N[used_N], np.searchsorted(parents_Q, sample.held_out.parent_N[used_N])
    codes = row_codes(sae, store, data.fold, row_N)
    in_use_N = np.isin(parent_of_E[child_N], parents_Q)
    train_label_N = np.searchsorted(parents_Q, parent_of_E[child_N[in_use_N]])
    train = train_codes.of_rows(in_use_N).together()
    result |= split_metrics(train, train_label_N, codes.together(), label_N, parents_Q, resampling)
    acts_Nd = store.acts(data.fold, torch.from_numpy(row_N))
    latent_Q = mapped.latent_P[parents_Q]
    return result | absorption_metrics(sae, codes, acts_Nd, label_N, latent_Q, sample.parents, parents_Q, resampling)
