"""Steering, concept by concept: which concepts two arms both reach, and how far one of them carries a mean."""

from typing import Any, NamedTuple

import numpy as np

from .read import RunFiles
from .words import arm_title, counted, listed, number


class Pair(NamedTuple):
    """A concept that two arms both reach, and by how many nats other words then move in each."""

    parent: int
    baseline: float
    arm: float


def side_effects(run: RunFiles, arm: str) -> dict[int, float | None]:
    """By concept the arm's side effect in nats; None where the arm did not reach the concept."""
    return {record["parent"]: record["steering_leakage"] for record in run.steering["arms"].get(arm, [])}


def pairs(run: RunFiles, arm: str) -> list[Pair]:
    """The concepts that the baseline and the arm both reach."""
    first, second = side_effects(run, "baseline"), side_effects(run, arm)
    found = ((parent, value, second.get(parent)) for parent, value in first.items())
    return [Pair(parent, own, other) for parent, own, other in found if own is not None and other is not None]


def steering_means(run: RunFiles, arm: str) -> tuple[int, float, float] | None:
    """(concepts that both reach, baseline's mean side effect, the arm's) in nats; None where they share none."""
    shared = pairs(run, arm)
    return (len(shared), *_over(shared, np.mean)) if shared else None


def steering_evidence(run: RunFiles, target: dict[str, Any]) -> list[str]:
    """What the target on steering rests on: concepts reached, means and medians, and a concept that carries a mean."""
    compared = _compared(run)
    reached = [
        f"{arm_title(arm)} {sum(value is not None for value in found.values())} of {len(found)}"
        for arm in ("baseline", *compared)
        if (found := side_effects(run, arm))
    ]
    sentences = []
    if reached:
        raised = f"Raising a concept's log-odds by {run.steering['target_nats']:g} nats succeeded for {listed(reached)}"
        sentences.append(f"{raised} concepts.")
    shared = pairs(run, "teacher")
    if not shared:
        return sentences
    (base, own), (base_median, own_median) = _over(shared, np.mean), _over(shared, np.median)
    sentences.append(
        f"On the {len(shared)} that teacher and baseline both reach, other words move by {number(own)} "
        f"(teacher) and {number(base)} nats (baseline) on average; the medians are {number(own_median)} and "
        f"{number(base_median)}."
    )
    return sentences + _one_concept(run, shared) + _left_out(run, shared)


def _over(shared: list[Pair], of: Any) -> tuple[float, float]:
    """Baseline's and the arm's mean or median."""
    return float(of([pair.baseline for pair in shared])), float(of([pair.arm for pair in shared]))


def _one_concept(run: RunFiles, shared: list[Pair]) -> list[str]:
    """The concept that makes up more than half of the teacher's sum, if one does."""
    most = max(shared, key=lambda pair: pair.arm)
    rest = [pair for pair in shared if pair is not most]
    if not rest or most.arm <= sum(pair.arm for pair in rest):
        return []
    base, own = _over(rest, np.mean)
    name = run.parent_name(most.parent)
    return [
        f"One concept carries the mean: {name} ({number(most.arm, 2)} nats). "
        f"Without it: {number(own)} and {number(base)}."
    ]


def _left_out(run: RunFiles, shared: list[Pair]) -> list[str]:
    """The baseline's largest value, where it does not count because the teacher does not reach the concept."""
    known = {parent: value for parent, value in side_effects(run, "baseline").items() if value is not None}
    worst = max(known, key=lambda parent: known[parent])
    if worst in {pair.parent for pair in shared}:
        return []
    largest = f"The baseline's own largest, {run.parent_name(worst)} ({number(known[worst], 2)})"
    return [f"{largest}, does not count, because the teacher does not reach it."]


def steering_table(run: RunFiles) -> dict[str, Any] | None:
    """Every steered concept with its side effect in each arm, the teacher's largest first; None without any."""
    arms = [arm for arm in ("teacher", "baseline", *_compared(run)[1:]) if side_effects(run, arm)]
    if not arms:
        return None
    effects = {arm: side_effects(run, arm) for arm in arms}
    parents = sorted(effects[arms[0]], key=lambda parent: -(effects[arms[0]][parent] or -1.0))
    notes = ["A dash: the arm did not reach the concept. A target compares only concepts that both of its arms reach."]
    for arm in arms[1:]:
        means = steering_means(run, arm) if arm != "baseline" else None
        if means:
            over = f"On the {counted(means[0], 'concept')} that {arm_title(arm)} and baseline both reach, the means are"
            notes.append(f"{over} {number(means[2])} and {number(means[1])}.")
    own = [
        f"{arm_title(arm)} {number(found['value'])} over {found['n']}"
        for arm in arms
        if (found := run.metric(arm, "steering_leakage"))
    ]
    if own:
        notes.append(
            f"The table of arms averages over all concepts that an arm reaches, so its means differ: {listed(own)}."
        )
    return {
        "title": "Concept by concept",
        "caption": "By how many nats other words move.",
        "heads": [arm_title(arm) for arm in arms],
        "rows": [
            (run.parent_name(parent), [number(effects[arm].get(parent), 3) for arm in arms]) for parent in parents
        ],
        "notes": notes,
    }


def _compared(run: RunFiles) -> list[str]:
    """The arms that are set against the baseline."""
    permuted = run.arm_with(init="permuted_teacher")
    return ["teacher", *([permuted] if permuted else [])]
