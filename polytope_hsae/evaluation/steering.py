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
from polytope_hsae.evaluation.bootstrap import (
    Evaluation,
    FloatArray,
    Units,
    bootstrap_mean,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.reconstruction import NO_HEAD
from polytope_hsae.evaluation.words import significant
from polytope_hsae.lm import FINAL_HOOK, LanguageModel
from polytope_hsae.lm_edits import LastPosition
from polytope_hsae.models.base import SparseAutoencoder

STEERING_METRICS = ("steering_leakage", "sibling_kl", "steering_unreached")
MEASURED = ("alpha", "effect", "steering_leakage", "sibling_kl")
COLUMNS = (*MEASURED, *(f"chance_{name}" for name in MEASURED))
EFFECT = 0
FIRST = 1 / 16  # the first alpha tried, as a share of the largest
EXAMPLE_TOKENS = 5

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
    alpha = np.full(n_concepts, FIRST * search.largest)
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
        outside = np.minimum(np.clip(beyond, 1.5 * alpha, 4 * alpha), largest)
        alpha = np.where(bracketed, np.clip(inside, low + 0.01 * width, high - 0.01 * width), outside)
    return solution


def _child_tokens(concepts: Concepts, parents: Sequence[int], device: torch.device) -> list[list[Tensor]]:
    """Token ids of each child of each parent; a parent's target set is their union."""
    tokens_R, parent_R = concepts.child_tokens(), concepts.child_parent_R
    return [
        [
            torch.tensor(ids, device=device)
            for ids, owner in zip(tokens_R, parent_R, strict=True)
            if owner == parent and ids
        ]
        for parent in parents
    ]


def _log_rest(log_total_M: Tensor, log_part_M: Tensor) -> Tensor:
    """log(exp(total) - exp(part)): the mass off the target set."""
    return log_total_M + torch.log1p(-torch.exp(log_part_M - log_total_M))


def _sibling_kl(before_MV: Tensor, after_MV: Tensor, children: list[Tensor]) -> Tensor:
    """Mean over contexts of KL(before || after) between the children's masses, renormalised."""
    before_MC, after_MC = (
        torch.stack([logits_MV[:, ids].logsumexp(-1) for ids in children], dim=-1).log_softmax(-1)
        for logits_MV in (before_MV, after_MV)
    )
    return (before_MC.exp() * (before_MC - after_MC)).sum(-1).mean()


class _Steerer:
    """Runs the language model with rows added at the last position, and measures what happened.

    At the final hook that takes no forward pass, and at any other one a pass over the last token.
    """

    def __init__(self, lm: LanguageModel, hook: str, ids_MT: Tensor) -> None:
        self.lm = lm
        acts_MTd = lm.capture(ids_MT, hook).acts
        # position 0 is left out: its norm is often that of an attention sink
        self.typical_norm = float(acts_MTd[:, 1:].norm(dim=-1).median())
        self.last_Md = acts_MTd[:, -1]
        self.last = None if hook == FINAL_HOOK else LastPosition(lm, ids_MT, hook)
        self.before_MV = self._logits(torch.zeros_like(self.last_Md[None])).squeeze(0).double()
        self.log_total_M = self.before_MV.logsumexp(-1)
        self.probability_MV = self.before_MV.softmax(-1)
        self.mean_logit_M = (self.probability_MV * self.before_MV).sum(-1)

    def _logits(self, added_GMd: Tensor) -> Tensor:
        """Next-token logits [G, M, V] with `added` in place."""
        if self.last is None:
            return self.lm.logits_from_final(self.last_Md + added_GMd)
        return self.last.logits(added_GMd)

    def evaluator(self, directions_Gd: Tensor, children_G: list[list[Tensor]]) -> Evaluate:
        def evaluate(concept_A: NDArray[np.int64], alpha_A: FloatArray) -> FloatArray:
            rows_A = torch.from_numpy(concept_A).to(directions_Gd.device)
            scale_A = torch.from_numpy(alpha_A).to(directions_Gd)
            added_AMd = (scale_A[:, None] * directions_Gd[rows_A])[:, None].expand(-1, len(self.last_Md), -1)
            after_AMV = self._logits(added_AMd)
            measured = map(self._measure, after_AMV.double(), (children_G[g] for g in concept_A.tolist()))
            return np.array(list(measured))

        return evaluate

    def _measure(self, after_MV: Tensor, children: list[Tensor]) -> list[float]:
        """Effect, leakage and sibling KL. Off the target set R, with z logits and Z_R their log-sum-exp,

        KL = sum_R p (z_before - z_after) / P(R) - Z_R,before + Z_R,after; sums over R are totals minus the
        few target tokens, which spares copies of the vocabulary.
        """
        target = torch.cat(children)
        before_MT, now_MT = self.before_MV[:, target], after_MV[:, target]
        in_before_M, in_after_M = before_MT.logsumexp(-1), now_MT.logsumexp(-1)
        rest_before_M = _log_rest(self.log_total_M, in_before_M)
        rest_after_M = _log_rest(after_MV.logsumexp(-1), in_after_M)
        effect_M = (in_after_M - rest_after_M) - (in_before_M - rest_before_M)
        drop_M = self.mean_logit_M - (self.probability_MV * after_MV).sum(-1)
        drop_M -= (self.probability_MV[:, target] * (before_MT - now_MT)).sum(-1)
        kl_M = drop_M / (rest_before_M - self.log_total_M).exp() - rest_before_M + rest_after_M
        several = len(children) > 1
        sibling = float(_sibling_kl(self.before_MV, after_MV, children)) if several else math.nan
        return [float(effect_M.mean()), float(kl_M.clamp(min=0).mean()), sibling]


def _solve_in_groups(
    steerer: _Steerer,
    concepts: Concepts,
    parents: list[int],
    directions_Qd: Tensor,
    per_forward: int,
    search: Search,
    either_sign: bool = False,
) -> Solution:
    solutions = [Solution(np.zeros(0), np.zeros((0, 3)))]
    for start in range(0, len(parents), per_forward):
        group = slice(start, start + per_forward)
        children_G = _child_tokens(concepts, parents[group], steerer.before_MV.device)
        directions_Gd = directions_Qd[group]
        if either_sign:
            start_G = np.full(len(directions_Gd), FIRST * search.largest)
            probe_G3 = steerer.evaluator(directions_Gd, children_G)(np.arange(len(start_G)), start_G)
            sign_G = torch.from_numpy(np.where(probe_G3[:, EFFECT] < 0, -1.0, 1.0)).to(directions_Gd)
            directions_Gd = sign_G[:, None] * directions_Gd
        solutions.append(solve_alpha(steerer.evaluator(directions_Gd, children_G), len(directions_Gd), search))
    return Solution(*(np.concatenate(parts) for parts in zip(*solutions, strict=True)))


def _examples(
    lm: LanguageModel,
    hook: str,
    ids_T: Tensor,
    directions_Qd: Tensor,
    alpha_Q: FloatArray,
    per_forward: int,
    text: Callable[[int], str],
) -> list[dict[str, Any] | None]:
    """For each concept the likeliest next tokens of one context, before and after; None where alpha is NaN."""
    steerer = _Steerer(lm, hook, ids_T[None])
    context = [text(token) for token in ids_T.tolist()]
    examples: list[dict[str, Any] | None] = [None] * len(alpha_Q)

    def likeliest(probability_V: Tensor) -> list[list[Any]]:
        found = probability_V.topk(min(EXAMPLE_TOKENS, len(probability_V)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[text(token), significant(probability)] for token, probability in pairs]

    before = likeliest(steerer.probability_MV[0])
    reached = np.flatnonzero(np.isfinite(alpha_Q))
    for start in range(0, len(reached), per_forward):
        group = reached[start : start + per_forward]
        added_Ad = torch.from_numpy(alpha_Q[group]).to(directions_Qd)[:, None] * directions_Qd[group]
        after_AV = steerer._logits(added_Ad[:, None])[:, 0].double().softmax(-1)
        for concept, after_V in zip(group.tolist(), after_AV, strict=True):
            examples[concept] = {"context": context, "before": before, "after": likeliest(after_V)}
    return examples


def _select(parents_Q: Sequence[int] | NDArray[np.int64], max_concepts: int | None) -> list[int]:
    """At most `max_concepts` parents, evenly spaced in file order, from the first to the last."""
    parents = np.asarray(parents_Q, dtype=np.int64)
    if max_concepts is not None and len(parents) > max_concepts:
        parents = parents[np.linspace(0, len(parents) - 1, max_concepts).round().astype(np.int64)]
    return parents.tolist()


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
    text: Callable[[int], str] = str,
    bootstrap: int = 1000,
    seed: int = 0,
) -> SteeringEvaluation:
    """Side effects of steering each concept in use by the same effect, on contexts [M, T] without padding.

    `steering_leakage`: mean over contexts of KL(before || after) of the next-token distribution renormalised
    off the target set (all the parent's tokens). `sibling_kl`: the same over the parent's children, each with
    the mass of its tokens, renormalised. Both in nats, at an effect of `target_nats` +- `tolerance`; chance
    is another mapped concept's direction (the next one, cyclically; with the sign that raises p) at the same
    effect on p, over the concepts where it reaches it. alpha is at most `max_norms` times the median row norm
    at the hook. `steering_unreached` is the share of concepts whose effect is not reached within that and
    `max_evaluations` (or which have no latent); they have no leakage. Of more than `max_concepts` concepts in
    use (`parents_Q`), that many are steered: evenly spaced in file order, from the first to the last, so that
    every arm steers the same ones. Every record has an `example`: the likeliest next tokens before and after, in
    the context whose next token is least certain, with `text` of each token. A model without an output head gets
    nulls.
    """
    if not lm.has_head:
        return SteeringEvaluation(Evaluation({name: unavailable(NO_HEAD) for name in STEERING_METRICS}), [])
    if ids_MT.ndim != 2 or ids_MT.shape[1] < 2:
        raise ValueError(f"steering contexts: found shape {tuple(ids_MT.shape)}, allowed: [M, T >= 2]")
    selected = _select(parents_Q, max_concepts)
    mapped = [parent for parent in selected if latent_P[parent] >= 0]
    steerer = _Steerer(lm, hook, ids_MT.to(lm.device))
    write_Pd = sae.write_directions()
    directions_Qd = write_Pd[torch.as_tensor(latent_P[mapped], device=write_Pd.device)].to(steerer.last_Md)
    search = Search(target_nats, tolerance, max_norms * steerer.typical_norm, max_evaluations)
    own = _solve_in_groups(steerer, concepts, mapped, directions_Qd, per_forward, search)
    other = Solution(np.full(len(mapped), np.nan), np.full((len(mapped), 3), np.nan))
    if len(mapped) > 1:
        shifted_Qd = directions_Qd.roll(-1, dims=0)
        other = _solve_in_groups(steerer, concepts, mapped, shifted_Qd, per_forward, search, either_sign=True)
    entropy_M = steerer.log_total_M - steerer.mean_logit_M
    open_context = ids_MT[int(entropy_M.argmax())]  # where the model is sure of the next token, little would show
    examples = _examples(lm, hook, open_context, directions_Qd, own.alpha_G, per_forward, text)
    shown = dict(zip(mapped, examples, strict=True))
    return _report(selected, mapped, latent_P, own, other, shown, bootstrap, seed)


def _report(
    selected: list[int],
    mapped: list[int],
    latent_P: NDArray[np.int64],
    own: Solution,
    other: Solution,
    examples: dict[int, dict[str, Any] | None],
    bootstrap: int,
    seed: int,
) -> SteeringEvaluation:
    values_Q8 = np.full((len(selected), len(COLUMNS)), math.nan)
    found = np.column_stack([own.alpha_G, own.measured_G3, other.alpha_G, other.measured_G3])
    values_Q8[np.isin(selected, mapped)] = found
    per_concept = dict(zip(COLUMNS, values_Q8.T, strict=True))
    records: list[dict[str, Any]] = []
    for parent, values in zip(selected, values_Q8.tolist(), strict=True):
        finite = (value if math.isfinite(value) else None for value in values)
        named = dict(zip(COLUMNS, finite, strict=True))
        record = {"parent": parent, "latent": int(latent_P[parent])} | named
        records.append(record | {"example": examples.get(parent)})
    units = {name: Units.mean(per_concept[name], selected) for name in ("steering_leakage", "sibling_kl")}
    chance = {name: bootstrap_mean(per_concept[f"chance_{name}"], n=1).value for name in units}
    units["steering_unreached"] = Units.mean(np.isnan(per_concept["alpha"]), selected)
    return SteeringEvaluation(summarise(units, chance, bootstrap, seed), records)
