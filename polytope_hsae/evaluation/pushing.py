"""Pushing the language model along a direction until a concept's log-odds have risen by a given amount.

The size of a push is never fixed: alpha is found per concept, so that side effects are compared at the same effect
(docs/method.md §3, interventions). Everything after the hook runs for real: later blocks, final norm, soft-cap.

Shapes: M contexts, T positions, d residual width, V vocabulary, G pushes, A of them in one forward pass, n tokens of
a set, K measured values of a push, of which the first is the effect.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.evaluation.bootstrap import FloatArray
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.lm.edits import LastPosition

EFFECT = 0
FIRST = 1 / 16  # the first alpha tried, as a share of the largest

# Given numbers of pushes [A] and their alphas [A]: rows [A, K] of measured values, the effect first.
Evaluate = Callable[[NDArray[np.int64], FloatArray], FloatArray]


class Target(NamedTuple):
    """A concept that is pushed, as sets of token ids; sets without tokens are left out.

    `parts` ought to keep their ratios: a parent's children, a child's siblings. `others` ought to keep their share of
    what is off `whole`: for a parent, which is its own whole, the other parents; for a child, whose whole is its
    parent, the siblings.
    """

    tokens: Tensor
    parts: list[Tensor]
    whole: Tensor
    others: list[Tensor]


class Solution(NamedTuple):
    """alpha [G] and measured rows [G, K]; NaN where the effect was not reached."""

    alpha_G: FloatArray
    measured_GK: FloatArray


class Moves(NamedTuple):
    """What a push adds to the hook's residual in every context: alpha * direction + offset, [G, M or 1, d] each.

    The offset is 0 where something is added, and takes the present code out where a code is replaced.
    """

    direction_GMd: Tensor
    offset_GMd: Tensor

    @classmethod
    def along(cls, directions_Gd: Tensor) -> "Moves":
        """alpha times the same direction in all contexts."""
        direction_G1d = directions_Gd[:, None]
        return cls(direction_G1d, torch.zeros_like(direction_G1d))

    def rows(self, rows: Tensor | slice) -> "Moves":
        """Some of the pushes."""
        return Moves(self.direction_GMd[rows], self.offset_GMd[rows])

    def turned(self, sign_G: Tensor) -> "Moves":
        """With directions times +1 or -1."""
        return Moves(sign_G.to(self.direction_GMd)[:, None, None] * self.direction_GMd, self.offset_GMd)


@dataclass(frozen=True)
class Search:
    """How a push is found: the effect sought and its tolerance (nats), the largest alpha in typical row norms at the
    hook, the most evaluations, and how many pushes share a forward pass.
    """

    target_nats: float = 3.0
    tolerance: float = 0.005
    max_norms: float = 4.0
    max_evaluations: int = 10
    per_forward: int = 8


SEARCH = Search()


def parent_targets(concepts: Concepts, parents: Sequence[int], device: torch.device) -> list[Target]:
    """The parents as targets."""
    parts_P: list[list[Tensor]] = [[] for _ in range(concepts.n_parents)]
    for ids, owner in zip(concepts.child_tokens(), concepts.child_parent_R, strict=True):
        parts_P[owner] += [torch.tensor(ids, device=device)] if ids else []
    whole_P = [torch.cat(parts) for parts in parts_P]
    return [Target(whole_P[p], parts_P[p], whole_P[p], whole_P[:p] + whole_P[p + 1 :]) for p in parents]


def child_targets(concepts: Concepts, children: Sequence[int], device: torch.device) -> list[Target]:
    """The children (rows of `concepts.json`, each with tokens) as targets."""
    tokens_R, owner_R = [torch.tensor(ids, device=device) for ids in concepts.child_tokens()], concepts.child_parent_R
    targets = []
    for child in children:
        others = [row for row, owner in enumerate(owner_R) if row != child and owner == owner_R[child]]
        siblings = [tokens_R[row] for row in others if len(tokens_R[row])]
        targets.append(Target(tokens_R[child], siblings, torch.cat([tokens_R[child], *siblings]), siblings))
    return targets


def solve_alpha(
    evaluate: Evaluate, search: Search, largest: float, start_G: FloatArray, n_measured: int = 3
) -> Solution:
    """Find alpha in (0, largest] with |effect - target| <= tolerance, for all pushes together.

    The next alpha is where the parabola through the last three tries (alpha = 0, effect 0, is one) meets the target;
    where it does not within the bracket, the bracket's middle. A push that needs more than `largest`, or more
    evaluations than allowed, is NaN. `start_G`: the first alpha tried, where it is known what it may be (else NaN).
    """
    target, n_pushes = search.target_nats, len(start_G)
    solution = Solution(np.full(n_pushes, np.nan), np.full((n_pushes, n_measured), np.nan))
    low, high = np.zeros(n_pushes), np.full(n_pushes, np.inf)
    tried_G3, gap_G3 = np.full((n_pushes, 3), np.nan), np.full((n_pushes, 3), np.nan)
    tried_G3[:, -1], gap_G3[:, -1] = 0.0, -target
    alpha = _first(start_G, largest)
    open_A = np.arange(n_pushes)
    for _ in range(search.max_evaluations):
        measured_AK = evaluate(open_A, alpha[open_A])
        gap_A = measured_AK[:, EFFECT] - target
        done_A = np.abs(gap_A) <= search.tolerance
        solution.alpha_G[open_A[done_A]] = alpha[open_A[done_A]]
        solution.measured_GK[open_A[done_A]] = measured_AK[done_A]
        stuck_A = (gap_A < 0) & (alpha[open_A] >= largest)
        keep_A = ~done_A & ~stuck_A
        open_A, gap_A = open_A[keep_A], gap_A[keep_A]
        if not open_A.size:
            break
        tried_G3[open_A] = np.column_stack([tried_G3[open_A, 1:], alpha[open_A]])
        gap_G3[open_A] = np.column_stack([gap_G3[open_A, 1:], gap_A])
        below, above = open_A[gap_A < 0], open_A[gap_A >= 0]
        low[below], high[above] = alpha[below], alpha[above]
        guess = _parabola_root(tried_G3, gap_G3)
        inside = np.where((low < guess) & (guess < high), guess, (low + high) / 2)
        outside = np.minimum(np.where(guess > low, np.clip(guess, 1.02 * low, 4 * low), 4 * low), largest)
        alpha = np.where(np.isfinite(high), inside, outside)
    return solution


def _first(start_G: FloatArray, largest: float) -> FloatArray:
    """The first alphas tried."""
    return np.where(np.isfinite(start_G), np.minimum(start_G, largest), FIRST * largest)


def _parabola_root(x_G3: FloatArray, f_G3: FloatArray) -> FloatArray:
    """Where the parabola through three points is 0, on the side of the last point that is nearer; NaN where nowhere.

    Of two points (NaN in the first place) it is the line.
    """
    (x0, x1, x2), (f0, f1, f2) = x_G3.T, f_G3.T
    with np.errstate(all="ignore"):
        slope = (f2 - f1) / (x2 - x1)
        bend = np.nan_to_num((slope - (f1 - f0) / (x1 - x0)) / (x2 - x0))
        slope = slope + bend * (x2 - x1)  # at x2
        return x2 - 2 * f2 / (slope + np.copysign(np.sqrt(slope**2 - 4 * bend * f2), slope))


class Contexts:
    """Fixed contexts [M, T] without padding, pushed at their last position; what moved is measured there.

    At the final hook a push takes no forward pass, and at any other one a pass over the last token.
    Raises ValueError for contexts of another shape.
    """

    def __init__(self, lm: LanguageModel, hook: str, ids_MT: Tensor) -> None:
        if ids_MT.ndim != 2 or ids_MT.shape[1] < 2:
            raise ValueError(f"steering contexts: found shape {tuple(ids_MT.shape)}, allowed: [M, T >= 2]")
        self.lm, self.hook = lm, hook
        ids_MT = ids_MT.to(lm.device)
        acts_MTd = lm.capture(ids_MT, hook).acts
        # position 0 is left out: its norm is often that of an attention sink
        self.typical_norm = float(acts_MTd[:, 1:].norm(dim=-1).median())
        self.last_Md = acts_MTd[:, -1]
        self._last = None if hook == FINAL_HOOK else LastPosition(lm, ids_MT, hook)
        self.before_MV = self.log_probabilities(torch.zeros_like(self.last_Md[None])).squeeze(0)
        self.probability_MV = self.before_MV.exp()
        self.no_tokens = torch.zeros(0, dtype=torch.int64, device=self.before_MV.device)
        self.entropy_M = -(self.probability_MV * self.before_MV).sum(-1)

    def log_probabilities(self, added_GMd: Tensor) -> Tensor:
        """log p of the next token, float64 [G, M, V], with `added` in place."""
        if self._last is None:
            logits_GMV = self.lm.logits_from_final(self.last_Md + added_GMd)
        else:
            logits_GMV = self._last.logits(added_GMd)
        return logits_GMV.double().log_softmax(-1)

    def odds_rise(self, after_MV: Tensor, tokens: Tensor) -> Tensor:
        """By how many nats the tokens' log-odds, log P/(1 - P), have risen: [M]."""
        return self.share_rise(after_MV, tokens, tokens)

    def share_rise(self, after_MV: Tensor, tokens: Tensor, whole: Tensor) -> Tensor:
        """By how many nats the tokens' mass has risen over the mass of all tokens that are not in `whole`: [M]."""
        after_M = after_MV[:, tokens].logsumexp(-1) - _log_off(after_MV, whole)
        return after_M - (self.before_MV[:, tokens].logsumexp(-1) - _log_off(self.before_MV, whole))

    def side_effect(self, after_MV: Tensor, tokens: Tensor) -> Tensor:
        """KL(before || after) [M] of the next token off the tokens, renormalised.

        With p before, q after and R the rest of the vocabulary,
        KL = sum_R p (log p - log q) / p(R) - log p(R) + log q(R); the sum over R is the total minus the
        few target tokens, which spares copies of the vocabulary.
        """
        off_before_M, off_after_M = _log_off(self.before_MV, tokens), _log_off(after_MV, tokens)
        drop_M = -self.entropy_M - (self.probability_MV * after_MV).sum(-1)
        drop_M -= (self.probability_MV[:, tokens] * (self.before_MV[:, tokens] - after_MV[:, tokens])).sum(-1)
        return (drop_M / off_before_M.exp() - off_before_M + off_after_M).clamp(min=0)

    def parts_kl(self, after_MV: Tensor, parts: Sequence[Tensor]) -> float:
        """KL(before || after) between the parts' masses, renormalised, mean over contexts; NaN for a single part."""
        if len(parts) < 2:
            return math.nan
        before_MC, after_MC = (
            torch.stack([logits_MV[:, ids].logsumexp(-1) for ids in parts], dim=-1)
            for logits_MV in (self.before_MV, after_MV)
        )
        return _mean_kl(before_MC, after_MC)

    def tokens_kl(self, after_MV: Tensor, parts: Sequence[Tensor]) -> float:
        """The same between all tokens of the parts; NaN for fewer than two tokens."""
        tokens = torch.cat([*parts, self.no_tokens])
        if len(tokens) < 2:
            return math.nan
        return _mean_kl(self.before_MV[:, tokens], after_MV[:, tokens])


