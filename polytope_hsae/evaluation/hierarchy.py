"""How concepts lie in a model's dictionary, and whether an H-SAE's hierarchy is one in use (docs/method.md section 5).

What no construction gives: the direction that reads a labelled child concept should be written by the best child
latent's atom as well as by its parent's. `evaluate_structure` adds what splitting.py, absorption.py and edges.py
measure.

Shapes: N labelled rows, T train rows, d residual width, P parents, R = P C children, Q child concepts, or parent
concepts in use, E child concepts with enough rows, K positive codes, M concepts with a child latent.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from polytope_hsae.evaluation.absorption import ABSORB_METRICS, ParentProbes, absorption_metrics, parent_probes
from polytope_hsae.evaluation.bootstrap import Evaluation, Metric, bootstrap_quantile, unavailable
from polytope_hsae.evaluation.concepts import (
    ConceptData,
    ConceptEvaluation,
    LabelledRows,
    labelled_children,
    labelled_rows,
    too_few_concepts,
)
from polytope_hsae.evaluation.edges import edge_metrics, match_children
from polytope_hsae.evaluation.firings import FLAT, sampled_rows
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations, row_codes
from polytope_hsae.evaluation.splitting import SPLIT_METRICS, split_metrics
from polytope_hsae.geometry.causal import Space
from polytope_hsae.geometry.estimators import ActivationClassStats
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

PERMUTATIONS = 20
MAX_ROWS = 1 << 20  # train rows that probes are made from
ROWS_PER_CHILD = 64  # train rows of a child concept that are encoded
ROWS_PER_PARENT = 512  # held-out rows of a parent concept that are encoded
BATCH = 8192


@dataclass(frozen=True)
class Probes:
    """What depends on the store and the labels alone, so that all models share it.

    probe_Qd: unit probes of Q child concepts in the unified coordinate; vector_root_dd: brings vectors there; row_N,
    child_N: labelled train rows and the concept (0 .. Q-1) each carries, at most as many of every concept.
    """

    probe_Qd: Tensor
    vector_root_dd: Tensor
    row_N: Tensor
    child_N: Tensor


def child_probes(data: ConceptData, rows_per_child: int = ROWS_PER_CHILD) -> tuple[Probes, ActivationClassStats]:
    """Shrinkage-LDA probes of the child concepts with `data.min_rows` train rows or more, and the sums of all classes.

    A probe is the covector S^-1 (mean of the child's rows - mean of all), S the shrunk covariance within classes, both
    of at most MAX_ROWS random train rows, labelled by train words. It is paired with atoms in the metric Sigma = S^-1
    at every hook, the final residual too: there, too, S says how rows vary and makes a probe dual to the mean
    difference that it was made from, so that an atom along it has cosine 1.
    """
    store, seed = data.store, data.resampling.seed
    found = labelled_children(data, "train")
    label_T = torch.full((store.n_rows("train"),), -1, dtype=torch.int64)
    label_T[torch.from_numpy(found.row_N)] = torch.from_numpy(found.child_N)
    rows = sampled_rows(len(label_T), MAX_ROWS, seed)
    stats = ActivationClassStats(data.concepts.n_children, store.width)
    for part in rows.split(BATCH):
        stats.update(store.acts("train", part), label_T[part])
    geometry = stats.geometry(data.shrinkage)
    used_Q = (stats.counts >= data.min_rows).nonzero().squeeze(1)
    # The mean difference as a vector and the probe made from it as a covector are the same in the unified coordinate.
    probe_Qd = normalize(geometry.whiten(stats.class_differences()[used_Q], Space.VECTOR), dim=1)
    of_concept_R = torch.full((stats.n_classes,), -1, dtype=torch.int64)
    of_concept_R[used_Q] = torch.arange(len(used_Q))
    child_T = of_concept_R[label_T.clamp_min(0)].where(label_T >= 0, -1)
    row_N = rows[child_T[rows] >= 0]
    kept_N = row_N[first_of_each(child_T[row_N], rows_per_child, seed)]
    return Probes(probe_Qd, geometry.sigma_sqrt, kept_N, child_T[kept_N]), stats


def first_of_each(class_N: Tensor, count: int, seed: int) -> Tensor:
    """Places of `count` random members of every class, ascending."""
    order_N = torch.randperm(len(class_N), generator=torch.Generator().manual_seed(seed))
    sorted_N = order_N[torch.argsort(class_N[order_N], stable=True)]
    starts = torch.searchsorted(class_N[sorted_N], class_N[sorted_N])
    return sorted_N[torch.arange(len(class_N)) - starts < count].sort().values


@torch.no_grad()
def probe_metrics(
    sae: SparseAutoencoder, children: SparseActivations, probes: Probes, seed: int = 0
) -> dict[str, Metric]:
    """Cosines of child concepts' probes with the best child latent's atom and with its parent's, medians over concepts.

    `children`: their codes on the probes' labelled rows. The best latent is the child with the largest F1 for the
    concept there. `probe_child`,
    `probe_parent` and `probe_min`, the smaller of the two; `n` concepts have a latent. Chance: the same latents dealt
    out at random among the concepts. Intervals are over these concepts.
    """
    names = ("probe_child", "probe_parent", "probe_min")
    if not isinstance(sae, HierarchicalSAE):
        return {name: unavailable(FLAT) for name in names}
    row_K, latent_K, _ = children.positive()
    child_N, shape = probes.child_N.numpy(), (len(probes.probe_Qd), children.n_latents)
    cell_K = child_N[row_K] * children.n_latents + latent_K
    hits_QR = np.bincount(cell_K, minlength=math.prod(shape)).reshape(shape).astype(np.float64)
    f1_QR = 2 * hits_QR / (np.bincount(child_N, minlength=shape[0])[:, None] + hits_QR.sum(0))
    best_Q, f1_Q = torch.from_numpy(f1_QR.argmax(1)), torch.from_numpy(f1_QR.max(1))
    used_Q = (f1_Q > 0).nonzero().squeeze(1)
    if len(used_Q) < 2:
        return {
            name: unavailable(f"{len(used_Q)} child concepts have a child latent, at least 2 needed") for name in names
        }
    latent_M, probe_Md = best_Q[used_Q], probes.probe_Qd[used_Q]
    owner_M = latent_M // sae.n_children
    atoms_Md = sae.atoms(owner_M)[torch.arange(len(latent_M)), latent_M % sae.n_children]
    written = [rows.double().cpu() @ probes.vector_root_dd for rows in (atoms_Md, sae.write_directions()[owner_M])]

    def cosines(order_M: Tensor) -> Tensor:
        child_M, parent_M = (cosine_similarity(probe_Md, rows[order_M], dim=1) for rows in written)
        return torch.stack([child_M, parent_M, torch.minimum(child_M, parent_M)])

    generator = torch.Generator().manual_seed(seed)
    dealt = [cosines(torch.randperm(len(latent_M), generator=generator)) for _ in range(PERMUTATIONS)]
    found_3M, chance_3 = cosines(torch.arange(len(latent_M))).numpy(), torch.cat(dealt, 1).quantile(0.5, 1).tolist()
    return {
        name: bootstrap_quantile(values_M, 0.5, chance)
        for name, values_M, chance in zip(names, found_3M, chance_3, strict=True)
    }


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
    concepts = data.concepts
    probes, stats = child_probes(data)
    concept_E = (stats.counts >= data.min_rows).nonzero().squeeze(1).numpy()
    parents = parent_probes(stats, concepts.child_parent_R, concepts.n_parents, data.shrinkage)
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
