"""The tables of the page: each function turns a run's files into one `Table`."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .read import RunFiles
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
    number,
    percent,
)

VARIANTS = {
    "main": ("the concepts", "WordNet's parents and children, or those of the given tree"),
    "pseudo_parents": ("pseudo-parents", "made-up parents, whose children come from different real ones"),
    "shuffled_rows": ("shuffled rows", "the same words with the rows of the unembedding permuted"),
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
    "phase2": "arms with random initialisation",
    "phase3": "arms with a teacher",
    "phase4": "evaluation",
}
OPEN_GROUPS = ("Reconstruction", "Concepts on held-out documents and words")
FORMS = {"inject": "direction added", "override": "code set"}
ALONG = {"own": "its own direction", "other": "another concept's", "random": "a random one"}


class Cell(NamedTuple):
    """A value, with its interval and chance level below it; `note` is the number of a footnote, from 1."""

    value: str
    interval: str | None = None
    chance: str | None = None
    note: int | None = None
    bold: bool = False


class Row(NamedTuple):
    name: str
    cells: list[Cell]
    meaning: str = ""


class Table(NamedTuple):
    """`heads` begins with that of the rows' names; the group "" has no heading; `notes` are footnotes."""

    title: str
    heads: list[str]
    groups: dict[str, list[Row]]
    caption: str = ""
    notes: Sequence[str] = ()
    open: bool = False


def arm_tables(run: RunFiles) -> list[Table]:
    """A table for each group of metrics: columns are arms, then the chance level where all arms share it, and n."""
    arms, tables = run.results["arms"], []
    for title, group in metric_groups(run, arms.values()).items():
        rows: list[Row] = []
        notes: list[str] = []
        for key, words in group.items():
            found = [arms[arm].get(key) for arm in run.arms]
            chances = {number(one["chance"], words.digits) for one in found if one and one["chance"] is not None}
            common = chances.pop() if len(chances) == 1 else None
            cells = [metric_cell(one, words.digits, notes, with_chance=common is None) for one in found]
            rows.append(Row(_name(words), [*cells, Cell(common or DASH), Cell(_units(found))], words.meaning))
        heads = ["Metric", *map(arm_title, run.arms), "chance level", "n"]
        tables.append(Table(title, heads, {"": rows}, notes=notes, open=title in OPEN_GROUPS))
    return tables


def metric_groups(run: RunFiles, found: Iterable[dict[str, Any]]) -> dict[str, dict[str, MetricWords]]:
    """The groups of a table with the metrics that an arm in `found` has; those of the teacher's slots come last."""
    names = {name for metrics in found for name in metrics} - set(() if run.leaves_rows_out else OF_MASSIVE_ROWS)
    own = {key + OWN_SLOTS_SUFFIX: words for key, words in METRICS.items() if key + OWN_SLOTS_SUFFIX in names}
    groups = {
        title: {key: words for key, words in group.items() if key in names} for title, group in METRIC_GROUPS.items()
    }
    return {title: group for title, group in (groups | {OWN_SLOTS: own}).items() if group}


def difference_tables(run: RunFiles) -> list[Table]:
    """The teacher minus each arm, unless the teacher comes first, and each arm minus the first one."""
    reference = run.ablations["reference"]
    tables = [_differences(run, f"Each arm minus {arm_title(reference)}", run.ablations["differences"])]
    if reference != "teacher":
        tables.insert(0, _differences(run, "The teacher minus each arm", run.ablations["against_teacher"]))
    return tables


def _differences(run: RunFiles, title: str, by_arm: dict[str, dict[str, Any]]) -> Table:
    groups, notes = {}, list[str]()
    for name, group in metric_groups(run, by_arm.values()).items():
        rows = []
        for key, words in group.items():
            found = [metrics.get(key) for metrics in by_arm.values()]
            if all(one is None or one["ci95"] in (None, [0.0, 0.0]) for one in found):
                continue  # the same in every arm by construction
            rows.append(Row(_name(words), [metric_cell(one, words.digits, notes, sign=True) for one in found]))
        if rows:
            groups[name] = rows
    caption = "Paired on the same resamples, with 95\u00a0% intervals. Bold: the interval excludes 0."
    return Table(title, ["Metric", *map(arm_title, by_arm)], groups, caption, notes)


def _name(words: MetricWords) -> str:
    return f"{words.name} {words.better}".strip()