# What is measured of a push, given log p [M, V] after it and its target: K numbers, the effect first.
Measure = Callable[[Tensor, Target], list[float]]


def _log_off(log_p_MV: Tensor, tokens: Tensor) -> Tensor:
    """log of the mass off the tokens: [M]."""
    return torch.log1p(-torch.exp(log_p_MV[:, tokens].logsumexp(-1)))


def _mean_kl(before_MC: Tensor, after_MC: Tensor) -> float:
    before_MC, after_MC = before_MC.log_softmax(-1), after_MC.log_softmax(-1)
    return float((before_MC.exp() * (before_MC - after_MC)).sum(-1).mean())


@torch.no_grad()
def push(
    contexts: Contexts,
    targets: Sequence[Target],
    moves: Moves,
    search: Search,
    measure: Measure,
    n_measured: int,
    *,
    either_sign: bool = False,
    start_G: FloatArray | None = None,
) -> Solution:
    """Every target pushed by its move until the effect is reached.

    `either_sign` turns a direction around where it lowers the target's odds. `start_G`: as for `solve_alpha`.
    """
    solutions = [Solution(np.zeros(0), np.zeros((0, n_measured)))]
    start_G = np.full(len(targets), np.nan) if start_G is None else start_G
    largest = search.max_norms * contexts.typical_norm
    for first in range(0, len(targets), search.per_forward):
        group = slice(first, first + search.per_forward)
        evaluate = _evaluator(contexts, targets[group], moves.rows(group), measure)
        if either_sign:
            probe_GK = evaluate(np.arange(len(targets[group])), _first(start_G[group], largest))
            sign_G = torch.from_numpy(np.where(probe_GK[:, EFFECT] < 0, -1.0, 1.0))
            evaluate = _evaluator(contexts, targets[group], moves.rows(group).turned(sign_G), measure)
        solutions.append(solve_alpha(evaluate, search, largest, start_G[group], n_measured))
    return Solution(*(np.concatenate(parts) for parts in zip(*solutions, strict=True)))


