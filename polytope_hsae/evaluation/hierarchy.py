"""Is an H-SAE's hierarchy one in use? What children's atoms say, beside who fires with whom (docs/method.md section 5).

What no construction gives: the direction that reads a labelled child concept should be written by the best child
latent's atom as well as by its parent's.

Shapes: B rows of a batch, N labelled rows, d residual width, P parents, R = P C children, Q child concepts, k, K slots.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from polytope_hsae.evaluation.bootstrap import Metric, bootstrap_quantile, unavailable
from polytope_hsae.evaluation.concepts import ConceptData, labelled_children
from polytope_hsae.evaluation.firings import FLAT, sampled_rows
from polytope_hsae.evaluation.row_codes import SparseActivations
from polytope_hsae.geometry.causal import Space
from polytope_hsae.geometry.estimators import ActivationClassStats
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

PERMUTATIONS = 20
MAX_ROWS = 1 << 20  # train rows that probes are made from
BATCH = 8192


class ClassRows(NamedTuple):
    """Train rows by child concept: their running sums, and the number and concept [N] of those that carry one."""

    stats: ActivationClassStats
    row_N: Tensor
    child_N: Tensor


def read_classes(data: ConceptData) -> ClassRows:
    """Sums of at most MAX_ROWS random train rows, labelled by train words."""
    found = labelled_children(data, "train")
    store = data.store
    label_T = torch.full((store.n_rows("train"),), -1, dtype=torch.int64)
    label_T[torch.from_numpy(found.row_N)] = torch.from_numpy(found.child_N)
    rows = sampled_rows(len(label_T), MAX_ROWS, data.resampling.seed)
    stats = ActivationClassStats(data.concepts.n_children, store.width)
    for part in rows.split(BATCH):
        stats.update(store.acts("train", part), label_T[part])
    labelled_N = rows[label_T[rows] >= 0]
    return ClassRows(stats, labelled_N, label_T[labelled_N])


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


def child_probes(classes: ClassRows, data: ConceptData, rows_per_child: int) -> Probes:
    """Shrinkage-LDA probes of the child concepts with `data.min_rows` of the rows (train words) or more.

    A probe is the covector S^-1 (mean of the child's rows - mean of all), S the shrunk covariance within classes. It is
    paired with atoms in the metric Sigma = S^-1 at every hook, the final residual too: there, too, S says how rows vary
    and makes a probe dual to the mean difference that it was made from, so that an atom along it has cosine 1.
    """
    stats = classes.stats
    geometry = stats.geometry(data.shrinkage)
    used_Q = (stats.counts >= data.min_rows).nonzero().squeeze(1)
    # The mean difference as a vector and the probe made from it as a covector are the same in the unified coordinate.
    probe_Qd = normalize(geometry.whiten(stats.class_differences()[used_Q], Space.VECTOR), dim=1)
    of_concept_R = torch.full((stats.n_classes,), -1, dtype=torch.int64)
    of_concept_R[used_Q] = torch.arange(len(used_Q))
    child_N = of_concept_R[classes.child_N]
    row_N, child_N = classes.row_N[child_N >= 0], child_N[child_N >= 0]
    kept_N = first_of_each(child_N, rows_per_child, data.resampling.seed)
    return Probes(probe_Qd, geometry.sigma_sqrt, row_N[kept_N], child_N[kept_N])


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
