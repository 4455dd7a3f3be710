"""Is an H-SAE's hierarchy one in use? Who fires with whom, and what children's atoms say (docs/method.md section 5).

P(parent on | child on) is 1 by construction and counted all the same. What no construction gives: P(child on | parent
on) on held-out rows, no parent that is on everywhere, and probes: the direction that reads a labelled child concept
should be written by the best child latent's atom as well as by its parent's.

Shapes: B rows of a batch, N labelled rows, d residual width, P parents, R = P C children, Q child concepts, k, K slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.evaluation.bootstrap import Metric, unavailable
from polytope_hsae.evaluation.concepts import Label, labelled_children
from polytope_hsae.evaluation.reconstruction import check_eval_mode
from polytope_hsae.geometry.causal import Space
from polytope_hsae.geometry.estimators import ActivationClassStats
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.hsae import HierarchicalSAE

FLAT = "a flat model has no children"
MIN_PARENT_ROWS = 50  # of a parent, for its children's P(child | parent) to be counted
PERMUTATIONS = 20
BATCH = 8192


class Firings:
    """Counts of a split's codes: rows; parents on [P]; children on [R]; children on while their parent is [R]."""

    def __init__(self, n_parents: int, n_children: int, device: torch.device | str = "cpu") -> None:
        self.n_children, self.rows = n_children, 0
        self.parents_P = torch.zeros(n_parents, dtype=torch.int64, device=device)
        self.children_R = torch.zeros(n_parents * n_children, dtype=torch.int64, device=device)
        self.both_R = torch.zeros_like(self.children_R)

    def add(self, codes: Codes) -> None:
        """Count one batch."""
        self.rows += len(codes.parent_index)
        on_Bk = codes.parent_value > 0
        self.parents_P.scatter_add_(0, codes.parent_index.flatten(), on_Bk.long().flatten())
        if self.n_children:
            on_BK = codes.child_value > 0
            owner_BK1 = (codes.child_index // self.n_children).unsqueeze(2)
            with_parent_BK = ((owner_BK1 == codes.parent_index.unsqueeze(1)) & on_Bk.unsqueeze(1)).any(2)
            child_N = codes.child_index.flatten()
            self.children_R.scatter_add_(0, child_N, on_BK.long().flatten())
            self.both_R.scatter_add_(0, child_N, (on_BK & with_parent_BK).long().flatten())

    @property
    def dead_parents(self) -> float:
        """Share of all parents (a flat model's latents) that were never on."""
        return float((self.parents_P == 0).double().mean())

    @property
    def dead_children(self) -> float | None:
        """Share of all children that were never on, those of dead parents too; None for a flat model."""
        return float((self.children_R == 0).double().mean()) if self.n_children else None

    @property
    def l0_parents(self) -> float:
        """Parents on per row."""
        return float(self.parents_P.sum()) / self.rows

    @property
    def l0_children(self) -> float:
        """Children on per row."""
        return float(self.children_R.sum()) / self.rows


@torch.no_grad()
def count_firings(
    sae: SparseAutoencoder, store: ActivationStore, split: str, max_rows: int | None = None, seed: int = 0
) -> Firings:
    """Firings on a split, or on `max_rows` random rows of it."""
    check_eval_mode(sae)
    device = sae.write_directions().device
    found = Firings(sae.n_parents, sae.n_children, device)
    for rows in sampled_rows(store.n_rows(split), max_rows, seed).split(BATCH):
        found.add(sae.encode(store.acts(split, rows).to(device)))
    return found


def sampled_rows(n_rows: int, max_rows: int | None, seed: int) -> Tensor:
    """All row numbers, or `max_rows` random ones in ascending order."""
    if max_rows is None or max_rows >= n_rows:
        return torch.arange(n_rows)
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values


def firing_metrics(found: Firings) -> dict[str, Metric]:
    """Conditional rates and loads of a split's firings.

    `parent_given_child`: of all child codes, those whose parent is on; chance: as often as that parent is on anyway.
    `child_given_parent`, with `_q25` and `_q75`: over children whose parent is on in MIN_PARENT_ROWS rows or more, the
    median share of these rows with the child on; chance: the share of all rows. `largest_load`: share of rows with the
    parent on that is on most; chance: all on equally often. `entropy`: of the parents' shares of all parent codes, in
    nats; chance: its largest value. A flat model's latents count as parents.
    """
    parent_P = found.parents_P.double().cpu()
    total = float(parent_P.sum())
    load_P = parent_P / max(found.rows, 1)
    share_P = parent_P / max(total, 1.0)
    entropy = float(-(share_P * share_P.clamp_min(1e-30).log()).sum())
    even = total / max(found.rows, 1) / len(parent_P)
    metrics = {
        "largest_load": Metric(float(load_P.max()), None, even, found.rows),
        "entropy": Metric(entropy, None, math.log(len(parent_P)), found.rows),
    }
    names = ("parent_given_child", "child_given_parent", "child_given_parent_q25", "child_given_parent_q75")
    if not found.n_children:
        return metrics | {name: unavailable(FLAT) for name in names}
    child_R, both_R = found.children_R.double().cpu(), found.both_R.double().cpu()
    parent_R, load_R = (each_P.repeat_interleave(found.n_children) for each_P in (parent_P, load_P))
    fired = float(child_R.sum())
    if fired == 0:
        metrics["parent_given_child"] = unavailable("no child is on")
    else:
        chance = float((child_R * load_R).sum()) / fired
        metrics["parent_given_child"] = Metric(float(both_R.sum()) / fired, None, chance, int(fired))
    used_R = parent_R >= MIN_PARENT_ROWS
    if not used_R.any():
        why = f"no parent is on in {MIN_PARENT_ROWS} rows"
        return metrics | {name: unavailable(why) for name in names[1:]}
    given_M, alone_M = (both_R / parent_R.clamp_min(1))[used_R], (child_R / found.rows)[used_R]
    for name, place in zip(names[1:], (0.5, 0.25, 0.75), strict=True):
        metrics[name] = Metric(float(given_M.quantile(place)), None, float(alone_M.quantile(place)), len(given_M))
    return metrics


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


def make_probes(
    store: ActivationStore,
    concepts: Concepts,
    *,
    label: Label,
    vocab_size: int,
    max_rows: int = 1 << 20,
    rows_per_child: int = 256,
    min_rows: int = 20,
    shrinkage: float = 0.05,
    seed: int = 0,
) -> Probes:
    """Shrinkage-LDA probes of the child concepts with `min_rows` train rows (train words) or more.

    At most `max_rows` random train rows are read.

    A probe is the covector S^-1 (mean of the child's rows - mean of all), S the shrunk covariance within classes. It is
    paired with atoms in the metric Sigma = S^-1 at every hook, the final residual too: there, too, S says how rows vary
    and makes a probe dual to the mean difference that it was made from, so that an atom along it has cosine 1.
    """
    found = labelled_children(store, "train", concepts, label=label, fold="train", vocab_size=vocab_size)
    label_T = torch.full((store.n_rows("train"),), -1, dtype=torch.int64)
    label_T[torch.from_numpy(found.row_N)] = torch.from_numpy(found.child_N)
    rows = sampled_rows(len(label_T), max_rows, seed)
    stats = ActivationClassStats(concepts.n_children, store.width)
    for part in rows.split(BATCH):
        stats.update(store.acts("train", part), label_T[part])
    geometry = stats.geometry(shrinkage)
    used_Q = (stats.counts >= min_rows).nonzero().squeeze(1)
    # The mean difference as a vector and the probe made from it as a covector are the same in the unified coordinate.
    probe_Qd = normalize(geometry.whiten(stats.class_differences()[used_Q], Space.VECTOR), dim=1)
    of_concept_R = torch.full((concepts.n_children + 1,), -1, dtype=torch.int64)
    of_concept_R[used_Q] = torch.arange(len(used_Q))
    child_N = of_concept_R[label_T[rows]]
    row_N, child_N = rows[child_N >= 0], child_N[child_N >= 0]
    kept_N = _first_of_each(child_N, rows_per_child, seed)
    return Probes(probe_Qd, geometry.sigma_sqrt, row_N[kept_N], child_N[kept_N])


def _first_of_each(class_N: Tensor, count: int, seed: int) -> Tensor:
    """Places of `count` random members of every class, ascending."""
    order_N = torch.randperm(len(class_N), generator=torch.Generator().manual_seed(seed))
    sorted_N = order_N[torch.argsort(class_N[order_N], stable=True)]
    starts = torch.searchsorted(class_N[sorted_N], class_N[sorted_N])
    return sorted_N[torch.arange(len(class_N)) - starts < count].sort().values


@torch.no_grad()
def probe_metrics(sae: SparseAutoencoder, store: ActivationStore, probes: Probes, seed: int = 0) -> dict[str, Metric]:
    """Cosines of child concepts' probes with the best child latent's atom and with its parent's, medians over concepts.

    The best latent is the child with the largest F1 for the concept on the labelled train rows. `probe_child`,
    `probe_parent` and `probe_min`, the smaller of the two; `n` concepts have a latent. Chance: the same latents dealt
    out at random among the concepts.
    """
    names = ("probe_child", "probe_parent", "probe_min")
    if not isinstance(sae, HierarchicalSAE):
        return {name: unavailable(FLAT) for name in names}
    check_eval_mode(sae)
    best_Q, f1_Q = _best_children(sae, store, probes)
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
    value_3, chance_3 = cosines(torch.arange(len(latent_M))).quantile(0.5, 1), torch.cat(dealt, 1).quantile(0.5, 1)
    return {
        name: Metric(value, None, chance, len(latent_M))
        for name, value, chance in zip(names, value_3.tolist(), chance_3.tolist(), strict=True)
    }


def _best_children(sae: HierarchicalSAE, store: ActivationStore, probes: Probes) -> tuple[Tensor, Tensor]:
    """For each of Q concepts the child latent with the largest F1 on the labelled rows, and that F1: [Q] on the CPU."""
    Q, R = len(probes.probe_Qd), sae.n_parents * sae.n_children
    device = sae.write_directions().device
    both_QR = torch.zeros(Q * R, dtype=torch.int64, device=device)
    for row_B, child_B in zip(probes.row_N.split(BATCH), probes.child_N.split(BATCH), strict=True):
        codes = sae.encode(store.acts("train", row_B).to(device))
        cell_BK = child_B.to(device).unsqueeze(1) * R + codes.child_index
        both_QR.scatter_add_(0, cell_BK.flatten(), (codes.child_value > 0).long().flatten())
    hits_QR = both_QR.view(Q, R).double()
    rows_Q1 = torch.bincount(probes.child_N, minlength=Q).to(device).unsqueeze(1)
    f1_QR = 2 * hits_QR / (rows_Q1 + hits_QR.sum(0))
    best = f1_QR.max(1)
    return best.indices.cpu(), best.values.cpu()


def hierarchy_metrics(
    sae: SparseAutoencoder, store: ActivationStore, held_out: Firings, probes: Probes, seed: int = 0
) -> dict[str, Metric]:
    """All of the above: `held_out` firings of validation or test rows, probes on train rows."""
    return firing_metrics(held_out) | probe_metrics(sae, store, probes, seed)


def probes_to_tensors(probes: Probes) -> dict[str, Tensor]:
    """The tensors of probes by name, to be written; `Probes(**tensors)` reads them."""
    return {name: getattr(probes, name) for name in ("probe_Qd", "vector_root_dd", "row_N", "child_N")}
