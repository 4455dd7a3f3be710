"""`hsae synthetic table`: table.md, from study.yaml and the runs' JSON files alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...fileio import read_json, update_text
from ...report.words import DASH, listed, markdown_table, number
from .plan import SyntheticStudy, load_synthetic, settings_hash

Columns = dict[str, tuple[str, ...]]  # a column's title: where its number lies in a record

MAIN: Columns = {
    "latents": ("latents",),
    "L0": ("l0",),
    "of parents": ("l0_parents",),
    "EV": ("ev",),
    "MCC": ("features", "mcc"),
    "F1": ("features", "f1"),
    "precision": ("features", "precision"),
    "recall": ("features", "recall"),
    "F1, assigned": ("features", "f1_assigned"),
    "unique": ("features", "unique"),
    "dead": ("features", "dead"),
    "recovered": ("features", "recovered"),
}
EDGES: Columns = {
    "edge F1": ("edges", "forest", "f1"),
    "chance": ("edges", "forest", "chance"),
    "precision": ("edges", "forest", "precision"),
    "recall": ("edges", "forest", "recall"),
    "ancestors": ("edges", "forest", "ancestors"),
    "recall, both held": ("edges", "forest", "recall_held"),
    "structure: F1": ("edges", "structure", "f1"),
    "its precision": ("edges", "structure", "precision"),
    "its recall": ("edges", "structure", "recall"),
    "its ancestors": ("edges", "structure", "ancestors"),
    "cofiring: F1": ("edges", "cofiring", "f1"),
    "at its best": ("edges", "best_cofiring", "f1"),
    "leaf given parent": ("features", "leaf_given_parent"),
}
NOTES = (
    "Every metric is defined in docs/method.md, section 7. MCC, F1, precision, recall and unique as SynthSAEBench has",
    "them. Edges: for an H-SAE its children's router parents and the co-firing rule among its parents, for a flat",
    "model that rule alone; recall against the edges between as many of the most frequent features as there are",
    "latents; chance: the recovered features dealt out anew. At its best: the rule for all latents with the threshold",
    "of largest F1, which only the truth can tell. Random: not trained; frozen: the decoder stays random.",
)


def write_table(folder: Path) -> Path:
    """Write table.md; the same runs give the same bytes. Raises ValueError where there is no run to show."""
    study = load_synthetic(folder / "study.yaml")
    records = {arm.name: _records(study, folder, arm.name) for arm in study.arms}
    shown = {name: found for name, found in records.items() if found}
    if not shown:
        raise ValueError(f"{folder / 'runs'}: found no runs of this study, allowed: hsae synthetic run makes them")
    update_text(folder / "table.md", _table(study, shown))
    return folder / "table.md"


def _records(study: SyntheticStudy, folder: Path, arm: str) -> list[Any]:
    """An arm's records with the present settings, by seed."""
    runs = [run for run in study.runs if run.arm == arm and (folder / "runs" / run.file).is_file()]
    found = [(run, read_json(folder / "runs" / run.file)) for run in runs]
    return [record for run, record in found if record["settings_sha256"] == settings_hash(study, run)]


def _table(study: SyntheticStudy, records: dict[str, list[Any]]) -> str:
    world, every = study.world, [record for found in records.values() for record in found]
    devices = listed(sorted({record["code"]["device"] for record in every}))
    levels: Columns = {f"level {n}": ("features", f"recovered_level_{n}") for n in range(len(world.level_sizes))}
    levels["outside trees"] = ("features", "recovered_free")
    in_trees = sum(world.level_sizes)
    lines = [
        f"# Synthetic study {study.name}",
        "",
        f"{world.n_features:,} features in {world.width} dimensions, {in_trees:,} of them in {world.trees} trees of"
        f" branching {world.branching} and depth {world.depth}; {every[0]['world_l0']:.1f} on per row."
        f" {study.steps * study.batch_size:,} training rows for every arm, the same ones; L0 {study.l0};"
        f" measured on {study.test_rows:,} others. Mean ± standard deviation over seeds. On {devices}.",
        "",
        *_markdown(MAIN, records),
        "",
        "## Edges",
        "",
        *_markdown(EDGES, records),
        "",
        f"## Recovered, of the {study.n_latents:,} most frequent features",
        "",
        *_markdown(levels, records),
        "",
        "## Speed",
        "",
        *_speed(records),
        "",
        *NOTES,
        "",
    ]
    return "\n".join(lines)


def _markdown(columns: Columns, records: dict[str, list[Any]]) -> list[str]:
    paths = columns.values()
    rows = [[_name(name, found), *(_shown(found, path) for path in paths)] for name, found in records.items()]
    return markdown_table(["arm", *columns], rows)


def _speed(records: dict[str, list[Any]]) -> list[str]:
    """Rows per second with the drawing of rows, and of the drawing alone, at as many runs at once as are said."""
    header = ["arm", "parameters", "rows", "rows/s", "drawing alone", "training, s", "runs at once", "peak GiB"]
    rows = []
    for name, found in records.items():
        peak = found[0]["peak_bytes"]["value"]
        rows.append(
            [
                name,
                f"{found[0]['parameters']:,}",
                f"{found[0]['rows']:,}",
                _mean(found, ("rows_per_second",), 0),
                _mean(found, ("drawn_per_second",), 0),
                _mean(found, ("train_seconds",), 1),
                listed(sorted({str(record["workers"]) for record in found})),
                DASH if peak is None else f"{peak / 2**30:.1f}",
            ]
        )
    return markdown_table(header, rows)


def _name(name: str, found: list[Any]) -> str:
    failed = sum(record["failed"] is not None for record in found)
    return f"{name} ({failed} of {len(found)} failed)" if failed else name


def _values(found: list[Any], path: Sequence[str]) -> list[float]:
    """The numbers at a path of the records that have one."""
    values = []
    for record in found:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    return values


def _mean(found: list[Any], path: Sequence[str], digits: int) -> str:
    values = _values(found, path)
    return number(statistics.fmean(values), digits) if values else DASH


def _shown(found: list[Any], path: Sequence[str]) -> str:
    """Mean, with the deviation of several seeds; counts without decimals, a dash where there is nothing."""
    values = _values(found, path)
    if not values:
        return DASH
    if path == ("latents",):
        return f"{values[0]:,.0f}"
    text = number(statistics.fmean(values), 4)
    return text if len(values) == 1 else f"{text} ± {number(statistics.stdev(values), 4)}"
