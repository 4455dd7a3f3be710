"""The five targets of docs/method.md §5 and their verdicts.

Each target is an interval `required` = [low, high] (None: no bound) on a measured value with a paired 95 %
interval. PASS: the interval lies wholly inside; FAIL: wholly outside; INCONCLUSIVE: neither, or nothing was
measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from polytope_hsae.evaluation.bootstrap import Comparison, Metric, Units, paired, unavailable

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Thresholds:
    """Bounds of the five targets: degrees, percentage points, then shares of the baseline's value."""

    median_angle_deg: tuple[float, float] = (80.0, 100.0)
    purity_gain_pp: float = 10.0
    leakage_reduction: float = 0.20
    steering_leakage_reduction: float = 0.20
    reconstruction_parity: float = 0.05


def verdict(ci95: tuple[float, float] | None, required: Interval) -> str:
    """PASS, FAIL or INCONCLUSIVE, as the module says. The bounds themselves count as inside."""
    if ci95 is None:
        return "INCONCLUSIVE"
    low = -float("inf") if required[0] is None else required[0]
    high = float("inf") if required[1] is None else required[1]
    if low <= ci95[0] and ci95[1] <= high:
        return "PASS"
    if ci95[1] < low or high < ci95[0]:
        return "FAIL"
    return "INCONCLUSIVE"


def target(name: str, measured: Metric, required: Interval) -> dict[str, Any]:
    """One object of results.json's `targets`; `why` only where a value or its interval is missing."""
    out: dict[str, Any] = {
        "name": name,
        "required": list(required),
        "measured": measured.value,
        "ci95": None if measured.ci95 is None else list(measured.ci95),
        "n": measured.n,
        "verdict": verdict(measured.ci95 if measured.value is not None else None, required),
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


def _compare(
    baseline: Mapping[str, Units], teacher: Mapping[str, Units], name: str, how: Comparison, n: int, seed: int
) -> Metric:
    for arm, units in (("baseline", baseline), ("teacher", teacher)):
        if name not in units:
            return unavailable(f"{name} was not measured for the {arm} arm")
    return paired(baseline[name], teacher[name], how, n, seed)


def assess_targets(
    angle: Metric | None,
    baseline: Mapping[str, Units],
    teacher: Mapping[str, Units],
    *,
    thresholds: Thresholds | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The five targets, teacher arm against baseline arm, from their per-unit values (Evaluation.units).

    `angle` is the median causal angle in degrees with its interval (None: not measured). Purity gain is in
    percentage points. Reductions are (baseline - teacher)/baseline. `reconstruction_parity` is the signed
    (FVU_teacher - FVU_baseline)/FVU_baseline, required on both sides: its absolute value is at most the
    threshold. Raises ValueError when the arms were measured on different units.
    """
    limits = thresholds or Thresholds()
    parity = limits.reconstruction_parity
    gain = _scaled(_compare(baseline, teacher, "purity", "difference", bootstrap, seed), 100.0)
    leakage = _compare(baseline, teacher, "leakage", "relative_reduction", bootstrap, seed)
    steering = _compare(baseline, teacher, "steering_leakage", "relative_reduction", bootstrap, seed)
    fvu = _compare(baseline, teacher, "fvu", "relative_change", bootstrap, seed)
    angle = angle or unavailable("no angle was measured")
    return [
        target("median_angle_deg", angle, limits.median_angle_deg),
        target("purity_gain_pp", gain, (limits.purity_gain_pp, None)),
        target("leakage_reduction", leakage, (limits.leakage_reduction, None)),
        target("steering_leakage_reduction", steering, (limits.steering_leakage_reduction, None)),
        target("reconstruction_parity", fvu, (-parity, parity)),
    ]


def _range_text(bounds: Sequence[float | None]) -> str:
    low, high = bounds
    if high is None:
        return f">= {low:g}"
    return f"{low:g} to {high:g}"


def format_targets(targets: Sequence[Mapping[str, Any]], title: str = "Targets") -> Table:
    """The target table for the terminal; a missing value shows as -, with its reason under the name."""
    table = Table(title=title)
    for heading in ("target", "required", "measured", "95 % interval", "n", "verdict"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("measured", "n") else "left")
    colours = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
    for row in targets:
        name = row["name"] if "why" not in row else f"{row['name']}\n  {row['why']}"
        measured = "-" if row["measured"] is None else f"{row['measured']:.3f}"
        interval = "-" if row["ci95"] is None else f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        shown = f"[{colours[row['verdict']]}]{row['verdict']}[/]"
        table.add_row(name, _range_text(row["required"]), measured, interval, str(row["n"]), shown)
    return table
