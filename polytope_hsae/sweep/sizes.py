"""The tables of a sweep over L0s and learning rates: reconstruction, cost and hierarchy at every hook and L0."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..report.words import DASH, listed, markdown_table
from .columns import SPLITS, UNMATCHED, Column, devices, mean_text, of_versions, percent, rows_of, shown
from .summary import TOLERANCE, Result, Results, alike, best_flat, difference

SIZE_NOTES = (
    "In brackets behind a hierarchy value: its chance level (docs/method.md, section 5). Dead: never on in the train",
    "rows read for it. Max firing rate: share of validation rows with the most used parent (or flat latent) on.",
    "P(parent on) given its child is 1 by construction where a parent gates its children; flat arms have none.",
    f"†: not at matched L0: the two L0s differ by more than {TOLERANCE:.0%}. What every arm is: study.yaml.",
)


def tables(results: Results) -> list[str]:
    """For every hook and L0: a main table, one of the hierarchy, and one of the learning rates that were tried."""
    sweep, first = results.sweep, next(iter(results.runs.values()))
    workers = sorted({record["workers"] for found in results.found.values() for record in found.records.values()})
    lines = [
        f"# Study {sweep.name}",
        "",
        f"{first['steps']:,} steps of {first['tokens'] // first['steps']:,} rows; {SPLITS[results.split]} values"
        f" ({first['val']['rows']:,} validation rows), mean ± standard deviation over seeds. The learning rate is the"
        f" one of {len(sweep.lr)} with the largest validation EV at seed {sweep.seeds[0]}; the other seeds use it."
        f" Differences are paired by seed; *equal* means within {TOLERANCE:.0%}. Training times are of"
        f" {listed([str(count) for count in workers])} workers on {devices(results)}. {len(results.runs)} runs.",
        *of_versions(results),
    ]
    for hook in sweep.places:
        for l0 in sweep.l0s:
            if found := results.at(hook, l0):
                lines += ["", f"## {hook}" + ("" if l0 is None else f", L0 {l0}"), ""]
                lines += _sizes_at(results, found)
    return [*lines, "", *SIZE_NOTES]


def _sizes_at(results: Results, found: list[Result]) -> list[str]:
    split = results.split

    def l0(result: Result) -> str:
        parents, children = (mean_text(result.spread(split, f"l0_{of}"), 1) for of in ("parents", "children"))
        return f"{mean_text(result.metric('l0'), 2)} ({parents} + {children})"

    main = [
        Column("atoms", lambda result: mean_text(result.spread("atoms"), 0)),
        Column("parameters", lambda result: mean_text(result.spread("parameters"), 0)),
        Column("L0 (parents + children)", l0),
        Column("EV", lambda result: shown(result.metric("ev"))),
        Column("CE recovered", lambda result: shown(result.metric("ce_recovered"))),
        Column("EV − best flat, equal parameters", lambda result: _against_flat(found, result, "parameters")),
        Column("EV − best flat, equal atoms", lambda result: _against_flat(found, result, "atoms")),
        Column("FLOPs a row", lambda result: mean_text(result.spread("flops_per_row"), 0)),
        Column("training, s", lambda result: mean_text(result.spread("seconds", "train"), 1)),
        Column("dead parents", lambda result: percent(result.spread("usage", "dead_parents"))),
        Column("dead children", lambda result: percent(result.spread("usage", "dead_children"))),
        Column("max firing rate", lambda result: percent(result.spread("val", "metrics", "max_firing_rate"))),
        Column("learning rate", lambda result: DASH if result.lr is None else f"{result.lr:g}"),
        Column("trials", lambda result: f"{len(result.trials)}" + f", {result.failed} failed" * (result.failed > 0)),
        Column("seeds", lambda result: f"{len(result.records)}"),
    ]
    lines = rows_of(main, found)
    nested = [result for result in found if result.kind == "hsae"]
    if nested:
        lines += ["", *rows_of(HIERARCHY, nested)]
    if len(results.sweep.lr) > 1:
        trials = [
            replace(result, lr=lr, records={record["seed"]: record})
            for result in found
            for lr, record in result.trials.items()
        ]
        lines += [
            "",
            f"Every learning rate with seed {results.sweep.seeds[0]}, validation values:",
            "",
            *rows_of(TRIALS, trials),
        ]
    return lines


def _against_flat(found: Sequence[Result], result: Result, size: str) -> str:
    """The difference from the best flat arm of that size, and its name; marked where their L0s differ."""
    if result.kind != "hsae":
        return DASH
    rival = best_flat(found, result, size)
    if rival is None:
        return "no flat arm"
    path = (result.split, "metrics", "ev")
    mark = "" if alike(result, rival, result.split, "metrics", "l0") else UNMATCHED
    return f"{shown(difference(result, rival, *path), 4, sign=True)} ({rival.cell.arm}){mark}"


def _with_chance(name: str, digits: int = 3, quartiles: bool = False) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        chance = mean_text(result.spread("val", "metrics", name, "chance"), digits)
        text = f"{shown(result.spread('val', 'metrics', name), digits)} ({chance})"
        ends = [mean_text(result.spread("val", "metrics", f"{name}_{of}"), 3) for of in ("q25", "q75")]
        return f"{text} [{', '.join(ends)}]" if quartiles else text

    return cell


HIERARCHY = [
    Column("P(parent on) given its child", _with_chance("parent_given_child")),
    Column("P(child on) given its parent, median [quartiles]", _with_chance("child_given_parent", quartiles=True)),
    Column("router entropy (of)", _with_chance("entropy", 2)),
    Column("probe with child's atom", _with_chance("probe_child")),
    Column("with parent's atom", _with_chance("probe_parent")),
    Column("smaller of both", _with_chance("probe_min")),
    Column("concepts", lambda result: mean_text(result.spread("val", "metrics", "probe_min", "n"), 0)),
]
TRIALS = [
    Column("learning rate", lambda result: f"{result.lr:g}"),
    Column("EV", lambda result: _tried(result, "ev")),
    Column("CE recovered", lambda result: _tried(result, "ce_recovered")),
    Column("dead parents", lambda result: percent(result.spread("usage", "dead_parents"))),
    Column("dead children", lambda result: percent(result.spread("usage", "dead_children"))),
]


def _tried(result: Result, name: str) -> str:
    failed = name == "ev" and any(record["failed"] for record in result.records.values())
    return "failed" if failed else shown(result.spread("val", "metrics", name))


# what the page says


def summary(results: Results) -> list[str]:
    """How far every hierarchical arm is ahead of the best flat one of equal parameters, or else of equal atoms."""
    rows, ahead = [], {size: [0, 0] for size in ("parameters", "atoms")}
    for hook in results.shown_hooks:
        for l0 in results.sweep.l0s:
            found = results.at(hook, l0)
            for result in (one for one in found if one.kind == "hsae"):
                row = [hook if l0 is None else f"{hook}, L0 {l0}", result.cell.arm, shown(result.metric("ev"))]
                size = "parameters" if best_flat(found, result, "parameters") else "atoms"
                rival = best_flat(found, result, size)
                gap = None if rival is None else difference(result, rival, result.split, "metrics", "ev")
                if gap is not None:
                    ahead[size][0] += gap.mean > 0
                    ahead[size][1] += 1
                row += [DASH if gap is None else size, _against_flat(found, result, size)]
                rows.append(
                    [*row, shown(result.metric("ce_recovered")), percent(result.spread("usage", "dead_children"))]
                )
    said = [f"in {won} of {of} at equal {size}" for size, (won, of) in ahead.items() if of]
    header = ["hook", "arm", "EV", "at equal", "EV − best flat arm", "CE recovered", "dead children"]
    return [
        f"{SPLITS[results.split].capitalize()} values, mean ± standard deviation over seeds. In EV, hierarchical arms"
        f" are ahead of the best flat arm {' and '.join(said)}. †: L0s more than {TOLERANCE:.0%} apart.",
        "",
        *markdown_table(header, rows),
    ]
