"""What else moves when a concept's latent is used to steer (docs/method.md §5, interventions of §3).

The latent that a concept, parent or child, was mapped to is used in two forms, both at the last position of short
contexts. *inject*: h + alpha * D_p, or alpha * A_pc, the latent's unit write direction. *override*: h + x_hat(edited
codes) - x_hat(codes) with the latent's code set to one value in every context, whatever it was there. The
reconstruction error stays in place in both. The gate is not asked in an override: a child's code is set where its
parent is off, too. alpha is never fixed: it is found per concept so that the log-odds of the concept's tokens, averaged
over contexts, rise by the same number of nats. In an override alpha is the code's value, in units of the residual.

Shapes: M contexts, T positions, d residual width, Q concepts of a level and their latents, k or K slots of a row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.vocabulary import significant
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    Evaluation,
    FloatArray,
    Resampling,
    Units,
    bootstrap_mean,
    bootstrap_units,
    summarise,
    unavailable,
)
from polytope_hsae.evaluation.concepts import IntArray
from polytope_hsae.evaluation.pushing import (
    SEARCH,
    Contexts,
    Moves,
    Search,
    Solution,
    Target,
    child_targets,
    next_of_another,
    parent_targets,
    push,
)
from polytope_hsae.lm import NO_HEAD, LanguageModel
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.hsae import HierarchicalSAE

Level = Literal["parent", "child"]
Form = Literal["inject", "override"]
LEVELS: tuple[Level, ...] = ("parent", "child")
FORMS: tuple[Form, ...] = ("inject", "override")
OF_CONCEPTS = ("steering_leakage", "sibling_kl", "steering_unreached")
MEASURED = ("alpha", "effect", "steering_leakage", "sibling_kl")
COLUMNS = (*MEASURED, *(f"chance_{name}" for name in MEASURED))
EXAMPLE_TOKENS = 5


def metric_name(name: str, level: Level, form: Form) -> str:
    """`steering_leakage` for injected parents, `child_steering_leakage_override` for overridden children."""
    return f"{'child_' if level == 'child' else ''}{name}{'_override' if form == 'override' else ''}"


STEERING_METRICS = tuple(metric_name(name, level, form) for level in LEVELS for form in FORMS for name in OF_CONCEPTS)


class Steered(NamedTuple):
    """Concepts of a level (rows of `concepts.json`) and the latent of each, -1 for none."""

    concepts: list[int]
    latents: IntArray


NOTHING = Steered([], np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class SteeringEvaluation:
    """`result`: metrics and per-concept units; `records` and `children`: a JSON object per parent and child concept,
    injected, at the target; `grid`: one per level, form, hook and dose.
    """

    result: Evaluation
    records: list[dict[str, Any]]
    children: list[dict[str, Any]]
    grid: list[dict[str, Any]]


class _Place(NamedTuple):
    """Where in the grid a table of COLUMNS [Q, 8] belongs; NaN in it where the effect was not reached."""

    level: Level
    form: Form
    hook: str
    target_nats: float


def _solve(
    contexts: Contexts, targets: list[Target], moves: Moves, search: Search, start_Q: FloatArray, either_sign: bool
) -> Solution:
    """Pushes to the effect sought, with effect, leakage off the target set, and KL among the target's parts."""

    def measure(after_MV: Tensor, target: Target) -> list[float]:
        effect = float(contexts.odds_rise(after_MV, target.tokens).mean())
        leakage = float(contexts.side_effect(after_MV, target.tokens).mean())
        return [effect, leakage, contexts.parts_kl(after_MV, target.parts)]

    n_measured = len(MEASURED) - 1
    return push(contexts, targets, moves, search, measure, n_measured, either_sign=either_sign, start_G=start_Q)


