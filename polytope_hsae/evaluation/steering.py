"""What else moves when a concept's latent is used to steer (docs/method.md §5, interventions of §3).

For a mapped parent p with token set T the hook's residual at the last position of short contexts becomes h +
alpha * D_p, D_p the unit write direction of the mapped latent of the model under test. The reconstruction
error stays in place: for a parent code this equals the encoder override h + x_hat(edited codes) -
x_hat(codes), because decoding is linear in the codes. alpha is never fixed: it is found per concept so that
the target log-odds log(P(T) / (1 - P(T))), averaged over contexts, rises by the same number of nats.

Shapes: M contexts, T positions, d residual width, V vocabulary, G concepts of one forward pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.evaluation.bootstrap import Evaluation, FloatArray, Metric, Units, summarise, unavailable
from polytope_hsae.evaluation.reconstruction import NO_HEAD
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.models.base import SparseAutoencoder

STEERING_METRICS = ("steering_leakage", "sibling_kl", "steering_unreached")
MEASURED = ("alpha", "effect", "steering_leakage", "sibling_kl")
COLUMNS = (*MEASURED, *(f"chance_{name}" for name in MEASURED))
EFFECT = 0

# Given concept numbers [A] and alphas [A]: rows [A, 3] of effect, leakage and sibling KL.
Evaluate = Callable[[NDArray[np.int64], FloatArray], FloatArray]


class Solution(NamedTuple):
    """alpha [G] and measured rows [G, 3]; NaN where the effect was not reached."""

    alpha_G: FloatArray
    measured_G3: FloatArray


@dataclass(frozen=True)
class Search:
    """The effect sought and its tolerance (nats), the largest alpha, the most evaluations."""

    target_nats: float
    tolerance: float
    largest: float
    max_evaluations: int


@dataclass(frozen=True)
class SteeringEvaluation:
    """`result`: metrics and per-concept units; `records`: one JSON object per concept, for steering.json."""

    result: Evaluation
    records: list[dict[str, Any]]


def solve_alpha(evaluate: Evaluate, n_concepts: int, search: Search) -> Solution:
    """Find alpha in (0, largest] with |effect - target| <= tolerance, for all concepts together.

    Secant extrapolation from alpha = 0 (effect 0) until the target is bracketed, then regula falsi
    (Illinois), kept off the ends of the bracket. A concept that needs more than `largest`, or more
    evaluations than allowed, is NaN.
    """
    target, largest = search.target_nats, search.largest
    solution = Solution(np.full(n_concepts, np.nan), np.full((n_concepts, 3), np.nan))
    low, high = np.zeros(n_concepts), np.full(n_concepts, np.nan)
    f_low, f_high = np.full(n_concepts, -target), np.full(n_concepts, np.nan)
    side = np.zeros(n_concepts, dtype=np.int64)
    alpha = np.full(n_concepts, largest / 16)
    open_A = np.arange(n_concepts)
    for _ in range(search.max_evaluations):
        measured_A3 = evaluate(open_A, alpha[open_A])
        gap_A = measured_A3[:, EFFECT] - target
        done_A = np.abs(gap_A) <= search.tolerance
        solution.alpha_G[open_A[done_A]] = alpha[open_A[done_A]]
        solution.measured_G3[open_A[done_A]] = measured_A3[done_A]
        stuck_A = (gap_A < 0) & (alpha[open_A] >= largest)
        keep_A = ~done_A & ~stuck_A
        open_A, gap_A = open_A[keep_A], gap_A[keep_A]
        if not open_A.size:
            break
        below, above = open_A[gap_A < 0], open_A[gap_A >= 0]
        f_high[below] = np.where(side[below] == -1, f_high[below] / 2, f_high[below])
        f_low[above] = np.where(side[above] == 1, f_low[above] / 2, f_low[above])
        low[below], f_low[below], side[below] = alpha[below], gap_A[gap_A < 0], -1
        high[above], f_high[above], side[above] = alpha[above], gap_A[gap_A >= 0], 1
        bracketed = np.isfinite(high)
        width = high - low
        inside = low - f_low * width / (f_high - f_low)
        rise = f_low + target
        beyond = np.where(rise > 0, 1.05 * alpha * target / np.maximum(rise, 1e-12), math.inf)
        outside = np.minimum(np.clip(beyond, 1.1 * alpha, 4 * alpha), largest)
        alpha = np.where(bracketed, np.clip(inside, low + 0.01 * width, high - 0.01 * width), outside)
    return solution


class _TokenSets(NamedTuple):
    """Target mask [G, V] and, per concept, the token ids of each of its children."""

    target_GV: Tensor
    children: list[list[Tensor]]


def _token_sets(
    concepts: Concepts, parents: Sequence[int], vocab_size: int, device: torch.device
) -> _TokenSets:
    tokens_R, parent_R = concepts.child_tokens(), list(concepts.child_parent_R)
    target_GV = torch.zeros(len(parents), vocab_size, dtype=torch.bool, device=device)
    children: list[list[Tensor]] = []
    for row, parent in enumerate(parents):
        ids_of_children = [
            ids for ids, owner in zip(tokens_R, parent_R, strict=True) if owner == parent and ids
        ]
        own = [torch.tensor(ids, device=device) for ids in ids_of_children]
        children.append(own)
        target_GV[row, torch.cat(own)] = True
    return _TokenSets(target_GV, children)


def _log_odds(logits_MV: Tensor, target_V: Tensor) -> Tensor:
    """log(P(T) / (1 - P(T))) per context [M]."""
    return logits_MV[:, target_V].logsumexp(-1) - logits_MV[:, ~target_V].logsumexp(-1)


def _kl(before_MX: Tensor, after_MX: Tensor) -> Tensor:
    """Mean over contexts of KL(before || after) of two sets of logits, each renormalised."""
    log_before, log_after = before_MX.log_softmax(-1), after_MX.log_softmax(-1)
    return (log_before.exp() * (log_before - log_after)).sum(-1).mean()


def _child_logits(logits_MV: Tensor, children: list[Tensor]) -> Tensor:
    return torch.stack([logits_MV[:, ids].logsumexp(-1) for ids in children], dim=-1)


class _Steerer:
    """Runs the language model with rows added at the last position, and measures what happened."""

    def __init__(self, lm: LanguageModel, hook: str, ids_MT: Tensor) -> None:
        self.lm, self.hook, self.ids_MT = lm, hook, ids_MT
        acts_MTd = lm.capture(ids_MT, hook).acts
        # position 0 is left out: its norm is often that of an attention sink
        self.typical_norm = float(acts_MTd[:, 1:].norm(dim=-1).median())
        self.last_Md = acts_MTd[:, -1]
        self.before_MV = self._logits(torch.zeros_like(self.last_Md[None])).squeeze(0).double()

    def _logits(self, added_GMd: Tensor) -> Tensor:
        """Next-token logits [G, M, V] with `added` in place; at the final hook no forward pass is needed."""
        n_groups, n_contexts, width = added_GMd.shape
        if self.hook == FINAL_HOOK:
            return self.lm.logits_from_final(self.last_Md + added_GMd)
        added_Bd = added_GMd.reshape(-1, width)

        def edit(acts_BTd: Tensor) -> Tensor:
            edited_BTd = acts_BTd.clone()
            edited_BTd[:, -1] += added_Bd.to(acts_BTd)
            return edited_BTd

        logits_BV = self.lm.run_with_edit(self.ids_MT.repeat(n_groups, 1), self.hook, edit, last_only=True)
        return logits_BV.view(n_groups, n_contexts, -1)

    def evaluator(self, directions_Gd: Tensor, sets: _TokenSets) -> Evaluate:
        def evaluate(concept_A: NDArray[np.int64], alpha_A: FloatArray) -> FloatArray:
            rows_A = torch.from_numpy(concept_A).to(directions_Gd.device)
            scale_A = torch.from_numpy(alpha_A).to(directions_Gd)
            added_AMd = (scale_A[:, None] * directions_Gd[rows_A])[:, None].expand(-1, len(self.last_Md), -1)
            after_AMV = self._logits(added_AMd)
            pairs = zip(concept_A.tolist(), after_AMV, strict=True)
            return np.array([self._measure(after_MV.double(), sets, g) for g, after_MV in pairs])

        return evaluate

    def _measure(self, after_MV: Tensor, sets: _TokenSets, g: int) -> list[float]:
        target_V, children = sets.target_GV[g], sets.children[g]
        effect = (_log_odds(after_MV, target_V) - _log_odds(self.before_MV, target_V)).mean()
        leakage = _kl(self.before_MV[:, ~target_V], after_MV[:, ~target_V])
        sibling = math.nan
        if len(children) > 1:
            sibling = float(_kl(_child_logits(self.before_MV, children), _child_logits(after_MV, children)))
        return [float(effect), float(leakage), sibling]


def _solve_in_groups(
    steerer: _Steerer,
    concepts: Concepts,
    parents: list[int],
    directions_Qd: Tensor,
    per_forward: int,
    search: Search,
) -> Solution:
    solutions = []
    for start in range(0, len(parents), per_forward):
        group = slice(start, start + per_forward)
        sets = _token_sets(concepts, parents[group], steerer.before_MV.shape[-1], steerer.before_MV.device)
        evaluate = steerer.evaluator(directions_Qd[group], sets)
        solutions.append(solve_alpha(evaluate, len(parents[group]), search))
    return Solution(*(np.concatenate(parts) for parts in zip(*solutions, strict=True)))


def _select(parents_Q: Sequence[int], max_concepts: int | None) -> list[int]:
    """At most `max_concepts` parents, evenly spaced in file order: equal for every arm."""
    parents = [int(parent) for parent in parents_Q]
    if max_concepts is None or len(parents) <= max_concepts:
        return parents
    return [parents[i] for i in np.linspace(0, len(parents) - 1, max_concepts).round().astype(int)]


@torch.no_grad()
def evaluate_steering(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    hook: str,
    concepts: Concepts,
    parents_Q: Sequence[int] | NDArray[np.int64],
    latent_P: NDArray[np.int64],
    ids_MT: Tensor,
    *,
    target_nats: float = 3.0,
    tolerance: float = 0.02,
    max_norms: float = 4.0,
    max_evaluations: int = 10,
    max_concepts: int | None = None,
    per_forward: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
) -> SteeringEvaluation:
    """Side effects of steering each concept in use by the same effect, on contexts [M, T] without padding.

    `steering_leakage`: mean over contexts of KL(before || after) of the next-token distribution renormalised
    off the target set (all the parent's tokens). `sibling_kl`: the same over the parent's children, each with
    the mass of its tokens, renormalised. Both in nats, at an effect of `target_nats` +- `tolerance`; chance
    is another mapped concept's direction (the next one, cyclically) at the same effect on p, over the
    concepts where it reaches it. alpha is at most `max_norms` times the median row norm at the hook.
    `steering_unreached` is the share of concepts whose effect is not reached within that and
    `max_evaluations` (or which have no latent); they have no leakage. A model without an output head gets
    nulls.
    """
    if not lm.has_head:
        return SteeringEvaluation(Evaluation({name: unavailable(NO_HEAD) for name in STEERING_METRICS}), [])
    if ids_MT.ndim != 2 or ids_MT.shape[1] < 2:
        raise ValueError(f"steering contexts: found shape {tuple(ids_MT.shape)}, allowed: [M, T >= 2]")
    selected = _select(list(parents_Q), max_concepts)
    mapped = [parent for parent in selected if latent_P[parent] >= 0]
    if not mapped:
        why = "no concept in use has a latent"
        return SteeringEvaluation(Evaluation({name: unavailable(why) for name in STEERING_METRICS}), [])
    steerer = _Steerer(lm, hook, ids_MT.to(lm.device))
    latents = torch.as_tensor(latent_P[mapped], device=sae.write_directions().device)
    directions_Qd = sae.write_directions()[latents].to(steerer.last_Md)
    search = Search(target_nats, tolerance, max_norms * steerer.typical_norm, max_evaluations)
    own = _solve_in_groups(steerer, concepts, mapped, directions_Qd, per_forward, search)
    other = Solution(np.full(len(mapped), np.nan), np.full((len(mapped), 3), np.nan))
    if len(mapped) > 1:
        other = _solve_in_groups(
            steerer, concepts, mapped, directions_Qd.roll(-1, dims=0), per_forward, search
        )
    return _report(selected, mapped, latent_P, own, other, bootstrap, seed)


def _report(
    selected: list[int],
    mapped: list[int],
    latent_P: NDArray[np.int64],
    own: Solution,
    other: Solution,
    bootstrap: int,
    seed: int,
) -> SteeringEvaluation:
    values_Q8 = np.full((len(selected), len(COLUMNS)), math.nan)
    found = np.column_stack([own.alpha_G, own.measured_G3, other.alpha_G, other.measured_G3])
    values_Q8[np.isin(selected, mapped)] = found
    per_concept = dict(zip(COLUMNS, values_Q8.T, strict=True))
    records: list[dict[str, Any]] = []
    for parent, values in zip(selected, values_Q8.tolist(), strict=True):
        finite = [value if math.isfinite(value) else None for value in values]
        records.append(
            {"parent": parent, "latent": int(latent_P[parent]), **dict(zip(COLUMNS, finite, strict=True))}
        )
    units = {
        "steering_leakage": Units.mean(per_concept["steering_leakage"], selected),
        "sibling_kl": Units.mean(per_concept["sibling_kl"], selected),
        "steering_unreached": Units.mean(np.isnan(per_concept["alpha"]), selected),
    }
    chance = {
        "steering_leakage": _mean_or_none(per_concept["chance_steering_leakage"]),
        "sibling_kl": _mean_or_none(per_concept["chance_sibling_kl"]),
    }
    result = summarise(units, chance, bootstrap, seed)
    if not np.isfinite(per_concept["alpha"]).any():
        why = f"no concept of {len(selected)} reaches the effect"
        reached: dict[str, Metric] = {name: unavailable(why, chance[name]) for name in chance}
        result = Evaluation(result.metrics | reached, units)
    return SteeringEvaluation(result, records)


def _mean_or_none(values: FloatArray) -> float | None:
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else None
