"""Steering: concept by concept, over forms and doses, and along the teacher's own directions in the language model."""

from typing import Any, NamedTuple

import numpy as np

from .read import RunFiles
from .words import DASH, arm_title, counted, listed, number, percent


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
        for arm in compared
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
    return sentences + _one_concept(run, shared)


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


def steering_table(run: RunFiles) -> dict[str, Any] | None:
    """Every steered concept with its side effect in each arm, the teacher's largest first; None without any."""
    effects = {arm: found for arm in _compared(run) if (found := side_effects(run, arm))}
    if not effects:
        return None
    arms = list(effects)
    decides = effects.get("teacher", effects[arms[0]])
    parents = sorted(decides, key=lambda parent: -(decides[parent] or -1.0))
    notes = ["A dash: the arm did not reach the concept. A target compares only concepts that both of its arms reach."]
    for arm in arms:
        means = steering_means(run, arm) if arm not in run.judged else None
        if means:
            over = f"On the {counted(means[0], 'concept')} that {arm_title(arm)} and baseline both reach, the means are"
            notes.append(f"{over} {number(means[2])} and {number(means[1])}.")
    return {
        "title": "Concept by concept",
        "caption": "By how many nats other words move.",
        "first": "Concept",
        "heads": [arm_title(arm) for arm in arms],
        "rows": [
            (run.parent_name(parent), [number(effects[arm].get(parent), 3) for arm in arms]) for parent in parents
        ],
        "notes": notes,
    }


FORMS = {"inject": "direction added", "override": "code set"}
ALONG = {"own": "its own direction", "other": "another concept's", "random": "a random one"}


def steering_grid(run: RunFiles) -> dict[str, Any] | None:
    """Side effects of every arm by level, form, hook and dose; None where nothing was steered."""
    grid = {arm: cells for arm in run.arms if (cells := run.steering["grid"].get(arm))}
    if not grid:
        return None
    key = ("level", "form", "hook", "target_nats")
    found = {arm: {tuple(cell[name] for name in key): cell for cell in cells} for arm, cells in grid.items()}
    places = dict.fromkeys(place for cells in found.values() for place in cells)
    rows = []
    for place in places:
        level, form, hook, nats = place
        elsewhere = "" if hook == run.results["hook"] else f" at {hook}"
        name = f"{level}, {FORMS[form]}{elsewhere}, +{nats:g} nats"
        rows.append((name, [_grid_cell(cells.get(place)) for cells in found.values()]))
    return {
        "title": "Steering by level, form and dose",
        "caption": "By how many nats other words move, in brackets for another concept's direction, and how many "
        "concepts were not reached.",
        "first": "Steered",
        "heads": [arm_title(arm) for arm in grid],
        "rows": rows,
    }


def _grid_cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return DASH
    leakage = cell["steering_leakage"]
    value = f"{number(leakage['value'])} ({number(leakage['chance'])})"
    return f"{value}; {cell['unreached']} of {cell['concepts']} not reached"


def interventions_table(run: RunFiles) -> dict[str, Any]:
    """The teacher's directions in the language model beside other directions at the same effect."""
    found, rows = run.interventions, []
    if "ratio_invariance" in found:
        ratio, targeting = found["ratio_invariance"], found["targeting"]
        required = ratio["thresholds"]
        rows = [
            (
                f"KL among a parent's words, median (published: below {required['median']:g})",
                [_value(ratio[name]["median"]) for name in ALONG],
            ),
            (
                f"KL among a parent's words, 90th percentile (published: below {required['p90']:g})",
                [_value(ratio[name]["p90"]) for name in ALONG],
            ),
            ("parents not reached", [_missed(ratio[name], "median") for name in ALONG]),
        ]
        for level, others in (("parents", "other parents"), ("children", "siblings")):
            found_of = targeting[level]
            rows += [
                (
                    f"{level}: how many times as far as {others} they move, median",
                    [_value(found_of[name]["median_ratio"]) for name in ALONG],
                ),
                (
                    f"{level}: share at {targeting['threshold']:g} times or more",
                    [percent(found_of[name]["share_above_threshold"]["value"]) for name in ALONG],
                ),
            ]
        rows.append(("children not reached", [_missed(targeting["children"][name], "median_ratio") for name in ALONG]))
    columns = ("cosine", "other_parents", "random")
    for words, title in (("same_words", "the teacher's words"), ("other_words", "other words of the concepts")):
        if words in found["agreement"]:
            cosines = [_value(found["agreement"][words][name]) for name in columns]
            rows.append((f"cosine of a parent's mean activation with the direction, {title}", cosines))
    nats = f"pushed by +{found['target_nats']:g} nats, with 95 % intervals" if "target_nats" in found else found["why"]
    return {
        "title": "The concepts' own directions in the language model",
        "caption": f"Before any training: {nats}.",
        "first": "Measured",
        "heads": list(ALONG.values()),
        "rows": rows,
    }


def _value(found: dict[str, Any]) -> str:
    if found["ci95"] is None:
        return number(found["value"])
    return f"{number(found['value'])} ({number(found['ci95'][0])} to {number(found['ci95'][1])})"


def _missed(found: dict[str, Any], name: str) -> str:
    return f"{found['unreached']} of {found['unreached'] + found[name]['n']}"


def _compared(run: RunFiles) -> list[str]:
    """The judged arms and the control."""
    return [arm for arm in run.arms if arm in (*run.judged, run.permuted)]