class _OfLevel:
    """The concepts of a level, and the tables of a model's steering of them."""

    def __init__(self, level: Level, steered: Steered, concepts: Concepts, device: torch.device) -> None:
        self.level, self.steered = level, steered
        self.mapped = np.flatnonzero(steered.latents >= 0)  # places of the concepts that have a latent
        self.latents = steered.latents[self.mapped]
        rows = np.asarray(steered.concepts, dtype=np.int64)[self.mapped].tolist()
        self.targets = (parent_targets if level == "parent" else child_targets)(concepts, rows, device)
        self.others = next_of_another(rows if level == "parent" else [concepts.child_parent_R[row] for row in rows])
        self.tables: dict[_Place, FloatArray] = {}

    def add(
        self,
        form: Form,
        moves: Moves,
        contexts: Contexts,
        doses: Sequence[float],
        search: Search,
        start_Q8: FloatArray | None = None,
    ) -> FloatArray:
        """Tables of all doses; the first dose's is given back. The others are sought from what it took."""
        if start_Q8 is None:
            start_Q8 = np.full((len(self.steered.concepts), len(COLUMNS)), math.nan)
        first_Q8 = start_Q8
        for nats in doses:
            first = nats == doses[0]
            start_Q8 = start_Q8 if first else first_Q8 * (nats / doses[0])
            table_Q8 = self._table(moves, contexts, replace(search, target_nats=nats), start_Q8)
            first_Q8 = table_Q8 if first else first_Q8
            self.tables[_Place(self.level, form, contexts.hook, nats)] = table_Q8
        return first_Q8

    def _table(self, moves: Moves, contexts: Contexts, search: Search, start_Q8: FloatArray) -> FloatArray:
        alpha_Q, chance_alpha_Q = (start_Q8[self.mapped, COLUMNS.index(name)] for name in ("alpha", "chance_alpha"))
        own = _solve(contexts, self.targets, moves, search, alpha_Q, False)
        other = Solution(np.full_like(own.alpha_G, math.nan), np.full_like(own.measured_GK, math.nan))
        if len(self.mapped) > 1:
            swapped = moves.rows(torch.tensor(self.others))
            other = _solve(contexts, self.targets, swapped, search, chance_alpha_Q, True)
        table_Q8 = np.full_like(start_Q8, math.nan)
        table_Q8[self.mapped] = np.column_stack([own.alpha_G, own.measured_GK, other.alpha_G, other.measured_GK])
        return table_Q8

    def units(self, table_Q8: FloatArray) -> tuple[dict[str, Units], dict[str, float | None]]:
        """Units and chance levels of a table's metrics."""
        column = dict(zip(COLUMNS, table_Q8.T, strict=True))
        units = {name: Units.mean(column[name], self.steered.concepts) for name in ("steering_leakage", "sibling_kl")}
        chance = {name: bootstrap_mean(column[f"chance_{name}"], n=1).value for name in units}
        units["steering_unreached"] = Units.mean(np.isnan(column["alpha"]), self.steered.concepts)
        return units, chance

    def metrics(self, form: Form, table_Q8: FloatArray, resampling: Resampling) -> Evaluation:
        """The metrics of results.json."""
        found, levels = self.units(table_Q8)
        units = {metric_name(name, self.level, form): each for name, each in found.items()}
        chance = {metric_name(name, self.level, form): level for name, level in levels.items()}
        return summarise(units, chance, *resampling)

    def records(self, table_Q8: FloatArray) -> list[dict[str, Any]]:
        """One JSON object per concept."""
        records = []
        for concept, latent, values in zip(*self.steered, table_Q8.tolist(), strict=True):
            finite = (value if math.isfinite(value) else None for value in values)
            records.append({self.level: concept, "latent": int(latent)} | dict(zip(COLUMNS, finite, strict=True)))
        return records

    def grid(self, resampling: Resampling) -> list[dict[str, Any]]:
        """One JSON object per table: how many concepts were not reached, and means over those that were."""
        cells = []
        for place, table_Q8 in self.tables.items():
            units, chance = self.units(table_Q8)
            alpha_Q, effect_Q = table_Q8[:, :2].T
            reached_Q = np.isfinite(alpha_Q)
            cell: dict[str, Any] = {
                "concepts": len(alpha_Q),
                "unreached": int((~reached_Q).sum()),
                "chance_unreached": int(np.isnan(table_Q8[:, COLUMNS.index("chance_alpha")]).sum()),
                "median_alpha": float(np.median(alpha_Q[reached_Q])) if reached_Q.any() else None,
                "mean_effect": float(effect_Q[reached_Q].mean()) if reached_Q.any() else None,
            }
            for name in ("steering_leakage", "sibling_kl"):
                cell[name] = bootstrap_units(units[name], *resampling, chance[name]).to_json()
            cells.append(place._asdict() | cell)
        return cells


