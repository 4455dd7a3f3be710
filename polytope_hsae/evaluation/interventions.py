"""What moves when the language model is pushed along the teacher's own directions (docs/method.md §3, interventions).

Nothing here is about an autoencoder. Every push raises the target's log-odds by the same number of nats.

*Ratio invariance*: along l_p the parent becomes likelier and the ratios among its tokens should stay as they are.
*Targeting*: masses are compared with the mass of all tokens outside the parent, so that what the target takes from
everything alike does not count. Along l_p the other parents' shares of that mass should stay; along a child's
difference the child should rise and its siblings stay. Random directions and other concepts' directions, pushed to
the same effect, are the controls.

Shapes: Q parents of the teacher, R children, G pushes, d residual width, K measured values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytope_hsae.data.concepts import Concepts
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    FloatArray,
    Resampling,
    bootstrap_mean,
    bootstrap_quantile,
)
from polytope_hsae.evaluation.pushing import (
    SEARCH,
    Contexts,
    Moves,
    Search,
    Target,
    child_targets,
    evenly_spaced,
    next_of_another,
    parent_targets,
    push,
)
from polytope_hsae.lm import NO_HEAD, LanguageModel
from polytope_hsae.teacher import Teacher

MEDIAN_KL, P90_KL = 0.10, 0.20  # the published thresholds of ratio invariance, nats
TARGETING = 3.0  # the target has to move this many times as far as the others
ALONG = ("own", "other", "random")
MEASURED = ("effect", "tokens_kl", "parts_kl", "target_shift", "others_shift", "others_mean")
COLUMNS = ("alpha", *MEASURED)


@torch.no_grad()
def evaluate_interventions(
    lm: LanguageModel,
    hook: str,
    concepts: Concepts,
    teacher: Teacher,
    ids_MT: Tensor,
    *,
    search: Search = SEARCH,
    max_concepts: int | None = None,
    max_children: int | None = None,
    resampling: Resampling = RESAMPLING,
) -> dict[str, Any]:
    """Ratio invariance and targeting of the teacher's parents and differences, on contexts [M, T] without padding.

    The object of `interventions.json` (docs/design.md): summaries over concepts, each for pushes along the concept's
    `own` direction, an `other` concept's (the next one of another parent) and a `random` one, the latter two with the
    sign that raises the target; and a record per concept. A concept that is not reached counts as such and has no
    values. Of more parents than `max_concepts` and children than `max_children`, so many are pushed, evenly spaced. A
    model without an output head gets {"why": ...}.
    """
    if not lm.has_head:
        return {"why": NO_HEAD}
    with lm.in_float32():
        contexts = Contexts(lm, hook, ids_MT)
        parents, children = _chosen(teacher, max_concepts, max_children)
        parent_rows, child_rows = _rows_in(concepts, teacher, parents, children)
        device, random = contexts.before_MV.device, teacher.random_like(resampling.seed)

        def pushed(targets: Sequence[Target], own_Gd: Tensor, random_Gd: Tensor, owners: Sequence[int]) -> Pushed:
            along = {"own": own_Gd, "other": own_Gd[next_of_another(owners)], "random": random_Gd}
            return {name: _push(contexts, targets, along[name], search, name != "own") for name in ALONG}

        of_parents = pushed(
            parent_targets(concepts, parent_rows, device),
            teacher.parent_write[parents],
            random.parent_write[parents],
            parents,
        )
        of_children = pushed(
            child_targets(concepts, child_rows, device),
            teacher.child_delta_write[children],
            random.child_delta_write[children],
            teacher.child_parent[children].tolist(),
        )
    return {
        "hook": hook,
        "source": teacher.metadata.get("source"),
        "target_nats": search.target_nats,
        "contexts": len(ids_MT),
        "ratio_invariance": {
            "thresholds": {"median": MEDIAN_KL, "p90": P90_KL},
            **{name: _ratio_invariance(of_parents[name], resampling) for name in ALONG},
        },
        "targeting": {
            "threshold": TARGETING,
            "parents": {name: _targeting(of_parents[name], resampling) for name in ALONG},
            "children": {name: _targeting(of_children[name], resampling) for name in ALONG},
        },
        "parents": _records("parent", parent_rows, of_parents),
        "children": _records("child", child_rows, of_children),
    }


def _chosen(teacher: Teacher, max_concepts: int | None, max_children: int | None) -> tuple[list[int], list[int]]:
    """The teacher's rows that are pushed: of parents, and of those parents' children that have a direction."""
    parents = evenly_spaced(range(len(teacher.parent_names)), max_concepts)
    known_R = teacher.child_delta_unified.any(dim=1).tolist()  # a child that was not seen has no direction
    owners_R = teacher.child_parent.tolist()
    children = [row for row, owner in enumerate(owners_R) if known_R[row] and owner in set(parents)]
    return parents, evenly_spaced(children, max_children)


def _rows_in(
    concepts: Concepts, teacher: Teacher, parents: Sequence[int], children: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The rows that parents and children of the teacher have among those of `concepts`, by their names."""
    row_of_parent = {parent.name: row for row, parent in enumerate(concepts.parents)}
    pairs = [(parent.name, child.name) for parent in concepts.parents for child in parent.children]
    row_of_child = {pair: row for row, pair in enumerate(pairs)}
    owners_R = teacher.child_parent.tolist()
    return (
        [row_of_parent[teacher.parent_names[row]] for row in parents],
        [row_of_child[teacher.parent_names[owners_R[row]], teacher.child_names[row]] for row in children],
    )