def metric_cell(
    found: dict[str, Any] | None, digits: int, notes: list[str], *, sign: bool = False, with_chance: bool = False
) -> Cell:
    """A metric of results.json; a missing value is a dash with its reason in `notes`. Bold: a difference from 0."""
    if found is None:
        return Cell(DASH)
    if found["value"] is None:
        return Cell(DASH, note=_note(notes, found.get("why", "no reason was recorded")))
    ci95 = found["ci95"]
    return Cell(
        number(found["value"], digits, sign),
        interval(ci95, digits) if ci95 else None,
        number(found["chance"], digits) if with_chance and found["chance"] is not None else None,
        _note(notes, found.get("why")),
        bold=sign and bool(ci95) and not ci95[0] <= 0 <= ci95[1],
    )


def _note(notes: list[str], reason: str | None) -> int | None:
    """Number of the footnote with this reason, which is listed once."""
    if reason is None:
        return None
    if reason not in notes:
        notes.append(reason)
    return notes.index(reason) + 1


def _units(found: list[dict[str, Any] | None]) -> str:
    """Units behind the values: one number, or a range where the arms differ."""
    counts = sorted({one["n"] for one in found if one and one["value"] is not None})
    if not counts:
        return DASH
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def concepts_table(run: RunFiles) -> Table:
    """Purity of every measured concept in every arm, with its rows and held-out words; the teacher's purest first."""
    first = "teacher" if "teacher" in run.arms else run.arms[0]
    # A single concept has no purity.
    purity = {arm: {one["parent"]: one.get("purity") for one in run.ablations["concepts"][arm]} for arm in run.arms}
    rows = []
    for concept in sorted(run.in_use, key=lambda concept: -(purity[first].get(concept["parent"]) or 0.0)):
        p = concept["parent"]
        words = sum(len(child["words"][run.results["split"]]) for child in run.concepts["parents"][p]["children"])
        values = [number(purity[arm].get(p), 2) for arm in run.arms]
        rows.append(Row(run.parent_name(p), list(map(Cell, [*values, f"{concept['rows']:,}", f"{words:,}"]))))
    caption = "Purity in every arm, and the rows and held-out words that each concept is measured on."
    heads = ["Concept", *map(arm_title, run.arms), "rows", "words"]
    return Table("Purity, concept by concept", heads, {"": rows}, caption)


def steering_table(run: RunFiles) -> Table:
    """Side effects of every arm by level, form, hook and dose."""
    grid = {arm: cells for arm in run.arms if (cells := run.steering["grid"].get(arm))}
    key = ("level", "form", "hook", "target_nats")
    found = {arm: {tuple(cell[name] for name in key): cell for cell in cells} for arm, cells in grid.items()}
    rows = []
    for place in dict.fromkeys(place for cells in found.values() for place in cells):
        level, form, hook, nats = place
        elsewhere = "" if hook == run.results["hook"] else f" at {hook}"
        name = f"{level}, {FORMS[form]}{elsewhere}, +{nats:g} nats"
        rows.append(Row(name, [_steering_cell(cells.get(place)) for cells in found.values()]))
    caption = (
        "Shift of other words in nats; in brackets along another concept's direction. Then the concepts whose "
        "log-odds did not rise by the dose."
    )
    return Table("Steering by level, form and dose", ["Steered", *map(arm_title, grid)], {"": rows}, caption)


def _steering_cell(cell: dict[str, Any] | None) -> Cell:
    if cell is None:
        return Cell(DASH)
    leakage = cell["steering_leakage"]
    value = f"{number(leakage['value'])} ({number(leakage['chance'])})"
    return Cell(value, f"{cell['unreached']} of {cell['concepts']} not reached")


def interventions_table(run: RunFiles) -> Table:
    """The teacher's directions in the language model beside other directions at the same effect."""
    found, rows = run.interventions, list[Row]()
    if "ratio_invariance" in found:
        ratio, targeting = found["ratio_invariance"], found["targeting"]
        for key, said in (("median", "median"), ("p90", "90th percentile")):
            name = f"KL among a parent's words, {said} (published: below {ratio['thresholds'][key]:g})"
            rows.append(Row(name, [_value(ratio[along][key]) for along in ALONG]))
        rows.append(Row("parents not reached", [_missed(ratio[along], "median") for along in ALONG]))
        for level, others in (("parents", "other parents"), ("children", "siblings")):
            along = [targeting[level][name] for name in ALONG]
            shares = [Cell(percent(one["share_above_threshold"]["value"])) for one in along]
            moved = f"{level}: shift relative to {others}, median ratio"
            rows.append(Row(moved, [_value(one["median_ratio"]) for one in along]))
            rows.append(Row(f"{level}: share with a ratio of {targeting['threshold']:g} or more", shares))
        children = targeting["children"]
        rows.append(Row("children not reached", [_missed(children[name], "median_ratio") for name in ALONG]))
    for words, title in (("same_words", "the teacher's words"), ("other_words", "held-out words")):
        if words in found["agreement"]:
            cosines = [_value(found["agreement"][words][name]) for name in ("cosine", "other_parents", "random")]
            rows.append(Row(f"cosine of a parent's mean activation with the direction, {title}", cosines))
    dose = f"at a dose of +{found['target_nats']:g} nats" if "target_nats" in found else found["why"]
    caption = f"Before any training: {dose}. Intervals are 95\u00a0%."
    return Table("Concept directions in the language model", ["Measured", *ALONG.values()], {"": rows}, caption)


