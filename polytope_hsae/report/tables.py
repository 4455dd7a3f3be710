"""Tables of the page: arms with intervals and chance, paired differences, evidence, provenance."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .read import RunFiles
from .target_evidence import n_words
from .words import (
    DASH,
    METRIC_GROUPS,
    METRICS,
    OF_MASSIVE_ROWS,
    OWN_SLOTS,
    OWN_SLOTS_SUFFIX,
    MetricWords,
    arm_title,
    interval,
    listed,
    number,
    percent,
)

VARIANTS = {
    "main": ("the concepts", "WordNet's parents and children, or those of the given tree"),
    "pseudo_parents": ("pseudo-parents", "made-up parents, whose children come from different real ones"),
    "shuffled_rows": ("shuffled rows", "the same words with the rows of the unembedding permuted"),
}
MORE_VARIANTS = {
    "permuted_words": ("permuted words", "all words dealt out to the children at random"),
    "random_parent": ("random parent", "every child with another concept's parent"),
    "gaussian": ("Gaussian rows", "random numbers in place of the unembedding"),
    "identity": ("Euclidean metric", "the concepts without the causal metric"),
    "diagonal": ("diagonal metric", "the concepts with the diagonal of the causal metric"),
    "random": ("random metric", "the concepts with the causal metric's spectrum in a random basis"),
    "residual_covariance": ("covariance of activations", "the concepts in the metric of the final residual"),
}


PHASES = {
    "phase1": "activations, concepts, evidence",
    "phase2": "arms with a random start",
    "phase3": "arms with a teacher",
    "phase4": "measurement",
}
OPEN_GROUPS = ("Reconstruction", "Concepts on held-out documents and words")


def metric_groups(run: RunFiles, found: Iterable[dict[str, Any]]) -> dict[str, dict[str, MetricWords]]:
    """The groups of a table, only metrics that an arm in `found` has and that say something; own slots last."""
    names = {name for metrics in found for name in metrics} - set(() if run.leaves_rows_out else OF_MASSIVE_ROWS)
    own = {key + OWN_SLOTS_SUFFIX: words for key, words in METRICS.items() if key + OWN_SLOTS_SUFFIX in names}
    groups = {
        title: {key: words for key, words in group.items() if key in names} for title, group in METRIC_GROUPS.items()
    }
    return {title: group for title, group in (groups | {OWN_SLOTS: own}).items() if group}


class Footnotes:
    """Reasons for missing values, each listed once."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, reason: str) -> int:
        """Number of the footnote, from 1."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def arms_table(run: RunFiles) -> dict[str, Any]:
    """Columns are arms, rows metrics in groups; a missing value is a dash with its reason as a footnote."""
    notes = Footnotes()
    arms = run.results["arms"]
    groups = []
    for title, group in metric_groups(run, arms.values()).items():
        rows = []
        for key, words in group.items():
            found = [arms[arm].get(key) for arm in run.arms]
            chances = {number(one["chance"], words.digits) for one in found if one and one["chance"] is not None}
            common = chances.pop() if len(chances) == 1 else None
            cells = [_cell(one, words.digits, notes, with_chance=common is None) for one in found]
            rows.append({"words": words, "cells": cells, "chance": common, "n": _units(found)})
        groups.append({"title": title, "rows": rows, "open": title in OPEN_GROUPS})
    return {"arms": [arm_title(arm) for arm in run.arms], "groups": groups, "notes": notes.reasons}


def differences_table(run: RunFiles, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`table` of paired differences on the same resamples; `excludes_zero` where the interval leaves out 0."""
    notes = Footnotes()
    groups = []
    for title, group in metric_groups(run, table.values()).items():
        rows = []
        for key, words in group.items():
            found = [metrics.get(key) for metrics in table.values()]
            if all(one is None or one["ci95"] in (None, [0.0, 0.0]) for one in found):
                continue  # the same in every arm by construction
            cells = [_cell(one, words.digits, notes, sign=True) for one in found]
            rows.append({"words": words, "cells": cells})
        if rows:
            groups.append({"title": title, "rows": rows})
    return {"arms": [arm_title(arm) for arm in table], "groups": groups, "notes": notes.reasons}


def concepts_table(run: RunFiles) -> dict[str, Any]:
    """Purity of every measured concept in every arm, with its rows and held-out words; the teacher's purest first."""
    arms, first = run.arms, "teacher" if "teacher" in run.arms else run.arms[0]
    # Fewer than two concepts have no purity.
    found = {arm: run.ablations["concepts"][arm] for arm in arms}
    purity = {arm: {one["parent"]: one.get("purity") for one in concepts} for arm, concepts in found.items()}
    concepts = sorted(run.in_use, key=lambda concept: -(purity[first].get(concept["parent"]) or 0.0))
    rows = [
        {
            "name": run.parent_name(concept["parent"]),
            "rows": concept["rows"],
            "n_words": n_words(run, concept["parent"]),
            "purity": [number(purity[arm].get(concept["parent"]), 2) for arm in arms],
        }
        for concept in concepts
    ]
    return {"arms": [arm_title(arm) for arm in arms], "rows": rows}