def _evaluator(contexts: Contexts, targets: Sequence[Target], moves: Moves, measure: Measure) -> Evaluate:
    def evaluate(pushes_A: NDArray[np.int64], alpha_A: FloatArray) -> FloatArray:
        rows_A = torch.from_numpy(pushes_A).to(moves.direction_GMd.device)
        alpha_A11 = torch.from_numpy(alpha_A).to(moves.direction_GMd)[:, None, None]
        added_AMd = alpha_A11 * moves.direction_GMd[rows_A] + moves.offset_GMd[rows_A]
        after_AMV = contexts.log_probabilities(added_AMd.expand(-1, len(contexts.last_Md), -1))
        return np.array([measure(after_MV, targets[g]) for after_MV, g in zip(after_AMV, pushes_A, strict=True)])

    return evaluate


def evenly_spaced(rows: Sequence[int] | NDArray[np.int64], at_most: int | None) -> list[int]:
    """At most that many of the rows, evenly spaced in their order, from the first to the last."""
    found = np.asarray(rows, dtype=np.int64)
    if at_most is not None and len(found) > at_most:
        found = found[np.linspace(0, len(found) - 1, at_most).round().astype(np.int64)]
    return found.tolist()


def next_of_another(owners: Sequence[int]) -> list[int]:
    """For each place the next one (cyclically) of another owner, or the next one where all have the same."""
    n = len(owners)
    found = []
    for place, owner in enumerate(owners):
        following = [(place + shift) % n for shift in range(1, n)]
        found.append(next((other for other in following if owners[other] != owner), (place + 1) % n))
    return found