def _value(found: dict[str, Any]) -> Cell:
    return _with_interval(found["value"], found["ci95"], 3)


def _with_interval(value: float | None, ci95: list[float] | None, digits: int) -> Cell:
    return Cell(number(value, digits), interval(ci95, digits) if ci95 else None)


def _missed(found: dict[str, Any], name: str) -> Cell:
    return Cell(f"{found['unreached']} of {found['unreached'] + found[name]['n']}")


def evidence_table(run: RunFiles) -> Table:
    """The statistics of the concepts beside their controls."""
    notes: list[str] = []
    rows = []
    for key, (title, meaning) in VARIANTS.items():
        if key not in run.evidence:
            continue
        found = run.evidence[key]
        angles = found.get("angles") or {"median_angle_deg": None, "median_ci95": None}
        beta = _with_interval(found["median_beta"], found.get("beta_ci95"), 2)
        cells = [
            Cell(percent(found["fraction_z_above_3"])),
            Cell(number(found["median_z"], 2)),
            beta._replace(note=_note(notes, found.get("why"))),
            _with_interval(found["omega"], found.get("omega_ci95"), 3),
            _with_interval(angles["median_angle_deg"], angles["median_ci95"], 1),
        ]
        rows.append(Row(title, cells, meaning))
    heads = ["Measured on", "parents with z above 3", "median z", "median β", "ω", "median angle, °"]
    caption = (
        f"Intervals are 95\u00a0% over parents. z rests on {run.evidence['permutations']:,} draws of random nouns."
    )
    return Table("The concepts beside their controls", heads, {"": rows}, caption, notes)


def parents_table(run: RunFiles) -> Table:
    """One row per parent concept, the largest z first: what its children share, and medians over its children."""
    parents, children = run.evidence["main"]["parents"], run.evidence["main"]["children"]
    owner = np.asarray(children["parent"])
    rows = []
    for p in sorted(range(len(parents["name"])), key=lambda p: -(parents["z"][p] or 0.0)):
        own = np.flatnonzero(owner == p)
        betas = [children["beta"][r] for r in own if children["beta"][r] is not None]
        z = parents["z"][p]
        cells = [
            Cell(number(parents["n_children"][p], 0)),
            Cell(number(parents["s_p"][p], 2)),
            Cell(number(z, 2), bold=z is not None and z > 3),
            Cell(number(parents["q"][p], 3)),
            Cell(number(float(np.median(betas)) if betas else None, 2)),
            Cell(number(parents["omega"][p], 3)),
            Cell(number(float(np.median([children["angle_deg"][r] for r in own])), 1)),
        ]
        rows.append(Row(parents["name"][p], cells))
    heads = ["Parent", "children", "s", "z", "q", "β", "ω", "angle, °"]
    caption = "s is the mean inner product of two children; β and angle are medians over the parent's children."
    return Table(f"Every parent ({len(rows)} rows)", heads, {"": rows}, caption)


def phases_table(run: RunFiles) -> Table:
    """What each phase ran on, and how long it took."""
    rows = []
    for name, phase in sorted(run.provenance["phases"].items()):
        environment = phase["environment"]
        commit = (environment["commit"] or DASH)[:12]
        cells = (phase["seconds"], environment["device"], environment["threads"], commit)
        rows.append(Row(name.replace("phase", "phase "), [Cell(str(value)) for value in cells], PHASES[name]))
    return Table("Phases", ["Phase", "seconds", "device", "threads", "commit"], {"": rows})


def versions(run: RunFiles) -> list[tuple[str, str]]:
    """Python, platform and packages of the last phase."""
    environment = run.provenance["phases"]["phase4"]["environment"]
    packages = [(name, version or DASH) for name, version in environment["packages"].items()]
    return [("Python", environment["python"]), ("platform", environment["platform"]), *packages]
