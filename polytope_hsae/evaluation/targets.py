"""The five targets of docs/method.md §5 and their verdicts.

Each target is an interval `required` = [low, high] (None: no bound) on a measured value with a paired 95 %
interval. PASS: the interval lies wholly inside; FAIL: wholly outside; INCONCLUSIVE: neither, or nothing was
measured, or on fewer than MIN_UNITS units, whose interval is not to be trusted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from polytope_hsae.config.evaluation import TargetsConfig
from polytope_hsae.evaluation.bootstrap import (
    RESAMPLING,
    Comparison,
    Metric,
    Resampling,
    Units,
    paired,
    unavailable,
)

Interval = tuple[float | None, float | None]

MIN_UNITS = 8  # a bootstrap interval of fewer is too narrow too often
UNITS = {  # what a target's n counts: what its interval resamples
    "median_angle_deg": "parent",
    "purity_gain_pp": "concept",
    "leakage_reduction": "concept",
    "steering_leakage_reduction": "reached concept",  # by both arms
    "reconstruction_parity": "document",
}


def counted_units(name: str, n: int) -> str:
    """'16 concepts': a target's n with what it counts."""
    return f"{n:,} {UNITS[name]}{'' if n == 1 else 's'}"


def verdict(measured: Metric, required: Interval) -> str:
    """PASS, FAIL or INCONCLUSIVE, as the module says. The bounds themselves count as inside."""
    if measured.value is None or measured.ci95 is None or measured.n < MIN_UNITS:
        return "INCONCLUSIVE"
    low = -float("inf") if required[0] is None else required[0]
    high = float("inf") if required[1] is None else required[1]
    if low <= measured.ci95[0] and measured.ci95[1] <= high:
        return "PASS"
    if measured.ci95[1] < low or high < measured.ci95[0]:
        return "FAIL"
    return "INCONCLUSIVE"


def target(name: str, measured: Metric, required: Interval) -> dict[str, Any]:
    """One object of results.json's `targets`; `why` only where a value, its interval or units are missing."""
    out: dict[str, Any] = {
        "name": name,
        "required": list(required),
        "measured": measured.value,
        "ci95": None if measured.ci95 is None else list(measured.ci95),
        "n": measured.n,
        "verdict": verdict(measured, required),
    }
    why = measured.why
    if why is None and (measured.value is None or measured.ci95 is None):
        why = "no interval was given"
    return out if why is None else out | {"why": why}


def _scaled(metric: Metric, factor: float) -> Metric:
    if metric.value is None:
        return metric
    ci95 = None if metric.ci95 is None else (metric.ci95[0] * factor, metric.ci95[1] * factor)
    return Metric(metric.value * factor, ci95, metric.chance, metric.n, metric.why)


def _enough(metric: Metric, target: str, few: str) -> Metric:
    """The metric; with too few units it says so."""
    if metric.n >= MIN_UNITS:
        return metric
    why = f"{counted_units(target, metric.n)}, {MIN_UNITS} are needed for a verdict"
    return replace(metric, why=f"{why}: {few}" if few else why)


def assess_targets(
    angle: Metric | None,
    baseline: Mapping[str, Units],
    teacher: Mapping[str, Units],
    *,
    thresholds: TargetsConfig | None = None,
    few: str = "",
    resampling: Resampling = RESAMPLING,
) -> list[dict[str, Any]]:
    """The five targets, teacher arm against baseline arm, from their per-unit values (Evaluation.units).

    `angle` is the median causal angle in degrees with its interval (None: not measured). Purity gain is in
    percentage points. Reductions are (baseline - teacher)/baseline. `reconstruction_parity` is the signed
    (FVU_teacher - FVU_baseline)/FVU_baseline, required on both sides: its absolute value is at most the
    threshold. `few` says why there are not more concepts, for targets that lack them. Raises ValueError when the arms
    were measured on different units.
    """
    limits = thresholds or TargetsConfig()
    parity = limits.reconstruction_parity

    def compare(target: str, metric: str, how: Comparison) -> Metric:
        why_few = few if UNITS[target].endswith("concept") else ""
        for arm, units in (("baseline", baseline), ("teacher", teacher)):
            if not units:
                return unavailable(f"there is no {arm} arm")
            if metric not in units:
                why = f"{metric} was not measured for the {arm} arm"
                return unavailable(f"{why}: {why_few}" if why_few else why)
        return _enough(paired(baseline[metric], teacher[metric], how, *resampling), target, why_few)

    gain = _scaled(compare("purity_gain_pp", "purity", "difference"), 100.0)
    leakage = compare("leakage_reduction", "leakage", "relative_reduction")
    steering = compare("steering_leakage_reduction", "steering_leakage", "relative_reduction")
    fvu = compare("reconstruction_parity", "fvu", "relative_change")
    angle = _enough(angle, "median_angle_deg", "") if angle else unavailable("no angle was measured")
    return [
        target("median_angle_deg", angle, limits.angle_deg),
        target("purity_gain_pp", gain, (limits.purity_gain_pp, None)),
        target("leakage_reduction", leakage, (limits.leakage_reduction, None)),
        target("steering_leakage_reduction", steering, (limits.steering_leakage_reduction, None)),
        target("reconstruction_parity", fvu, (-parity, parity)),
    ]


def format_targets(targets: Sequence[Mapping[str, Any]]) -> Table:
    """The target table for the terminal; a missing value shows as -. Reasons stand below, where they have room."""
    reasons = [escape(f"{row['name']}: {row['why']}") for row in targets if "why" in row]
    table = Table(title="Targets", caption="\n".join(reasons) or None, caption_justify="left")
    for heading in ("target", "required", "measured", "95 % interval", "n", "verdict"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "measured" else "left")
    colours = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
    for row in targets:
        measured = "-" if row["measured"] is None else f"{row['measured']:.3f}"
        interval = "-" if row["ci95"] is None else f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        shown = f"[{colours[row['verdict']]}]{row['verdict']}[/]"
        low, high = row["required"]
        required = f">= {low:g}" if high is None else f"{low:g} to {high:g}"
        n = counted_units(row["name"], row["n"])
        table.add_row(row["name"], required, measured, interval, n, shown)
    return table
