"""Shared parent, orthogonality ratio and omega of concepts' words, with their nulls (docs/method.md §3).

Everything starts from `ConceptWords`: sums of g over each word's tokens, so that random sets and halves of
words cost one sum over words.

Shape suffixes: W words, M words of the pool, d residual width, R children, K children of one parent, Q
parents, B permutations. Vectors are in the unified coordinate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.geometry.estimators import segment_sum

Word = Sequence[int]
ChildWords = Sequence[Sequence[Word]]
Floats = NDArray[np.float64]
Z_THRESHOLD = 3.0
BETA_RANGE = (0.8, 1.25)
WHY_NULL = f"no parent with at least 3 children has z > {Z_THRESHOLD:g}"
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class ConceptWords:
    """Words of all children as sums of their tokens' g, so that regrouping words is a sum over words.

    word_sums [W, d]; word_sizes [W] (tokens); word_child [W] (child row); child_parent [R]: each
    child's parent.
    """

    word_sums: Tensor
    word_sizes: Tensor
    word_child: Tensor
    child_parent: Tensor

    @property
    def n_parents(self) -> int:
        """Q."""
        return int(self.child_parent.max()) + 1

    def child_vectors(self, weight_W: Tensor | None = None) -> Tensor:
        """l_c [R, d]: mean g over the child's tokens; `weight_W` (0 or 1) chooses words."""
        size_W = self.word_sizes if weight_W is None else self.word_sizes * weight_W
        sum_Wd = self.word_sums if weight_W is None else self.word_sums * weight_W.unsqueeze(1)
        n_children = len(self.child_parent)
        total_R = size_W.new_zeros(n_children).index_add_(0, self.word_child, size_W)
        sum_Rd = sum_Wd.new_zeros(n_children, sum_Wd.shape[1]).index_add_(0, self.word_child, sum_Wd)
        return sum_Rd / total_R.unsqueeze(1)


