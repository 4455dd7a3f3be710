"""Concepts' words as sums of g, and what siblings share against random words and random siblings (docs/method.md §3).

Everything starts from `ConceptWords`: sums of g over each word's tokens, so that random sets and halves of
words cost one sum over words.

Shape suffixes: W words, M words of the pool, d residual width, R children, K children of one parent, Q
parents, B permutations. Vectors are in the unified coordinate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.geometry.estimators import segment_sum

Word = Sequence[int]
ChildWords = Sequence[Sequence[Word]]
Floats = NDArray[np.float64]
Z_THRESHOLD = 3.0
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

    def children(self, parent: int) -> Tensor:
        """Rows [K] of the parent's children."""
        return (self.child_parent == parent).nonzero().flatten()

    def child_vectors(self, weight_W: Tensor | None = None) -> Tensor:
        """l_c [R, d]: mean g over the child's tokens; `weight_W` (0 or 1) chooses words."""
        return self._means(self.word_child, len(self.child_parent), weight_W)

    def parent_vectors(self, weight_W: Tensor | None = None) -> Tensor:
        """l_p [Q, d]: mean g over the tokens of the parent's words."""
        return self._means(self.child_parent[self.word_child], self.n_parents, weight_W)

    def _means(self, owner_W: Tensor, n: int, weight_W: Tensor | None) -> Tensor:
        size_W = self.word_sizes if weight_W is None else self.word_sizes * weight_W
        sum_Wd = self.word_sums if weight_W is None else self.word_sums * weight_W.unsqueeze(1)
        total_n = size_W.new_zeros(n).index_add_(0, owner_W, size_W)
        return sum_Wd.new_zeros(n, sum_Wd.shape[1]).index_add_(0, owner_W, sum_Wd) / total_n.unsqueeze(1)


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


def adjusted(p_values: Floats) -> Floats:
    """`benjamini_hochberg` of the values that are not NaN; NaN stays."""
    known = np.isfinite(p_values)
    out = np.full_like(p_values, np.nan)
    out[known] = benjamini_hochberg(p_values[known])
    return out


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


def _between(children_BKd: Tensor, n_first: int) -> Tensor:
    """Mean inner product of the first children with the others, [B]."""
    return (children_BKd[:, :n_first].mean(1) * children_BKd[:, n_first:].mean(1)).sum(-1)


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


def _null(
    sizes: list[list[int]],
    pool_sum_Md: Tensor,
    sampler: _Sampler,
    permutations: int,
    statistic: Callable[[Tensor], Tensor],
) -> Floats:
    """`statistic` [B] of random children: child c gets words of the pool with as many tokens each as
    `sizes[c]` says."""
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
        parts.append(statistic(sums.view(len(chunk_bW), len(sizes), -1) / tokens_K.unsqueeze(1)))
    return np.asarray(torch.cat(parts).cpu().numpy(), np.float64)


def shared_parent(
    words: ConceptWords,
    pool_sum_Md: Tensor,
    pool_size_M: Tensor,
    *,
    permutations: int = 1000,
    seed: int = 0,
    reference: Sequence[int] | None = None,
) -> SharedParent:
    """s_p = mean over pairs of children of <l_i, l_j>, against random sets of the pool's words.

    The null keeps every child's number of words and of tokens per word: the forms of one word are nearly one
    vector, so matching tokens alone would make the null too narrow. With a pool of single tokens, children
    are taken token by token. With `reference`, another parent's row for each parent (a control), the pairs
    are of p's children with that parent's. Raises ValueError when the pool is too small.
    """
    if permutations < 1:
        raise ValueError(f"permutations: found {permutations}, allowed: at least 1")
    by_token = bool((pool_size_M == 1).all())
    sampler = _Sampler(pool_size_M, permutations, seed)
    # Of the null alone: half the memory to read, and rounding is far below its spread.
    pool_sum_Md = pool_sum_Md.float()
    vectors_Rd = words.child_vectors()
    s_p, z, p = (np.full(words.n_parents, np.nan) for _ in range(3))
    for parent in range(words.n_parents):
        rows_K = words.children(parent)
        statistic = _shared
        if reference is not None:
            statistic = partial(_between, n_first=len(rows_K))
            rows_K = torch.cat((rows_K, words.children(reference[parent])))
        if len(rows_K) < 2:
            continue
        sizes = [words.word_sizes[words.word_child == row].long().tolist() for row in rows_K]
        if by_token:
            sizes = [[1] * sum(child) for child in sizes]
        null_B = _null(sizes, pool_sum_Md, sampler, permutations, statistic)
        s_p[parent] = float(statistic(vectors_Rd[rows_K].unsqueeze(0)))
        z[parent], p[parent] = z_and_p(s_p[parent], null_B)
    return SharedParent(s_p, z, p, adjusted(p))