def directions(sae: SparseAutoencoder, level: Level, latents: IntArray) -> Tensor:
    """Unit write directions [Q, d]: D_p, or A_pc of a child's flat number p * C + c (a flat model: D of a latent)."""
    if level == "parent" or not isinstance(sae, HierarchicalSAE):
        write_Pd = sae.write_directions()
        return write_Pd[torch.as_tensor(latents, device=write_Pd.device)]
    rows_Q = torch.as_tensor(latents, device=sae.D.device)
    atoms_QCd = sae.atoms(rows_Q // sae.n_children).detach()
    atoms_Qd = atoms_QCd[torch.arange(len(rows_Q), device=rows_Q.device), rows_Q % sae.n_children]
    return torch.nn.functional.normalize(atoms_Qd, dim=-1)


@torch.no_grad()
def overrides(sae: SparseAutoencoder, level: Level, latents: IntArray, last_Md: Tensor) -> Moves:
    """Moves h + x_hat(edited codes) - x_hat(codes) that set each latent's code to one value in all contexts.

    `last_Md` is the residual at the hook. What one unit of a code writes is x_hat(codes, it raised by 1) -
    x_hat(codes), by the model's own decoding; alpha is the code's value times that step's length (its median over
    contexts, which differ only where rows are scaled one by one).
    """
    codes = sae.encode(last_Md.to(sae.write_directions().device, torch.float32))
    before_Md = sae.decode(codes)
    children = level == "child" and sae.n_children > 0
    index_Mk, value_Mk = (codes.child_index, codes.child_value) if children else codes[:2]
    steps, offsets = [], []
    for latent in latents.tolist():
        step_Md = sae.decode(_raised(codes, latent, children)) - before_Md
        code_M1 = (value_Mk * (index_Mk == latent)).sum(1, keepdim=True)
        steps.append(step_Md / step_Md.norm(dim=-1).median())
        offsets.append(-code_M1 * step_Md)
    empty = last_Md.new_zeros(0, *last_Md.shape)
    return Moves(*(torch.stack(rows).to(last_Md) if rows else empty for rows in (steps, offsets)))


def _raised(codes: Codes, latent: int, children: bool) -> Codes:
    """The codes with one latent's raised by 1, by a slot of its own: slots of one latent add up."""
    index, value = ("child_index", "child_value") if children else ("parent_index", "parent_value")
    old_index, old_value = getattr(codes, index), getattr(codes, value)
    rows = len(old_index)
    grown_index = torch.cat([old_index, old_index.new_full((rows, 1), latent)], dim=1)
    grown_value = torch.cat([old_value, old_value.new_ones(rows, 1)], dim=1)
    return codes._replace(**{index: grown_index, value: grown_value})


@torch.no_grad()
def evaluate_steering(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    hook: str,
    concepts: Concepts,
    parents: Steered,
    ids_MT: Tensor,
    *,
    children: Steered = NOTHING,
    search: Search = SEARCH,
    doses: Sequence[float] = (),
    layers: Sequence[str] = (),
    text: Callable[[int], str] = str,
    resampling: Resampling = RESAMPLING,
) -> SteeringEvaluation:
    """Side effects of steering concepts by the same effect, on contexts [M, T] without padding.

    `steering_leakage`: mean over contexts of KL(before || after) of the next-token distribution renormalised
    off the target set (all the concept's tokens). `sibling_kl`: the same over a parent's children, or a child's
    siblings, each with the mass of its tokens, renormalised. Both in nats, at the effect of `search`. Chance is another
    mapped concept's latent (the next one, cyclically, for a child the next of another parent; with the sign that raises
    the target) at the same effect, over the concepts where it reaches it. `steering_unreached` is the share of concepts
    whose effect is not reached within the limits of `search`, or which have no latent; they have no leakage.

    The grid has every level and form at the effect of `search` and at each of `doses` (nats), and, injected, at each of
    the hooks `layers`. Every parent's record has an `example`: the likeliest next tokens before and after, in the
    context whose next token is least certain, with `text` of each token. A model without an output head gets nulls.
    """
    if not lm.has_head:
        return SteeringEvaluation(Evaluation({name: unavailable(NO_HEAD) for name in STEERING_METRICS}), [], [], [])
    with lm.in_float32():
        contexts = Contexts(lm, hook, ids_MT)
        nats = [search.target_nats, *(dose for dose in doses if dose != search.target_nats)]
        elsewhere = [Contexts(lm, layer, ids_MT) for layer in layers]
        for there in elsewhere:
            if there.last_Md.shape != contexts.last_Md.shape:
                width, allowed = there.last_Md.shape[1], contexts.last_Md.shape[1]
                raise ValueError(f"eval.steering.layers: found {there.hook} of width {width}, allowed: width {allowed}")
        result, records, grid = Evaluation(), {}, []
        for level, steered in zip(LEVELS, (parents, children), strict=True):
            of_level = _OfLevel(level, steered, concepts, contexts.before_MV.device)
            injected = Moves.along(directions(sae, level, of_level.latents).to(contexts.last_Md))
            table_Q8 = of_level.add("inject", injected, contexts, nats, search)
            result |= of_level.metrics("inject", table_Q8, resampling)
            records[level] = of_level.records(table_Q8)
            overridden = overrides(sae, level, of_level.latents, contexts.last_Md)
            overridden_Q8 = of_level.add("override", overridden, contexts, nats, search, table_Q8)
            result |= of_level.metrics("override", overridden_Q8, resampling)
            for there in elsewhere:
                of_level.add("inject", injected, there, nats, search)
            grid += of_level.grid(resampling) if steered.concepts else []
        # where the model is sure of the next token, little shows
        open_context = ids_MT[int(contexts.entropy_M.argmax())]
        in_open = Contexts(lm, hook, open_context[None])
        _add_examples(records["parent"], sae, in_open, open_context, search.per_forward, text)
    return SteeringEvaluation(result, records["parent"], records["child"], grid)


def _add_examples(
    records: list[dict[str, Any]],
    sae: SparseAutoencoder,
    contexts: Contexts,
    ids_T: Tensor,
    per_forward: int,
    text: Callable[[int], str],
) -> None:
    """`example` of every parent's record: the likeliest next tokens of one context, before and after, or None."""

    def likeliest(probability_V: Tensor) -> list[list[Any]]:
        found = probability_V.topk(min(EXAMPLE_TOKENS, len(probability_V)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[text(token), significant(probability)] for token, probability in pairs]

    context, before = [text(token) for token in ids_T.tolist()], likeliest(contexts.probability_MV[0])
    for record in records:
        record["example"] = None
    reached = [record for record in records if record["alpha"] is not None]
    latents = np.array([record["latent"] for record in reached], dtype=np.int64)
    alpha_Q1 = contexts.last_Md.new_tensor([record["alpha"] for record in reached])[:, None]
    added_Qd = alpha_Q1 * directions(sae, "parent", latents).to(contexts.last_Md)
    for start in range(0, len(reached), per_forward):
        after_AV = contexts.log_probabilities(added_Qd[start : start + per_forward, None])[:, 0].exp()
        for record, after_V in zip(reached[start:], after_AV, strict=False):
            record["example"] = {"context": context, "before": before, "after": likeliest(after_V)}
