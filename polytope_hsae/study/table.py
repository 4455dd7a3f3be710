"""`hsae study table`: table.md, pareto.svg and pareto.html, from study.yaml and the runs' JSON files alone."""

from collections.abc import Sequence
from pathlib import Path

from ..fileio import update_text
from ..report.words import DASH, listed, markdown_table, number
from .pareto import page, picture
from .results import TOLERANCE, Result, Results, Spread, alike, best_flat, difference, read_results

MAIN = (
    "arm",
    "atoms",
    "parameters",
    "L0 (parents + children)",
    "EV",
    "CE recovered",
    "EV − best flat, equal parameters",
    "EV − best flat, equal atoms",
    "FLOPs a row",
    "training, s",
    "dead parents",
    "dead children",
    "max firing rate",
    "rate",
    "trials",
    "seeds",
)
HIERARCHY = (
    "arm",
    "P(parent on) given its child",
    "P(child on) given its parent, median [quartiles]",
    "router entropy (of)",
    "probe with child's atom",
    "with parent's atom",
    "smaller of both",
    "concepts",
)
TRIALS = ("arm", "rate", "EV", "CE recovered", "dead parents", "dead children")
NOTES = (
    "In brackets behind a hierarchy value: its chance level (docs/method.md, section 5). Dead: never on in the train",
    "rows read for it. Max firing rate: share of validation rows with the most used parent (or flat latent) on.",
    "P(parent on) given its child is 1 by construction where a parent gates its children; flat arms have none.",
    f"†: not at matched L0, the two arms' differ by more than {TOLERANCE:.0%}. What every arm is: study.yaml.",
)


def write_table(folder: Path, split: str = "val") -> list[Path]:
    """Write the three files; the same runs give the same bytes. `split`: val or test, whose values are shown.

    Raises ValueError where there is nothing to show.
    """
    results = read_results(folder)
    if not any(result.numbers(split, "ev") for result in results.found):
        raise ValueError(f"{folder}: found no {split} values, allowed: hsae study run{' --test' * (split == 'test')}")
    texts = {
        "table.md": table(results, split),
        "pareto.svg": picture(results, split),
        "pareto.html": page(results, split),
    }
    for name, text in texts.items():
        update_text(folder / name, text)
    return [folder / name for name in texts]


def table(results: Results, split: str) -> str:
    """Markdown for every hook and L0: a main table, one of the hierarchy, and one of the rates that were tried."""
    study = results.study
    rows = next(iter(results.found[0].records.values()))["val"]["rows"] if results.found[0].records else 0
    lines = [
        f"# Study {study.name}",
        "",
        f"{study.steps:,} steps of {study.batch_size:,} rows; {'validation' if split == 'val' else 'test'} values"
        f" ({rows:,} validation rows), mean ± standard deviation over seeds. The rate is the one of "
        f"{len(study.lr)} with the largest validation EV at seed {study.seeds[0]}; the other seeds use it."
        f" Differences are paired by seed; *equal* means within {TOLERANCE:.0%}. Training times are of"
        f" {_workers(results)} on {listed(_devices(results))}. {results.runs} runs.",
    ]
    if results.left_out:
        lines += [
            "",
            f"Left out, because the study does not ask for them as they were made: {len(results.left_out)} runs.",
        ]
    every = [record for found in results.found for record in (*found.records.values(), *found.trials.values())]
    if len({record["code"]["sources_sha256"] for record in every}) > 1:
        lines += ["", "The runs were made with more than one version of the code; each says which."]
    for hook in study.hooks:
        for l0 in study.l0:
            found = [result for result in results.found if result.cell.hook == hook and result.cell.l0 == l0]
            if not found:
                continue
            lines += [
                "",
                f"## {hook}, L0 {l0}",
                "",
                *markdown_table(MAIN, [_main(found, result, split) for result in found]),
            ]
            nested = [_hierarchy(result) for result in found if result.kind == "hsae"]
            if nested:
                lines += ["", *markdown_table(HIERARCHY, nested)]
            if len(study.lr) > 1:
                lines += ["", f"Every rate with seed {study.seeds[0]}, validation values:", ""]
                lines += markdown_table(TRIALS, [row for result in found for row in _trials(result)])
    lines += ["", *NOTES, ""]
    return "\n".join(lines)


