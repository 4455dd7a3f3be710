"""What an arm costs against what it keeps: L0, parameters, training FLOPs and time against EV and CE recovered."""

from html import escape

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ..report.palette import LIGHT, LINE_STYLES, SERIES, css_variables
from ..report.svg import BOTTOM, TOP, WIDTH, Drawing, Frame, draw
from .results import Result, Results

COSTS = {
    "l0": "L0, active latents a row",
    "parameters": "parameters",
    "training_flops": "training FLOPs",
    "train_seconds": "training time, s",
}
KEPT = {"ev": "explained variance", "ce_recovered": "CE recovered"}
HEIGHT, LEFT, LINE_HEIGHT = 2.2, 0.6, 0.17
POINTS = 72  # of an SVG's unit in an inch


def drawings(results: Results, split: str) -> dict[str, list[Drawing]]:
    """By hook, one drawing for every cost and value: a line per arm through its L0s, bars for the seeds' deviation."""
    return {
        hook: [_drawing(results, split, number, hook, cost, kept) for kept in KEPT for cost in COSTS]
        for number, hook in enumerate(results.study.hooks)
    }


def _drawing(results: Results, split: str, number: int, hook: str, cost: str, kept: str) -> Drawing:
    arms = [arm.name for arm in results.study.arms]
    lines = {arm: _points(results, split, hook, arm, cost, kept) for arm in arms}
    lines = {arm: points for arm, points in lines.items() if points}

    def paint(axes: Axes) -> None:
        for arm, points in lines.items():
            place = arms.index(arm)
            colour = LIGHT[list(SERIES)[place % len(SERIES)]]
            style = LINE_STYLES[place // len(SERIES) % len(LINE_STYLES)]
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, color=colour, linestyle=style, marker="o", markersize=3.5, label=arm)
        if lines:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            if cost == "l0":
                axes.set_xticks(results.study.l0, labels=[str(l0) for l0 in results.study.l0])
            else:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.42 / HEIGHT), ncols=2, borderaxespad=0)
        axes.grid()
        axes.set_xlabel(COSTS[cost])
        axes.set_title(f"{KEPT[kept]}, {hook}")

    described = "; ".join(f"{arm}: {', '.join(f'{y:.3f} at {x:.4g}' for x, y, _ in p)}" for arm, p in lines.items())
    below = LINE_HEIGHT * ((len(arms) + 1) // 2)
    title = f"{KEPT[kept]} against {COSTS[cost]}"
    return draw(f"pareto-{number}-{kept}-{cost}", title, described or "no runs", Frame(HEIGHT, LEFT, below), paint)


def _points(
    results: Results, split: str, hook: str, arm: str, cost: str, kept: str
) -> list[tuple[float, float, float]]:
    """(cost, value, deviation) of an arm at every L0, by rising L0."""
    points = []
    for result in results.found:
        if (result.cell.arm, result.cell.hook) != (arm, hook):
            continue
        x, y = _cost(result, split, cost), result.spread(split, kept)
        if x is not None and y is not None and x > 0:
            points.append((result.cell.l0, (x, y.mean, y.sd or 0.0)))
    return [point for _, point in sorted(points)]


def _cost(result: Result, split: str, cost: str) -> float | None:
    if cost == "training_flops":
        per_row, rows = result.spread("flops_per_row"), result.spread("rows")
        return None if per_row is None or rows is None else per_row.mean * rows.mean
    found = result.spread(*((split, "l0") if cost == "l0" else (cost,)))
    return None if found is None else found.mean


def picture(results: Results, split: str) -> str:
    """One SVG file with all drawings: a row for every hook and value, a column for every cost."""
    made = drawings(results, split)
    below = LINE_HEIGHT * ((len(results.study.arms) + 1) // 2)
    width, height = WIDTH * POINTS, (TOP + HEIGHT + BOTTOM + below) * POINTS
    rows = [row for hook in made.values() for row in (hook[: len(COSTS)], hook[len(COSTS) :])]
    parts = []
    for y, row in enumerate(rows):
        for x, drawing in enumerate(row):
            inner = drawing.standalone[drawing.standalone.index("<svg ") :]
            parts.append(inner.replace("<svg ", f'<svg x="{x * width:g}" y="{y * height:g}" ', 1))
    size = f'width="{len(COSTS) * width:g}pt" height="{len(rows) * height:g}pt"'
    box = f'viewBox="0 0 {len(COSTS) * width:g} {len(rows) * height:g}"'
    parts = [part.replace('pt"', '"') for part in parts]  # nested elements are measured in the outer one's units
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} {box}>'
    return "\n".join([head, *parts, "</svg>", ""])


def page(results: Results, split: str) -> str:
    """The same as a page that needs nothing but itself and follows the reader's theme."""
    body = []
    for hook, made in drawings(results, split).items():
        figures = "\n".join(f"<figure>{drawing.inline}</figure>" for drawing in made)
        body.append(f"<h2>{escape(hook)}</h2>\n<div>\n{figures}\n</div>")
    name = escape(results.study.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Study {name}</title>
<style>
:root {{ {css_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(1)} }} }}
body {{ background: var(--bg); color: var(--ink); font-family: sans-serif; margin: 2rem; }}
div {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>Study {name}</h1>
<p>What an arm costs against what it keeps on {"validation" if split == "val" else "test"} documents: one point
for every L0, mean over seeds, bars of one standard deviation. Costs are on logarithmic axes.</p>
{chr(10).join(body)}
</body>
</html>
"""
