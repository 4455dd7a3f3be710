"""The tables of a sweep on synthetic rows: what is recovered of the known features, and of their edges."""

from collections.abc import Callable, Mapping

from ..report.words import DASH, listed
from .columns import Column, devices, mean_text, rows_of, shown
from .summary import Result, Results, Spread


def numbers_at(paths: Mapping[str, tuple[str, ...]], digits: int = 4) -> list[Column]:
    def cell(path: tuple[str, ...]) -> Callable[[Result], str]:
        return lambda result: shown(result.spread(*path), 0 if path == ("latents",) else digits)

    return [Column(title, cell(path)) for title, path in paths.items()]


RECOVERY = {
    "latents": ("latents",),
    "L0": ("test", "l0"),
    "of parents": ("test", "l0_parents"),
    "EV": ("test", "ev"),
    "MCC": ("test", "features", "mcc"),
    "F1": ("test", "features", "f1"),
    "precision": ("test", "features", "precision"),
    "recall": ("test", "features", "recall"),
    "F1, assigned": ("test", "features", "f1_assigned"),
    "unique": ("test", "features", "unique"),
    "dead": ("test", "features", "dead"),
    "recovered": ("test", "features", "recovered"),
}
EDGES = {
    "edge F1": ("test", "edges", "forest", "f1"),
    "chance": ("test", "edges", "forest", "chance"),
    "precision": ("test", "edges", "forest", "precision"),
    "recall": ("test", "edges", "forest", "recall"),
    "ancestors": ("test", "edges", "forest", "ancestors"),
    "recall, both held": ("test", "edges", "forest", "recall_held"),
    "structure: F1": ("test", "edges", "structure", "f1"),
    "its precision": ("test", "edges", "structure", "precision"),
    "its recall": ("test", "edges", "structure", "recall"),
    "its ancestors": ("test", "edges", "structure", "ancestors"),
    "cofiring: F1": ("test", "edges", "cofiring", "f1"),
    "at its best": ("test", "edges", "best_cofiring", "f1"),
    "leaf given parent": ("test", "features", "leaf_given_parent"),
}
SPEED = [
    Column("parameters", lambda result: mean_text(result.spread("parameters"), 0)),
    Column("rows", lambda result: mean_text(result.spread("rows"), 0)),
    Column("rows/s", lambda result: mean_text(result.spread("rows_per_second"), 0)),
    Column("drawing alone", lambda result: mean_text(result.spread("drawn_per_second"), 0)),
    Column("training, s", lambda result: mean_text(result.spread("seconds", "train"), 1)),
    Column("runs at once", lambda result: listed(sorted({str(run["workers"]) for run in result.records.values()}))),
    Column("peak GiB", lambda result: _gib(result.spread("peak_bytes"))),
]
SYNTHETIC_NOTES = (
    "Every metric is defined in docs/method.md, section 7. MCC, F1, precision, recall and unique as SynthSAEBench has",
    "them. Edges: for an H-SAE its children's router parents and the co-firing rule among its parents, for a flat",
    "model that rule alone; recall against the edges between as many of the most frequent features as there are",
    "latents; chance: the recovered features dealt out anew. At its best: the rule for all latents with the threshold",
    "of largest F1, which only the truth can tell. Random: not trained; frozen: the decoder stays random.",
)


def _gib(found: Spread | None) -> str:
    return DASH if found is None else f"{found.mean / 2**30:.1f}"


def tables(results: Results) -> list[str]:
    """Everything that is recovered, and how fast the runs were."""
    found = [result for result in results.found.values() if result.records]
    world = results.sweep.world
    assert world is not None
    latents = max(record["latents"] for result in found for record in result.records.values())
    levels = {f"level {n}": ("test", "features", f"recovered_level_{n}") for n in range(len(world.level_sizes))}
    levels["outside trees"] = ("test", "features", "recovered_free")
    lines = [f"# Synthetic study {results.sweep.name}", "", _made_of(results, found)]
    for title, columns in {
        "": numbers_at(RECOVERY),
        "Edges": numbers_at(EDGES),
        f"Recovered, of the {latents:,} most frequent features": numbers_at(levels),
        "Speed": SPEED,
    }.items():
        lines += ["", *([f"## {title}", ""] if title else []), *rows_of(columns, found)]
    return [*lines, "", *SYNTHETIC_NOTES]


def _made_of(results: Results, found: list[Result]) -> str:
    """What the rows are, in a sentence or two."""
    world, config = results.sweep.world, next(iter(results.configs.values()))
    records = [record for result in found for record in result.records.values()]
    assert world is not None
    return (
        f"{world.n_features:,} features in {world.width} dimensions, {sum(world.level_sizes):,} of them in"
        f" {world.trees} trees of branching {world.branching} and depth {world.depth};"
        f" {records[0]['world_l0']:.1f} on per row. {max(record['rows'] for record in records):,} training rows for"
        f" every arm, the same ones; L0 {config.hsae.total_l0}; measured on {results.sweep.test_rows:,} others. Mean ±"
        f" standard deviation over seeds. On {devices(results)}."
    )


# what the page says


def summary(results: Results) -> list[str]:
    """What is recovered, in one table."""
    titles = ("latents", "L0", "EV", "MCC", "F1")
    columns: dict[str, tuple[str, ...]] = {title: RECOVERY[title] for title in titles}
    columns |= {title: EDGES[title] for title in ("edge F1", "chance")} | {"edge F1 at its best": EDGES["at its best"]}
    found = [result for result in results.found.values() if result.records]
    return [_made_of(results, found), "", *rows_of(numbers_at(columns), found)]