def _workers(results: Results) -> str:
    counts = sorted({record["workers"] for result in results.found for record in result.records.values()})
    return f"{listed([str(count) for count in counts])} runs at once"


def _devices(results: Results) -> list[str]:
    return sorted({record["code"]["device"] for result in results.found for record in result.records.values()})


def _main(found: Sequence[Result], result: Result, split: str) -> list[str]:
    parents, children = (result.spread(split, f"l0_{who}") for who in ("parents", "children"))
    l0 = f"{_mean(result.spread(split, 'l0'), 2)} ({_mean(parents, 1)} + {_mean(children, 1)})"
    return [
        result.cell.arm,
        _mean(result.spread("atoms"), 0),
        _mean(result.spread("parameters"), 0),
        l0,
        shown(result.spread(split, "ev")),
        shown(result.spread(split, "ce_recovered")),
        _against(found, result, "parameters", split),
        _against(found, result, "atoms", split),
        _mean(result.spread("flops_per_row"), 0),
        _mean(result.spread("train_seconds"), 1),
        _percent(result.spread("usage", "dead_parents")),
        _percent(result.spread("usage", "dead_children")),
        _percent(result.spread("hierarchy", "max_firing_rate")),
        f"{result.lr:g}",
        str(len(result.trials)) + (f", {result.failed} failed" if result.failed else ""),
        str(len(result.records)),
    ]


def _against(found: Sequence[Result], result: Result, size: str, split: str) -> str:
    """The difference from the best flat arm of that size, and its name; marked where their L0s differ."""
    if result.kind != "hsae":
        return DASH
    rival = best_flat(found, result, size, split)
    if rival is None:
        return "no flat arm"
    mark = "" if alike(result, rival, split, "l0") else " †"
    return f"{shown(difference(result, rival, split, 'ev'), 4, sign=True)} ({rival.cell.arm}){mark}"


def _hierarchy(result: Result) -> list[str]:
    def cell(name: str, digits: int = 3) -> str:
        return f"{shown(result.spread('hierarchy', name), digits)} ({_mean(_chance(result, name), digits)})"

    quartiles = [_mean(result.spread("hierarchy", f"child_given_parent_{q}"), 3) for q in ("q25", "q75")]
    concepts = result.spread("hierarchy", "probe_min", "n")
    return [
        result.cell.arm,
        cell("parent_given_child"),
        f"{cell('child_given_parent')} [{', '.join(quartiles)}]",
        cell("entropy", 2),
        cell("probe_child"),
        cell("probe_parent"),
        cell("probe_min"),
        _mean(concepts, 0),
    ]


def _trials(result: Result) -> list[list[str]]:
    """A row for every rate that the arm has tried with the first seed."""
    rows = []
    for lr, record in result.trials.items():
        trial = result._replace(records={record["seed"]: record})
        values = [shown(trial.spread("val", name)) for name in ("ev", "ce_recovered")]
        values += [_percent(trial.spread("usage", name)) for name in ("dead_parents", "dead_children")]
        rows.append([result.cell.arm, f"{lr:g}", *(["failed", DASH, DASH, DASH] if record["failed"] else values)])
    return rows


def _chance(result: Result, name: str) -> Spread | None:
    return result.spread("hierarchy", name, "chance")


def shown(found: Spread | None, digits: int = 4, sign: bool = False) -> str:
    """'0.7840 ± 0.0010', without the deviation of one seed; a dash where there is none."""
    if found is None:
        return DASH
    text = number(found.mean, digits, sign)
    return text if found.sd is None else f"{text} ± {number(found.sd, digits)}"


def _mean(found: Spread | None, digits: int) -> str:
    return DASH if found is None else number(found.mean, digits)


def _percent(found: Spread | None) -> str:
    return DASH if found is None else f"{number(100 * found.mean, 2)} %"
