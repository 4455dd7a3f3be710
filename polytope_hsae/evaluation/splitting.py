"""Is a concept split among several latents? F1 of the best few latents against the best one (docs/method.md section 5).

A sparse probe calls a row positive where any of its latents is above that latent's threshold. Latents and thresholds
are chosen greedily on train rows, each so that F1 there rises most; so the probe of j latents begins with the best one.

Shapes: N rows, L latents, Q concepts, M positive codes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polytope_hsae.evaluation.bootstrap import RESAMPLING, Evaluation, FloatArray, Resampling, Units, summarise
from polytope_hsae.evaluation.row_codes import IntArray, SparseActivations

LATENTS = 5  # of the sparse probe: the j of `split`
PERMUTATIONS = 4
SPLIT_METRICS = ("split", "f1_best", "f1_best_few")


class _Entries(NamedTuple):
    """Positive codes [M], latent by latent, largest first; `start_M`: where the code's latent begins; `end_M`: one past
    the last code of the latent that is as large; `next_M`: the next smaller one of the latent, 0 if there is none.
    """

    row_M: IntArray
    latent_M: IntArray
    value_M: NDArray[np.float32]
    start_M: IntArray
    end_M: IntArray
    next_M: NDArray[np.float32]


def _entries(acts: SparseActivations) -> _Entries:
    row_M, latent_M, value_M = acts.positive()
    order_M = np.lexsort((-value_M, latent_M))
    row_M, latent_M, value_M = row_M[order_M], latent_M[order_M], value_M[order_M]
    last = np.flatnonzero((np.diff(latent_M) != 0) | (np.diff(value_M) != 0))
    ends = np.append(last, len(row_M) - 1) + 1
    end_M = ends[np.searchsorted(ends, np.arange(len(row_M)), side="right")]
    follows_M = np.append(latent_M, -1)[end_M] == latent_M
    next_M = np.where(follows_M, np.append(value_M, 0)[end_M], 0)
    return _Entries(row_M, latent_M, value_M, np.searchsorted(latent_M, latent_M), end_M, next_M)


def sparse_probe(entries: _Entries, positive_N: NDArray[np.bool_]) -> list[tuple[int, float]]:
    """At most LATENTS (latent, threshold): a row is positive where a latent reaches its threshold. Fewer, where no
    further latent raises F1 on these rows. A threshold lies half way between two codes of its latent.
    """
    rule: list[tuple[int, float]] = []
    own_H = np.flatnonzero(positive_N[entries.row_M])  # the best threshold is the code of a positive row
    start_H, end_H = entries.start_M[own_H], entries.end_M[own_H]
    first_H, after_H = np.searchsorted(own_H, start_H), np.searchsorted(own_H, end_H)
    uncovered_N = np.ones(len(positive_N), dtype=bool)
    called_M = np.zeros(len(entries.row_M) + 1, dtype=np.int32)  # by all codes before the one at a place
    hits_H = np.zeros(len(own_H) + 1, dtype=np.int32)
    n_positive, hits, called, best = int(positive_N.sum()), 0, 0, 0.0
    while len(own_H) and len(rule) < LATENTS:
        new_M = uncovered_N[entries.row_M]
        np.cumsum(new_M, out=called_M[1:])
        np.cumsum(new_M[own_H], out=hits_H[1:])
        more_hits_H, more_called_H = hits_H[after_H] - hits_H[first_H], called_M[end_H] - called_M[start_H]
        f1_H = 2 * (hits + more_hits_H) / (n_positive + called + more_called_H)
        place = int(f1_H.argmax())
        if f1_H[place] <= best:
            break
        best = float(f1_H[place])
        hits, called = hits + int(more_hits_H[place]), called + int(more_called_H[place])
        uncovered_N[entries.row_M[start_H[place] : end_H[place]]] = False
        at = own_H[place]
        rule.append((int(entries.latent_M[at]), float(entries.value_M[at] + entries.next_M[at]) / 2))
    return rule


def _f1(acts: SparseActivations, rule: list[tuple[int, float]], positive_N: NDArray[np.bool_]) -> float:
    """2 hits / (called + positive) of a rule; 0 where there is neither."""
    dense_Nj = acts.columns(np.array([latent for latent, _ in rule], dtype=np.int64))
    threshold_j = np.array([threshold for _, threshold in rule], dtype=np.float32)
    called_N = (dense_Nj >= threshold_j).any(axis=1)
    return 2 * float((called_N & positive_N).sum()) / max(1, int(called_N.sum() + positive_N.sum()))


def probe_scores(
    train: SparseActivations, train_label_N: IntArray, held_out: SparseActivations, label_N: IntArray
) -> FloatArray:
    """F1 [Q, 2] on held-out rows of the best latent and of the best few, chosen on train rows; labels 0 .. Q-1."""
    entries = _entries(train)
    n_concepts = int(max(train_label_N.max(), label_N.max())) + 1
    f1_Q2 = np.zeros((n_concepts, 2))
    for concept in range(n_concepts):
        rule = sparse_probe(entries, train_label_N == concept)
        for column, part in enumerate((rule[:1], rule)):
            f1_Q2[concept, column] = _f1(held_out, part, label_N == concept)
    return f1_Q2


def split_metrics(
    train: SparseActivations,
    train_label_N: IntArray,
    held_out: SparseActivations,
    label_N: IntArray,
    keys_Q: IntArray,
    resampling: Resampling = RESAMPLING,
) -> Evaluation:
    """`f1_best`, `f1_best_few` and `split`, the second minus the first, over concepts: two or more, named by `keys_Q`.

    Labels are 0 .. Q-1; rows of other concepts are the negative ones. Chance: the same with labels permuted, among
    train rows and among held-out rows.
    """

    def three(labels: tuple[IntArray, IntArray]) -> FloatArray:
        one_Q, few_Q = probe_scores(train, labels[0], held_out, labels[1]).T
        return np.stack([few_Q - one_Q, one_Q, few_Q])

    found_3Q = three((train_label_N, label_N))
    rng = np.random.default_rng(resampling.seed)
    permuted = [three((rng.permutation(train_label_N), rng.permutation(label_N))) for _ in range(PERMUTATIONS)]
    chance = dict(zip(SPLIT_METRICS, np.mean(permuted, axis=(0, 2)).tolist(), strict=True))
    units = {name: Units.mean(values_Q, keys_Q) for name, values_Q in zip(SPLIT_METRICS, found_3Q, strict=True)}
    return summarise(units, chance, *resampling)
