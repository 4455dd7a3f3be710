"""Is a child more than a random part of its parent? Cross-fit length of the difference (docs/method.md §3).

Shape suffixes: N words at hand, B permutations, H halvings, R children, Q parents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polytope_hsae.geometry.orthogonality import halve_words
from polytope_hsae.geometry.statistics import ConceptWords, Floats, adjusted, z_and_p

HALVINGS = 4


@dataclass(frozen=True)
class Difference:
    """Per child: <delta^A, delta^B>, its z and p against the null, and the BH-adjusted q; NaN for one word."""

    squared: Floats
    z: Floats
    p: Floats
    q: Floats


def nontrivial_difference(
    words: ConceptWords,
    *,
    permutations: int = 1000,
    seed: int = 0,
    reference: Sequence[int] | None = None,
) -> Difference:
    """<delta^A, delta^B>, delta = l_c - l_p on halves A and B of the words, against random parts of the parent.

    The halves of a parent are the unions of its children's, and the product is a mean over HALVINGS. It
    estimates |delta|^2 without the noise of the words. Null: the parent's words trade places at random, each only
    with words of as many tokens, so that the child is a random subset of the same size and everything else stays.
    With `reference`, another parent's row for each parent (a control), delta = l_c - l_reference and words trade
    places within the union of both.
    """
    generator = np.random.default_rng(seed)
    child_W = words.word_child.cpu().numpy()
    size_W = words.word_sizes.cpu().numpy()
    owner_W = words.child_parent.cpu().numpy()[child_W]
    half_HW = np.stack([
        halve_words(words.word_child, seed * 100_003 + halving).cpu().numpy() for halving in range(HALVINGS)
    ])  # fmt: skip
    squared, z, p = (np.full(len(words.child_parent), np.nan) for _ in range(3))
    for row, parent in enumerate(words.child_parent.tolist()):
        if (child_W == row).sum() < 2:
            continue
        of_parent_W = owner_W == (parent if reference is None else reference[parent])
        at_N = np.flatnonzero(of_parent_W | (child_W == row))
        sums_Nd = words.word_sums[torch.from_numpy(at_N)]
        gram_NN = (sums_Nd @ sums_Nd.T).cpu().numpy()
        a_HN, b_HN = (
            _mean_weights(half_HN * (child_W[at_N] == row), size_W[at_N])
            - _mean_weights(half_HN * of_parent_W[at_N], size_W[at_N])
            for half_HN in (half_HW[:, at_N], 1 - half_HW[:, at_N])
        )
        places_BN = _trades(size_W[at_N], permutations, generator)
        places_BN = np.concatenate((np.arange(len(at_N))[None], places_BN))  # the words' own places come first
        products = np.zeros(len(places_BN))
        for a_N, b_N in zip(a_HN, b_HN, strict=True):
            products += ((a_N[places_BN] @ gram_NN) * b_N[places_BN]).sum(1) / HALVINGS
        squared[row] = products[0]
        z[row], p[row] = z_and_p(products[0], products[1:])
    return Difference(squared, z, p, adjusted(p))


def _mean_weights(use_HN: Floats, size_N: Floats) -> Floats:
    """Weights of the words' sums that give the mean over the tokens of the words in use."""
    return np.asarray(use_HN / (use_HN * size_N).sum(1, keepdims=True))


def _trades(size_N: Floats, permutations: int, generator: np.random.Generator) -> np.ndarray:
    """[B, N]: random permutations that put in each place a word of as many tokens."""
    order_N = np.argsort(size_N, kind="stable")
    shuffled_BN = np.argsort(size_N + generator.random((permutations, len(size_N))), axis=1)
    places_BN = np.empty_like(shuffled_BN)
    places_BN[:, order_N] = shuffled_BN
    return places_BN
