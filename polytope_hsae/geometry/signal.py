"""Does a concept's vector know its held-out words? (docs/method.md §3, evidence of the first kind)

Shape suffixes: V vocabulary, N its tokens, n tokens of one parent, m matched tokens of each, d residual width, S
vectors (2 halves of each of H halvings), R children, Q parents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.geometry.estimators import ConceptEstimator
from polytope_hsae.geometry.orthogonality import halve_words
from polytope_hsae.geometry.statistics import ChildWords, ConceptWords, Floats

MATCHED, NEIGHBOURS, HALVINGS = 20, 100, 2


@dataclass(frozen=True)
class Signal:
    """Per child [R] and per parent [Q]: AUROC of held-out tokens, and cos(l^A, l^B); NaN for one word."""

    child_auroc: Floats
    child_reliability: Floats
    parent_auroc: Floats
    parent_reliability: Floats


def frequency_order(vocab_size: int, counts: Tensor | None) -> np.ndarray:
    """Token ids [V] from frequent to rare: by corpus counts [V], equal ones by id; without counts by id, because
    tokenizers number frequent tokens first."""
    if counts is None:
        return np.arange(vocab_size)
    if counts.shape != (vocab_size,):
        raise ValueError(f"counts: found shape {tuple(counts.shape)}, allowed: ({vocab_size},)")
    return np.argsort(-counts.cpu().numpy(), kind="stable")


def matched_tokens(tokens: Sequence[int], order_N: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each token, m different tokens at random of the 200 next to it in frequency, none of them in `tokens`.

    Returns ids [n, m]; m is 20, or half of what a small vocabulary has beside `tokens`. ValueError where that is 0.
    """
    free_N = order_N[~np.isin(order_N, tokens)]
    m = min(MATCHED, len(free_N) // 2)
    if m == 0:
        raise ValueError(f"vocabulary: found {len(free_N)} tokens outside the concept, allowed: at least 2")
    rank_V = np.zeros(order_N.max() + 1, dtype=np.int64)
    rank_V[order_N] = np.arange(len(order_N))
    at_n = np.searchsorted(rank_V[free_N], rank_V[np.asarray(tokens)])
    low_n = np.clip(at_n - NEIGHBOURS, 0, max(0, len(free_N) - 2 * NEIGHBOURS))
    return np.stack([generator.choice(free_N[low : low + 2 * NEIGHBOURS], m, replace=False) for low in low_n])


def concept_signal(
    estimate: ConceptEstimator,
    words: ConceptWords,
    child_words: ChildWords,
    order_N: np.ndarray,
    *,
    seed: int = 0,
    reference: Sequence[int] | None = None,
) -> Signal:
    """Held-out AUROC of g . l and split-half reliability of every child and parent, means over halvings.

    l comes from one half of the words. Each token of the other half is compared with 20 random tokens outside
    the parent that are about as frequent (`frequency_order`); the AUROC is the share that scores lower, 0.5 by
    chance, and a mean over held-out tokens and both halves. With `reference`, another parent's row for each
    parent (a control), that parent's l stands in for l_p.
    """
    generator = np.random.default_rng(seed)
    halves = [halve_words(words.word_child, seed * 100_003 + halving) for halving in range(HALVINGS)]
    sides_SW = [weight_W for half_W in halves for weight_W in (half_W, 1 - half_W)]
    child_SRd = torch.stack([words.child_vectors(weight_W) for weight_W in sides_SW])
    parent_SQd = torch.stack([words.parent_vectors(weight_W) for weight_W in sides_SW])
    reference_SQd = parent_SQd if reference is None else parent_SQd[:, list(reference)]
    child_auroc = np.full(len(child_words), np.nan)
    parent_auroc = np.full(words.n_parents, np.nan)
    used_SW = torch.stack(sides_SW).bool().cpu().numpy()
    of_child = [np.flatnonzero(words.word_child.cpu().numpy() == row) for row in range(len(child_words))]
    for parent in range(words.n_parents):
        rows = words.children(parent).tolist()
        tokens = [token for row in rows for word in child_words[row] for token in word]
        sizes = [len(word) for row in rows for word in child_words[row]]
        held_out_Sn = ~np.repeat(used_SW[:, np.concatenate([of_child[row] for row in rows])], sizes, axis=1)
        child_n = np.repeat(rows, [sum(map(len, child_words[row])) for row in rows])
        matched_nm = matched_tokens(tokens, order_N, generator)
        vectors_Skd = torch.cat((child_SRd[:, rows], reference_SQd[:, parent : parent + 1]), dim=1)
        below_nSk = _share_below(estimate, tokens, matched_nm, vectors_Skd)
        for k, row in enumerate(rows):
            if len(child_words[row]) > 1:
                child_auroc[row] = _mean_where(below_nSk[:, :, k].T, held_out_Sn & (child_n == row))
        if len(sizes) > len(rows):  # else every half may hold all or nothing
            parent_auroc[parent] = _mean_where(below_nSk[:, :, -1].T, held_out_Sn)
    return Signal(
        child_auroc, _reliability(child_SRd, child_SRd), parent_auroc, _reliability(parent_SQd, reference_SQd)
    )


def _share_below(
    estimate: ConceptEstimator, tokens: Sequence[int], matched_nm: np.ndarray, vectors_Skd: Tensor
) -> Floats:
    """[n, S, k]: share of a token's matched tokens with a lower score than its own; ties count half."""
    flat_Ld = vectors_Skd.flatten(0, 1)
    own_n1L = estimate.scores(tokens, flat_Ld).unsqueeze(1)
    matched_nmL = estimate.scores(torch.from_numpy(matched_nm), flat_Ld).view(*matched_nm.shape, -1)
    below_nL = (own_n1L > matched_nmL).double().mean(1) + (own_n1L == matched_nmL).double().mean(1) / 2
    return np.asarray(below_nL.view(len(tokens), *vectors_Skd.shape[:2]).cpu().numpy())


def _mean_where(below_Sn: Floats, held_out_Sn: np.ndarray) -> float:
    """Mean over the halves S of each half's mean over its held-out tokens."""
    return float(((below_Sn * held_out_Sn).sum(1) / held_out_Sn.sum(1)).mean())


def _reliability(first: Tensor, second: Tensor) -> Floats:
    """Mean over halvings of cos(first^A, second^B); NaN where a half is empty."""
    return np.asarray(torch.cosine_similarity(first[::2], second[1::2], dim=-1).mean(0).cpu().numpy(), np.float64)