def dealt_siblings(words: ConceptWords, *, permutations: int = 1000, seed: int = 0) -> SharedParent:
    """s_p against whole children of other parents, dealt to p at random: is it *these* children that go together?

    Random words make this null too narrow where children have directions of their own but share none. A draw
    takes, for each child, one of the 32 children of other parents that are closest in number of tokens, no two
    of one parent. NaN for a parent with fewer than two children, or where there are too few others.
    """
    vectors_Rd = words.child_vectors()
    gram_RR = (vectors_Rd @ vectors_Rd.T).cpu().numpy()
    owner_R = words.child_parent.cpu().numpy()
    tokens_R = np.bincount(words.word_child.cpu().numpy(), words.word_sizes.cpu().numpy())
    generator = np.random.default_rng(seed)
    s_p, z, p = (np.full(words.n_parents, np.nan) for _ in range(3))
    for parent in range(words.n_parents):
        rows_K = np.flatnonzero(owner_R == parent)
        others = np.flatnonzero(owner_R != parent)
        k = len(rows_K)
        if k < 2:
            continue
        s_p[parent] = _mean_of_pairs(gram_RR[np.ix_(rows_K, rows_K)][None])[0]
        drawn_BK = np.empty((permutations, k), np.int64)
        for slot, row in enumerate(rows_K):
            near = others[np.argsort(np.abs(tokens_R[others] - tokens_R[row]), kind="stable")][:32]
            free = (owner_R[near][None, :, None] != owner_R[drawn_BK[:, None, :slot]]).all(-1)
            if not free.any(1).all():
                break
            drawn_BK[:, slot] = near[np.where(free, generator.random(free.shape), -1.0).argmax(1)]
        else:
            z[parent], p[parent] = z_and_p(
                s_p[parent], _mean_of_pairs(gram_RR[drawn_BK[:, :, None], drawn_BK[:, None, :]])
            )
    return SharedParent(s_p, z, p, adjusted(p))


def _mean_of_pairs(gram_BKK: Floats) -> Floats:
    k = gram_BKK.shape[1]
    return np.asarray((gram_BKK.sum((1, 2)) - np.trace(gram_BKK, axis1=1, axis2=2)) / (k * (k - 1)))


def z_and_p(value: float, null_B: Floats) -> tuple[float, float]:
    """z = (value - mean)/deviation of the null, and p = (1 + #{null >= value})/(1 + B); z is NaN without spread."""
    spread = null_B.std()
    z = (value - null_B.mean()) / spread if spread > 0 else np.nan
    return float(z), (1 + int((null_B >= value).sum())) / (1 + len(null_B))


def bootstrap_median(groups: Sequence[Floats], bootstrap: int, seed: int, level: float = 0.95) -> list[float]:
    """Interval [lo, hi] of that level of the median of all values, resampling the groups (parents)."""
    values_n = np.concatenate(groups)
    order_n = np.argsort(values_n, kind="stable")
    sorted_n, group_n = values_n[order_n], np.repeat(np.arange(len(groups)), [len(group) for group in groups])[order_n]
    picks_Bg = np.random.default_rng(seed).integers(0, len(groups), size=(bootstrap, len(groups)))
    medians = []
    for picks_bg in np.array_split(picks_Bg, max(1, bootstrap * len(values_n) // _CHUNK_NUMBERS)):
        # A value counts as often as its group was drawn; the median is the mean of the two in the middle.
        times_bg = np.stack([np.bincount(pick, minlength=len(groups)) for pick in picks_bg])
        up_to_bn = times_bg[:, group_n].cumsum(1)
        total_b1 = up_to_bn[:, -1:]
        low_b, high_b = (sorted_n[(up_to_bn > middle).argmax(1)] for middle in ((total_b1 - 1) // 2, total_b1 // 2))
        medians.append((low_b + high_b) / 2)
    bounds = np.quantile(np.concatenate(medians), [(1 - level) / 2, (1 + level) / 2])
    return [float(value) for value in bounds]