def word_sums(words: Sequence[Word], rows: Callable[[list[int]], Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of g [W, d], number of tokens [W]) of every word; `rows` gives g for token ids. Refuses a word
    without tokens."""
    if any(len(word) == 0 for word in words):
        raise ValueError("words: found a word without tokens, allowed: at least one token each")
    size_W = torch.tensor([len(word) for word in words], dtype=torch.int64)
    sum_Wd = segment_sum(rows([token for word in words for token in word]), size_W)
    return sum_Wd, size_W.to(sum_Wd)


def concept_words(
    child_words: ChildWords, child_parent: Sequence[int], rows: Callable[[list[int]], Tensor]
) -> ConceptWords:
    """`ConceptWords` of children given as lists of words, each a list of token ids. Refuses a child without
    words."""
    empty = sum(len(words) == 0 for words in child_words)
    if len(child_words) != len(child_parent) or not child_words or empty:
        raise ValueError(
            f"child_words: found {len(child_words)} children ({empty} without words) and {len(child_parent)} "
            "parent rows, allowed: equal numbers, at least one child, at least one word each"
        )
    sum_Wd, size_W = word_sums([word for words in child_words for word in words], rows)
    counts_R = torch.tensor([len(words) for words in child_words])
    child_W = torch.repeat_interleave(torch.arange(len(child_words)), counts_R).to(sum_Wd.device)
    return ConceptWords(sum_Wd, size_W, child_W, torch.tensor(list(child_parent), dtype=torch.int64).to(sum_Wd.device))


def benjamini_hochberg(p_values: Floats) -> Floats:
    """False-discovery-rate adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


@dataclass(frozen=True)
class SharedParent:
    """Per parent: s_p, its z and p against the null, and the BH-adjusted q; NaN where fewer than two
    children."""

    s_p: Floats
    z: Floats
    p: Floats
    q: Floats


def _shared(children_BKd: Tensor) -> Tensor:
    """Mean inner product over ordered pairs of different children, [B]."""
    k = children_BKd.shape[1]
    return (children_BKd.sum(1).square().sum(-1) - children_BKd.square().sum((1, 2))) / (k * (k - 1))


class _Sampler:
    """Draws words of the pool without replacement, matched in their number of tokens, for B permutations at
    once.

    One partial Fisher-Yates shuffle per permutation, continued from where the last draw left it: every draw
    is uniform whatever the order before it.
    """

    def __init__(self, size_M: Tensor, permutations: int, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        sizes = size_M.cpu().numpy().astype(np.int64)
        self.decks = {
            int(size): np.repeat(np.flatnonzero(sizes == size).astype(np.int32)[:, None], permutations, axis=1)
            for size in np.unique(sizes)
        }

    def draw(self, size: int, n: int) -> NDArray[np.int32]:
        """[n, B] rows of the pool whose words have `size` tokens, distinct within a column."""
        deck = self.decks.get(size, np.empty((0, 0), np.int32))
        if n > len(deck):
            raise ValueError(
                f"pool: found {len(deck)} words of {size} tokens, allowed: at least {n}, as a parent holds"
            )
        columns = np.arange(deck.shape[1])
        for row in range(n):
            other = self.generator.integers(row, len(deck), size=deck.shape[1])
            deck[row, columns], deck[other, columns] = deck[other, columns], deck[row, columns].copy()
        return deck[:n].copy()


def _null(sizes: list[list[int]], pool_sum_Md: Tensor, sampler: _Sampler, permutations: int) -> Floats:
    """s_p [B] of random children: child c gets words of the pool with as many tokens each as `sizes[c]`
    says."""
    flat = np.array([size for child in sizes for size in child])
    drawn_WB = np.empty((len(flat), permutations), np.int64)
    for size in np.unique(flat):
        slots = np.flatnonzero(flat == size)
        drawn_WB[slots] = sampler.draw(int(size), len(slots))
    words_BW = torch.from_numpy(drawn_WB.T.copy()).to(pool_sum_Md.device)
    starts_K = torch.tensor(np.cumsum([0] + [len(child) for child in sizes[:-1]]), device=pool_sum_Md.device)
    tokens_K = torch.tensor([sum(child) for child in sizes]).to(pool_sum_Md)
    step = max(1, _CHUNK_NUMBERS // (len(sizes) * pool_sum_Md.shape[1]))
    parts = []
    for chunk_bW in words_BW.split(step):
        firsts = torch.arange(len(chunk_bW), device=chunk_bW.device).unsqueeze(1) * len(flat)
        offsets = (starts_K + firsts).reshape(-1)
        sums = torch.nn.functional.embedding_bag(chunk_bW.reshape(-1), pool_sum_Md, offsets, mode="sum")
        parts.append(_shared(sums.view(len(chunk_bW), len(sizes), -1) / tokens_K.unsqueeze(1)))
    return np.asarray(torch.cat(parts).cpu().numpy(), np.float64)


def shared_parent(
    words: ConceptWords, pool_sum_Md: Tensor, pool_size_M: Tensor, *, permutations: int = 1000, seed: int = 0
) -> SharedParent:
    """s_p = mean over pairs of children of <l_i, l_j>, against random sets of the pool's words.

    The null keeps every child's number of words and of tokens per word: the forms of one word are nearly one
    vector, so matching tokens alone would make the null too narrow. With a pool of single tokens, children
    are taken token by token. Raises ValueError when the pool is too small.
    """
    if permutations < 1:
        raise ValueError(f"permutations: found {permutations}, allowed: at least 1")
    by_token = bool((pool_size_M == 1).all())
    sampler = _Sampler(pool_size_M, permutations, seed)
    vectors_Rd = words.child_vectors()
    s_p, z, p = (np.full(words.n_parents, np.nan) for _ in range(3))
    for parent in range(words.n_parents):
        rows_K = (words.child_parent == parent).nonzero().flatten()
        if len(rows_K) < 2:
            continue
        sizes = [words.word_sizes[words.word_child == row].long().tolist() for row in rows_K]
        if by_token:
            sizes = [[1] * sum(child) for child in sizes]
        null_B = _null(sizes, pool_sum_Md, sampler, permutations)
        s_p[parent] = float(_shared(vectors_Rd[rows_K].unsqueeze(0)))
        z[parent] = (s_p[parent] - null_B.mean()) / null_B.std()
        p[parent] = (1 + int((null_B >= s_p[parent]).sum())) / (1 + permutations)
    q = np.full_like(p, np.nan)
    known = np.isfinite(p)
    q[known] = benjamini_hochberg(p[known])
    return SharedParent(s_p, z, p, q)


def bootstrap_median(groups: Sequence[Floats], bootstrap: int, seed: int) -> list[float]:
    """95 % interval [lo, hi] of the median of all values, resampling the groups (parents)."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(groups), size=(bootstrap, len(groups)))
    medians = [np.median(np.concatenate([groups[group] for group in pick])) for pick in picks]
    return [float(value) for value in np.quantile(medians, [0.025, 0.975])]


def _strong(words: ConceptWords, z: Floats) -> list[int]:
    children_Q = torch.bincount(words.child_parent, minlength=words.n_parents).tolist()
    return [parent for parent, value in enumerate(z) if value > Z_THRESHOLD and children_Q[parent] >= 3]


def orthogonality_ratio(words: ConceptWords, z: Floats, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """beta_c = mean_j <l_c, l_j> / mean_{i,j != c} <l_i, l_j> over children of parents with z > 3 and at
    least 3 children.

    Returns per-child `beta` [R] (NaN where not computed), `median_beta`, `beta_ci95` (bootstrap over
    parents), `beta_inside` (the median in 0.8 to 1.25), or nulls with `why`.
    """
    beta_R = np.full(len(words.child_parent), np.nan)
    strong = _strong(words, z)
    if not strong:
        return {"beta": beta_R, "median_beta": None, "beta_ci95": None, "beta_inside": None, "why": WHY_NULL}
    vectors_Rd = words.child_vectors()
    groups = []
    for parent in strong:
        rows_K = (words.child_parent == parent).nonzero().flatten()
        gram_KK = vectors_Rd[rows_K] @ vectors_Rd[rows_K].T
        own_K = gram_KK.sum(1) - gram_KK.diagonal()
        k = len(rows_K)
        others_K = own_K.sum() - 2 * own_K
        beta_K = (own_K / (k - 1)) / (others_K / ((k - 1) * (k - 2)))
        beta_R[rows_K.cpu().numpy()] = beta_K.cpu().numpy()
        groups.append(beta_R[rows_K.cpu().numpy()])
    median = float(np.median(np.concatenate(groups)))
    return {
        "beta": beta_R,
        "median_beta": median,
        "beta_ci95": bootstrap_median(groups, bootstrap, seed),
        "beta_inside": BETA_RANGE[0] <= median <= BETA_RANGE[1],
    }


def halve_words(child_W: Tensor, seed: int) -> Tensor:
    """A random half of every child's words, as 0/1 weights [W] (float64): floor or ceil of half, by chance
    for odd counts."""
    generator = torch.Generator().manual_seed(seed)
    owner_W = child_W.cpu()
    key_W = torch.rand(len(owner_W), generator=generator, dtype=torch.float64)
    order_W = torch.argsort(owner_W.double() + key_W)
    counts_R = torch.bincount(owner_W)
    first_R = counts_R.cumsum(0) - counts_R
    rank_W = torch.empty_like(owner_W)
    rank_W[order_W] = torch.arange(len(owner_W)) - first_R[owner_W[order_W]]
    extra_R = torch.randint(0, 2, counts_R.shape, generator=generator) * (counts_R % 2)
    return (rank_W < (counts_R // 2 + extra_R)[owner_W]).double().to(child_W.device)


def omega(
    words: ConceptWords, z: Floats, s_p: Floats, *, halvings: int = 20, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """omega = mean over parents of cov_c(t_c^A, t_c^B) / s_p^2, t_c = mean_{j != c} <l_c, l_j> on two halves
    of the words.

    Averaged over `halvings` random halvings; parents with z > 3 and at least 3 children of at least 2 words
    (children with one word are left out). Returns per-parent `omega_p` [Q] (NaN where not computed), `omega`,
    `omega_ci95` (bootstrap over parents), or nulls with `why`.
    """
    words_R = torch.bincount(words.word_child, minlength=len(words.child_parent))
    omega_Q = np.full(words.n_parents, np.nan)
    rows = {p: ((words.child_parent == p) & (words_R >= 2)).nonzero().flatten() for p in _strong(words, z)}
    rows = {parent: rows_K for parent, rows_K in rows.items() if len(rows_K) >= 3}
    if not rows:
        return {"omega_p": omega_Q, "omega": None, "omega_ci95": None, "why": WHY_NULL}
    totals = dict.fromkeys(rows, 0.0)
    for halving in range(halvings):
        half_W = halve_words(words.word_child, seed * 100_003 + halving)
        halves = (words.child_vectors(half_W), words.child_vectors(1 - half_W))
        for parent, rows_K in rows.items():
            a_K, b_K = (_to_siblings(vectors_Rd[rows_K]) for vectors_Rd in halves)
            covariance = ((a_K - a_K.mean()) * (b_K - b_K.mean())).sum() / (len(rows_K) - 1)
            totals[parent] += float(covariance)
    for parent, total in totals.items():
        omega_Q[parent] = total / halvings / s_p[parent] ** 2
    values = omega_Q[list(rows)]
    picks = np.random.default_rng(seed).integers(0, len(values), size=(bootstrap, len(values)))
    ci = [float(value) for value in np.quantile(values[picks].mean(1), [0.025, 0.975])]
    return {"omega_p": omega_Q, "omega": float(values.mean()), "omega_ci95": ci}


def _to_siblings(vectors_Kd: Tensor) -> Tensor:
    gram_KK = vectors_Kd @ vectors_Kd.T
    return (gram_KK.sum(1) - gram_KK.diagonal()) / (len(vectors_Kd) - 1)
