"""The five targets as the page shows them: required, measured, interval bar, verdict, and what a control gets."""

from typing import Any

import numpy as np

from ..evaluation.targets import counted_units
from .read import RunFiles
from .words import TARGETS, TargetWords, arm_title, interval, number

VERDICTS = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "inconclusive"}
ANGLE_CONTROLS = {"shuffled_rows": "shuffled rows", "pseudo_parents": "pseudo-parents"}
PAD = 0.08  # of the axis, left free at both ends of a bar
LABEL_ROOM = 14.0  # percent of the axis that a tick's label needs
COSTS = ("reconstruction_parity",)  # what the method may cost; a control is meant to pass it too
Controls = list[tuple[str, float]]


def target_rows(run: RunFiles) -> list[dict[str, Any]]:
    """One object per target, in the order of results.json."""
    rows = []
    for target in run.results["targets"]:
        words = TARGETS[target["name"]]
        scaled = None if target["measured"] is None else target["measured"] * words.factor
        rows.append(
            {
                "key": target["name"],
                "words": words,
                "required": required_text(target["required"], words),
                "measured": number(scaled, words.digits) + (words.unit if scaled is not None else ""),
                "interval": interval(target["ci95"], words.digits, words.factor, words.unit),
                "n": counted_units(target["name"], target["n"]),
                "verdict": VERDICTS[target["verdict"]],
                "why": target.get("why"),
                "bar": bar(target, words, control_values(run, target["name"])),
                "control_passes": control_passes(run, target),
            }
        )
    return rows


def required_text(required: list[float | None], words: TargetWords) -> str:
    """'at least 10 points', '80 to 100°'."""
    low, high = (None if bound is None else _tick(bound * words.factor) for bound in required)
    if high is None:
        return f"at least {low}{words.unit}"
    if low is None:
        return f"at most {high}{words.unit}"
    return f"{low} to {high}{words.unit}"


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def bar(target: dict[str, Any], words: TargetWords, controls: Controls) -> dict[str, Any]:
    """Places on the bar's axis, in percent of its width from the left; None where there is nothing to draw."""
    bounds = [bound * words.factor for bound in target["required"] if bound is not None]
    measured = None if target["measured"] is None else target["measured"] * words.factor
    ci95 = None if target["ci95"] is None else [value * words.factor for value in target["ci95"]]
    shown = [*bounds, *(ci95 or []), *(value for _, value in controls), *([measured] if measured is not None else [])]
    if target["name"] != "median_angle_deg":
        shown.append(0.0)
    low, high = min(shown), max(shown)
    room = (high - low) * PAD or 1.0
    low, high = low - room, high + room

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    start = 0.0 if target["required"][0] is None else place(target["required"][0] * words.factor)
    end = 100.0 if target["required"][1] is None else place(target["required"][1] * words.factor)
    ticks = [(place(value), _tick(value) + words.unit) for value in bounds]
    if 0.0 in shown and all(abs(place(0.0) - at) > LABEL_ROOM for at, _ in ticks):
        ticks.append((place(0.0), "0"))
    return {
        "band": (start, round(end - start, 2)),
        "interval": None if ci95 is None else (place(ci95[0]), round(place(ci95[1]) - place(ci95[0]), 2)),
        "dot": None if measured is None else place(measured),
        "controls": [(name, place(value), number(value, words.digits) + words.unit) for name, value in controls],
        "ticks": sorted(ticks),
    }


def control_values(run: RunFiles, name: str) -> Controls:
    """What the controls get on a target's own scale: [(control, value in the shown unit)]."""
    if name == "median_angle_deg":
        measured = run.target(name)["controls"].items()
        return [(ANGLE_CONTROLS[control], angle) for control, angle in measured if angle is not None]
    permuted = run.permuted
    found = None if permuted is None else _against_baseline(run, permuted, name)
    return [] if permuted is None or found is None else [(arm_title(permuted), found)]


def _against_baseline(run: RunFiles, arm: str, name: str) -> float | None:
    """A target's value for another arm in place of the teacher, in the shown unit."""
    values: tuple[float, float] | None
    if name == "steering_leakage_reduction":
        values = steering_means(run, arm)
    else:
        metric = {"purity_gain_pp": "purity", "leakage_reduction": "leakage", "reconstruction_parity": "fvu"}[name]
        found = run.metric("baseline", metric), run.metric(arm, metric)
        values = None if found[0] is None or found[1] is None else (found[0]["value"], found[1]["value"])
    if values is None or (name != "purity_gain_pp" and not values[0]):
        return None
    change = 100 * (values[1] - values[0])
    if name == "purity_gain_pp":
        return change
    return (change if name == "reconstruction_parity" else -change) / values[0]


def steering_means(run: RunFiles, arm: str) -> tuple[float, float] | None:
    """Mean side effects (baseline's, the arm's) in nats, over the concepts that both reach; None without any."""
    first, second = (
        {record["parent"]: record["steering_leakage"] for record in run.steering["arms"].get(name, [])}
        for name in ("baseline", arm)
    )
    pairs = [
        (own, other) for parent, own in first.items() if own is not None and (other := second.get(parent)) is not None
    ]
    if not pairs:
        return None
    baseline, other = np.mean(pairs, axis=0)
    return float(baseline), float(other)


def control_passes(run: RunFiles, target: dict[str, Any]) -> bool:
    """Whether every control lies in the required range as well, so that a pass says nothing about the concepts."""
    factor = TARGETS[target["name"]].factor
    low, high = target["required"]
    values = [value / factor for _, value in control_values(run, target["name"])]
    inside = [(low is None or value >= low) and (high is None or value <= high) for value in values]
    return target["name"] not in COSTS and bool(inside) and all(inside)


def informative_passes(run: RunFiles) -> int:
    """How many targets pass whose controls do not."""
    return sum(target["verdict"] == "PASS" and not control_passes(run, target) for target in run.results["targets"])
