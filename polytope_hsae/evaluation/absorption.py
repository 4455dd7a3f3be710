"""Do other latents absorb a concept's rows? (docs/method.md section 5)

A concept is absorbed in a row when a probe finds it there, its mapped latent is silent, and another latent writes at
least CARRIED of what the probe reads. A parent's own gated children are silent whenever it is, so they cannot absorb
it by construction; `absorb_with_children` therefore also counts rows in which one of them writes that much, and more
than the parent itself.

Shapes: N rows, d residual width, P parents, R = P C children, Q concepts, M positive codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    Evaluation,
    FloatArray,
    Resampling,
    Units,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.row_codes import IntArray, RowCodes
from polytope_hsae.geometry.estimators import ActivationClassStats
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

CARRIED = 0.4  # share of the probe's projection that an absorbing latent writes
ABSORB_METRICS = ("absorb", "absorb_with_children", "probe_recall")
BLOCK = 256  # parents whose atoms are made at once


@dataclass(frozen=True)
class ParentProbes:
    """`read_Pd` float64: a covector of every parent concept, scaled so that its rows project to 1 on average and all
    rows to 0 about their mean `mean_d`; 0 for a concept without train rows.
    """

    read_Pd: Tensor
    mean_d: Tensor


def parent_probes(
    stats: ActivationClassStats, child_parent: list[int], n_parents: int, shrinkage: float = 0.05
) -> ParentProbes:
    """Shrinkage-LDA probes S^-1 m / (m' S^-1 m), m a parent's mean minus the mean of all rows."""
    mean_Pd = stats.parent_differences(child_parent, n_parents)
    read_Pd = mean_Pd @ stats.geometry(shrinkage).sigma
    along_P1 = (read_Pd * mean_Pd).sum(1, keepdim=True)
    return ParentProbes(torch.where(along_P1 > 0, read_Pd / along_P1.clamp_min(1e-30), 0.0), stats.mean())


def written_along(sae: SparseAutoencoder, read_Qd: Tensor) -> tuple[FloatArray, FloatArray]:
    """What a code of 1 adds to each probe in units of its decoder row: by parents [Q, P] and by children [Q, R]."""
    read_Qd = read_Qd.to(sae.D)
    parents_QP = (read_Qd @ sae.D.T).double().cpu().numpy()
    if not isinstance(sae, HierarchicalSAE):
        return parents_QP, np.zeros((len(read_Qd), 0))
    blocks = torch.arange(sae.n_parents, device=sae.D.device).split(BLOCK)
    children = [torch.einsum("qd,pcd->qpc", read_Qd, sae.atoms(parents)).flatten(1) for parents in blocks]
    return parents_QP, torch.cat(children, dim=1).double().cpu().numpy()


@torch.no_grad()
def absorption_metrics(
    sae: SparseAutoencoder,
    codes: RowCodes,
    acts_Nd: Tensor,
    label_N: IntArray,
    latent_Q: IntArray,
    probes: ParentProbes,
    keys_Q: IntArray,
    resampling: Resampling = RESAMPLING,
) -> Evaluation:
    """`absorb`, `absorb_with_children` and `probe_recall`, means over two or more concepts of shares of their rows.

    Rows [N, d] with their codes and labels 0 .. Q-1; `latent_Q` is each concept's mapped latent (-1: one that is always
    silent) and `keys_Q` the concept's row in `probes`. A row is probe-positive where its own concept's probe projects
    it beyond 0.5, half way to the concept's mean; `probe_recall` is the share of such rows, and its chance the share of
    the other concepts' rows. The two rates are shares of the probe-positive rows; a concept without any has none. Their
    chance: the mapped latents dealt out at random among the concepts. For a flat model both rates are the same.
    """
    n_concepts = len(keys_Q)
    read_Qd = probes.read_Pd[torch.from_numpy(keys_Q)]
    projected_NQ = ((acts_Nd.double().cpu() - probes.mean_d) @ read_Qd.T).numpy()
    found_NQ = projected_NQ > 0.5
    own_N = projected_NQ[np.arange(len(label_N)), label_N]
    kept_N = np.flatnonzero(own_N > 0.5)
    silent, covered = _carried(sae, codes.of_rows(kept_N), own_N[kept_N], label_N[kept_N], latent_Q, read_Qd)

    rows_Q = np.bincount(label_N, minlength=n_concepts)
    positive_Q = np.bincount(label_N[kept_N], minlength=n_concepts)
    units = {"probe_recall": Units.ratio(positive_Q / rows_Q, np.ones(n_concepts), keys_Q)}
    elsewhere_Q = (found_NQ.sum(0) - positive_Q) / (len(label_N) - rows_Q)
    chance: dict[str, float | None] = {"probe_recall": float(elsewhere_Q.mean())}
    for name, absorbed_NQ in (("absorb", silent), ("absorb_with_children", silent | covered)):
        of_row_N = absorbed_NQ[np.arange(len(kept_N)), label_N[kept_N]]
        with np.errstate(invalid="ignore"):
            rate_Q = np.bincount(label_N[kept_N], weights=of_row_N, minlength=n_concepts) / positive_Q
            dealt_Q = np.bincount(label_N[kept_N], weights=absorbed_NQ.mean(1), minlength=n_concepts) / positive_Q
        units[name] = Units.mean(rate_Q, keys_Q)
        chance[name] = float(np.nanmean(dealt_Q)) if positive_Q.any() else None
    result = summarise(units, chance, *resampling)
    if not positive_Q.any():
        nothing = unavailable("the probes find no concept in these rows")
        return Evaluation(result.metrics | dict.fromkeys(("absorb", "absorb_with_children"), nothing), units)
    return result


def _carried(
    sae: SparseAutoencoder,
    codes: RowCodes,
    projection_N: FloatArray,
    label_N: IntArray,
    latent_Q: IntArray,
    read_Qd: Tensor,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For every row and every mapped latent [N, Q], were it the row's: is it silent while another latent carries the
    row's concept; does a child of its own carry it, and more than the latent itself?
    """
    by_parents_QP, by_children_QR = written_along(sae, read_Qd)

    def shares(part_codes: IntArray, row_M: IntArray, value_M: NDArray[np.float32], table: FloatArray) -> FloatArray:
        written_M = value_M * codes.scale_N[row_M] * table[label_N[row_M], part_codes]
        return written_M / projection_N[row_M]

    row_M, parent_M, value_M = codes.parents.positive()
    share_M = shares(parent_M, row_M, value_M, by_parents_QP)
    row_K, child_K, value_K = codes.children.positive()
    share_K = shares(child_K, row_K, value_K, by_children_QR)

    any_N = np.zeros(len(label_N), dtype=bool)
    any_N[row_M[share_M >= CARRIED]] = True
    any_N[row_K[share_K >= CARRIED]] = True
    silent_NQ = (codes.parents.columns(latent_Q) <= 0) & any_N[:, None]

    covered_NQ = np.zeros_like(silent_NQ)
    if by_children_QR.shape[1]:
        concept_of_parent_P = np.full(sae.n_parents, -1)
        concept_of_parent_P[latent_Q[latent_Q >= 0]] = np.flatnonzero(latent_Q >= 0)
        own_share_NQ = np.zeros(silent_NQ.shape)
        mapped_M = np.flatnonzero(concept_of_parent_P[parent_M] >= 0)
        own_share_NQ[row_M[mapped_M], concept_of_parent_P[parent_M[mapped_M]]] = share_M[mapped_M]
        concept_K = concept_of_parent_P[child_K // sae.n_children]
        over_K = np.flatnonzero((share_K >= CARRIED) & (concept_K >= 0))
        over_K = over_K[share_K[over_K] > own_share_NQ[row_K[over_K], concept_K[over_K]]]
        covered_NQ[row_K[over_K], concept_K[over_K]] = True
    return silent_NQ, covered_NQ