def _cell(
    found: dict[str, Any] | None, digits: int, notes: Footnotes, *, sign: bool = False, with_chance: bool = False
) -> dict[str, Any]:
    if found is None:
        return {"value": None, "note": None, "excludes_zero": False}
    if found["value"] is None:
        why = found.get("why", "no reason was recorded")
        return {"value": None, "note": notes.mark(why), "excludes_zero": False}
    ci95 = found["ci95"]
    return {
        "value": number(found["value"], digits, sign),
        "interval": interval(ci95, digits) if ci95 else None,
        "note": notes.mark(found["why"]) if "why" in found else None,
        "chance": number(found["chance"], digits) if with_chance and found["chance"] is not None else None,
        "excludes_zero": bool(ci95) and not ci95[0] <= 0 <= ci95[1],  # not "clear": a template finds the dict's method
    }


def _units(found: list[dict[str, Any] | None]) -> str:
    """Units behind the values: one number, or a range where the arms differ."""
    counts = sorted({one["n"] for one in found if one and one["value"] is not None})
    if not counts:
        return DASH
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def evidence_summary(run: RunFiles) -> dict[str, Any]:
    """The statistics of the concepts beside their controls."""
    notes = Footnotes()
    rows = []
    for key, (title, meaning) in (VARIANTS | MORE_VARIANTS).items():
        if key not in run.evidence:
            continue
        found = run.evidence[key]
        angles = found.get("angles")
        why = found.get("why")
        rows.append(
            {
                "title": title,
                "meaning": meaning,
                "share": percent(found["fraction_z_above_3"]),
                "median_z": number(found["median_z"], 2),
                "beta": number(found["median_beta"], 2),
                "beta_interval": interval(found["beta_ci95"], 2) if found.get("beta_ci95") else None,
                "omega": number(found["omega"], 3),
                "omega_interval": interval(found["omega_ci95"], 3) if found.get("omega_ci95") else None,
                "angle": DASH if angles is None else f"{number(angles['median_angle_deg'], 1)}°",
                "angle_interval": None if angles is None else interval(angles["median_ci95"], 1, unit="°"),
                "note": notes.mark(why) if why else None,
            }
        )
    return {"rows": rows, "notes": notes.reasons}


def parents_table(run: RunFiles) -> list[dict[str, Any]]:
    """One row per parent concept: what its children share, and the medians over its children."""
    main = run.evidence["main"]
    parents, children = main["parents"], main["children"]
    owner = np.asarray(children["parent"])
    rows = []
    for p, name in enumerate(parents["name"]):
        own = np.flatnonzero(owner == p)
        betas = [children["beta"][r] for r in own if children["beta"][r] is not None]
        angle = float(np.median([children["angle_deg"][r] for r in own]))
        values = {
            "n_children": parents["n_children"][p],
            "s_p": parents["s_p"][p],
            "z": parents["z"][p],
            "q": parents["q"][p],
            "beta": float(np.median(betas)) if betas else None,
            "omega": parents["omega"][p],
            "angle": angle,
        }
        digits = {"n_children": 0, "s_p": 2, "z": 2, "q": 3, "beta": 2, "omega": 3, "angle": 1}
        cells = [(value, number(value, digits[key])) for key, value in values.items()]
        rows.append({"name": name, "cells": cells, "above": parents["z"][p] is not None and parents["z"][p] > 3})
    return rows


def phases_table(run: RunFiles) -> list[dict[str, Any]]:
    """What each phase ran on, and how long it took."""
    rows = []
    for name, phase in sorted(run.provenance["phases"].items()):
        environment = phase["environment"]
        rows.append(
            {
                "name": name.replace("phase", "phase "),
                "does": PHASES[name],
                "seconds": phase["seconds"],
                "device": environment["device"],
                "threads": environment["threads"],
                "commit": (environment["commit"] or DASH)[:12],
            }
        )
    return rows


def mixed_commits(run: RunFiles) -> list[str]:
    """'6a8e1956d36a (phase 1, phase 2)' for every commit, where the phases ran at more than one."""
    found: dict[str, list[str]] = {}
    for row in phases_table(run):
        found.setdefault(row["commit"], []).append(row["name"])
    return [f"{commit} ({listed(names)})" for commit, names in found.items()] if len(found) > 1 else []


def versions(run: RunFiles) -> list[tuple[str, str]]:
    """Python, platform and packages of the last phase."""
    environment = run.provenance["phases"]["phase4"]["environment"]
    packages = [(name, version or DASH) for name, version in environment["packages"].items()]
    return [("Python", environment["python"]), ("platform", environment["platform"]), *packages]
