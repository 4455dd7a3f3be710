"""What stands behind each target: values of the arms, rows that are counted, controls."""

import math
from typing import Any

from .read import RunFiles
from .steering import steering_evidence
from .words import arm_title, interval, listed, number, percent

ANGLE_CONTROLS = {"shuffled_rows": "shuffled rows", "pseudo_parents": "pseudo-parents"}


def _angle_evidence(run: RunFiles, target: dict[str, Any]) -> list[str]:
    low, high = target["required"]
    known = {name: angle for name, angle in target["controls"].items() if angle is not None}
    parents = len(run.evidence["main"]["parents"]["name"])
    sentences = [f"A property of the {run.evidence['rows_of']} and of the {parents} parents; no arm enters."]
    shown = (
        listed([f"{number(angle, 1)}° with {ANGLE_CONTROLS[name]}" for name, angle in known.items()]) if known else ""
    )
    if known and all(low <= angle <= high for angle in known.values()):
        sentences.append(f"The controls pass as well ({shown}), so this target decides nothing by itself.")
    elif known:
        sentences.append(f"The controls: {shown}.")
    else:
        sentences.append("There are too few parents for the controls, and random directions stand near 90° too.")
    return sentences


def _values(run: RunFiles, metric: str, digits: int = 3) -> str:
    """'baseline 0.230, teacher 0.421'."""
    named = {arm: run.metric(arm, metric) for arm in run.judged}
    return ", ".join(f"{arm} {number(found['value'], digits)}" for arm, found in named.items() if found)


def _lead_sentences(run: RunFiles, metric: str, better: int) -> list[str]:
    """Teacher minus the control with the wrong words, and minus flat arms, on the same resamples."""
    permuted = run.permuted
    found = run.lead(permuted, metric)
    said = []
    if permuted is None or found is None:
        said.append("No arm with permuted words was measured, so this says nothing on whether the words matter.")
    else:
        low, high = sorted(better * bound for bound in found["ci95"] or (-math.inf, math.inf))
        means = "so the words matter" if low > 0 else "so these numbers do not show that the words matter"
        means = "the control does better than the teacher" if high < 0 else means
        said.append(f"Teacher minus {arm_title(permuted)}, paired: {_paired(found)}, {means}.")
    against = {flat: lead for flat in run.flat_arms if (lead := run.lead(flat, metric))}
    return said + [f"Teacher minus {arm_title(flat)}: {_paired(lead)}." for flat, lead in against.items()]


def _paired(found: dict[str, Any]) -> str:
    around = f" ({interval(found['ci95'])})" if found["ci95"] else ""
    return f"{number(found['value'], sign=True)}{around}"


def _concept_evidence(metric: str, better: int) -> Any:
    def evidence(run: RunFiles, target: dict[str, Any]) -> list[str]:
        values = _values(run, metric)
        if not values:
            return []
        found = run.metric("teacher", metric) or run.metric("baseline", metric)
        chance = "" if found is None or found["chance"] is None else f"; chance {number(found['chance'])}"
        counted_on = rows_counted(run) if metric == "purity" else _rows_of_leakage(run)
        return [f"Mean {metric}: {values}{chance}.", counted_on, *_lead_sentences(run, metric, better)]

    return evidence


def _rows_of_leakage(run: RunFiles) -> str:
    silent = {arm: run.metric(arm, "no_fire_rate") for arm in run.judged}
    shares = [f"{arm} {percent(found['value'])}" for arm, found in silent.items() if found]
    less = f" ({listed(shares)})" if shares else ""
    return f"Counted on the same rows as purity, less those on which no concept's parent is active{less}."


def rows_counted(run: RunFiles) -> str:
    """The rows that purity and leakage count, in words: how many, of how many concepts and words, and which not."""
    rows = [concept["rows"] for concept in run.in_use]
    words = [n_words(run, concept["parent"]) for concept in run.in_use]
    if not rows:
        return "No concept has enough labelled rows."
    total = len(run.concepts["parents"])
    least, split = run.config.concepts.min_test_rows, run.results["split"]
    return (
        f"Counted on {sum(rows):,} rows, of the {len(rows)} of {total} concepts with at least {least} ({span(rows)} "
        f"rows and {span(words)} held-out words each); all other rows, above all those without a label, are left out. "
        f"The rows are of {split} documents, which no arm trained on, and of words that no teacher saw."
    )


def n_words(run: RunFiles, parent: int) -> int:
    """Words of the evaluated fold that a parent concept has."""
    return sum(len(child["words"][run.results["split"]]) for child in run.concepts["parents"][parent]["children"])


def span(counts: list[int]) -> str:
    """'20 to 317', or one number."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reconstruction_evidence(run: RunFiles, target: dict[str, Any]) -> list[str]:
    values = _values(run, "fvu")
    if not values:
        return []
    sentences = [f"Unexplained variance: {values}, over the documents of the {run.results['split']} split."]
    others = {arm: run.metric(arm, "fvu") for arm in run.key_arms if arm not in run.judged}
    return sentences + [f"With {arm_title(arm)}: {number(found['value'])}." for arm, found in others.items() if found]


EVIDENCE = {
    "median_angle_deg": _angle_evidence,
    "purity_gain_pp": _concept_evidence("purity", better=1),
    "leakage_reduction": _concept_evidence("leakage", better=-1),
    "steering_leakage_reduction": steering_evidence,
    "reconstruction_parity": _reconstruction_evidence,
}