Columns = dict[str, FloatArray]  # by COLUMNS, of every push [G]; NaN where the target was not reached
Pushed = dict[str, Columns]  # by ALONG


def _push(contexts: Contexts, targets: Sequence[Target], rows_Gd: Tensor, search: Search, either_sign: bool) -> Columns:
    """Pushes along every row [G, d]."""

    def measure(after_MV: Tensor, target: Target) -> list[float]:
        effect = float(contexts.odds_rise(after_MV, target.tokens).mean())
        ratios = contexts.tokens_kl(after_MV, target.parts), contexts.parts_kl(after_MV, target.parts)
        shift = float(contexts.share_rise(after_MV, target.tokens, target.whole).mean())
        rises = [float(contexts.share_rise(after_MV, tokens, target.whole).mean()) for tokens in target.others]
        others = (float(np.abs(rises).mean()), float(np.mean(rises))) if rises else (np.nan, np.nan)
        return [effect, *ratios, shift, *others]

    moves = Moves.along(rows_Gd.to(contexts.last_Md))
    found = push(contexts, targets, moves, search, measure, len(MEASURED), either_sign=either_sign)
    return dict(zip(COLUMNS, [found.alpha_G, *found.measured_GK.T], strict=True))


def _share(values_G: FloatArray, holds_G: NDArray[np.bool_]) -> FloatArray:
    """1 where it holds, 0 where not, NaN where there is no value."""
    return np.where(np.isfinite(values_G), holds_G, np.nan)


def _ratio_invariance(found: Columns, resampling: Resampling) -> dict[str, Any]:
    """KL among a parent's tokens over the parents reached, judged by the published thresholds."""
    kl_G = found["tokens_kl"]
    median = bootstrap_quantile(kl_G, 0.5)
    p90 = bootstrap_quantile(kl_G, 0.9)
    given = median.value is not None and p90.value is not None
    return {
        "unreached": int(np.isnan(found["alpha"]).sum()),
        "median": median.to_json(),
        "p90": p90.to_json(),
        "share_below_p90": bootstrap_mean(_share(kl_G, kl_G < P90_KL), *resampling).to_json(),
        "passes": bool(median.value < MEDIAN_KL and p90.value < P90_KL) if given else None,  # type: ignore[operator]
        "children_median": bootstrap_quantile(found["parts_kl"], 0.5).to_json(),
    }


def _targeting(found: Columns, resampling: Resampling) -> dict[str, Any]:
    """How many times as far as the others the target moves, over the concepts reached."""
    target_G, others_G = found["target_shift"], found["others_shift"]
    ratio_G = target_G / others_G
    return {
        "unreached": int(np.isnan(found["alpha"]).sum()),
        "median_ratio": bootstrap_quantile(ratio_G, 0.5).to_json(),
        "share_above_threshold": bootstrap_mean(_share(ratio_G, ratio_G >= TARGETING), *resampling).to_json(),
        "target_shift": bootstrap_quantile(target_G, 0.5).to_json(),
        "others_shift": bootstrap_quantile(others_G, 0.5).to_json(),
        "others_mean": bootstrap_quantile(found["others_mean"], 0.5).to_json(),
    }


def _records(kind: str, rows: Sequence[int], values: Pushed) -> list[dict[str, Any]]:
    """One object per concept: by direction, what was measured; null where it was not reached."""
    records: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        record: dict[str, Any] = {kind: row}
        for name, columns in values.items():
            numbers = {column: float(of_G[place]) for column, of_G in columns.items()}
            record[name] = {column: number if np.isfinite(number) else None for column, number in numbers.items()}
        records.append(record)
    return records
