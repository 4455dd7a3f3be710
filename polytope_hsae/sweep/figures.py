"""The figures of a sweep's page: what an arm costs against what it keeps; targets by hook and seed; the evidence."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ..geometry.controls import CONTROLS
from ..report.palette import LIGHT, LINE_STYLES, SERIES
from ..report.svg import Drawing, Frame, draw
from ..report.words import TARGETS, number
from .summary import TOGETHER, Result, Results, difference, mean, named, variants

HEIGHT, LEFT, LINE_HEIGHT = 2.2, 0.6, 0.17
LOWEST = -3.0  # points of EV below the best flat arm that are shown
ROW, LETTER = 0.19, 0.063  # inches: a row's height, and the width of a letter of its name
VERDICTS = {"PASS": "s4", "FAIL": "s3", "INCONCLUSIVE": "s2"}


def drawings(results: Results) -> list[Drawing]:
    """All figures, in the order of the page."""
    name = results.sweep.name
    if results.sweep.world is not None:
        return []
    if any(plan.teacher for plan in results.sweep.hooks):
        return [*(_target(results, target) for target in TOGETHER), *_evidence(results)]
    made = []
    for place, hook in enumerate(results.shown_hooks):
        if results.sweep.l0:
            made.append(_lead(results, f"{name}-{place}-lead", hook))
        made.append(_cost(results, f"{name}-{place}-cost", hook))
    return made


Points = list[tuple[float, float, float]]  # (x, y, deviation of y)


def _lead(results: Results, name: str, hook: str) -> Drawing:
    """EV of every arm minus that of the best flat one of the same L0, whatever their sizes, against L0."""
    lines: dict[str, Points] = {}
    for l0 in results.sweep.l0s:
        found = results.at(hook, l0)
        flat = [result for result in found if result.kind != "hsae" and result.metric("ev")]
        if not flat:
            continue
        best = max(flat, key=lambda result: mean(result.metric("ev")))
        for result in found:
            gap = difference(result, best, result.split, "metrics", "ev")
            if gap is not None:
                lines.setdefault(result.cell.arm, []).append((l0 or 0, 100 * gap.mean, 100 * (gap.sd or 0.0)))
    title = f"EV, points from the best flat arm (from {LOWEST:g} up): {_short(hook)}"
    return _lines(results, name, title, "L0, active latents a row", lines, lowest=LOWEST)


def _cost(results: Results, name: str, hook: str) -> Drawing:
    """EV against training FLOPs, a point for every L0."""
    lines: dict[str, Points] = {}
    for l0 in results.sweep.l0s:
        for result in results.at(hook, l0):
            x, y = result.spread("flops_per_row"), result.metric("ev")
            if x is not None and y is not None:
                lines.setdefault(result.cell.arm, []).append((x.mean, y.mean, y.sd or 0.0))
    return _lines(results, name, f"EV: {_short(hook)}", "training FLOPs a row", lines)


def _lines(
    results: Results, name: str, title: str, x_label: str, lines: dict[str, Points], lowest: float | None = None
) -> Drawing:
    """A line per arm; bars are standard deviations over seeds; what lies below `lowest` is cut off."""
    arms = [arm.name for arm in results.sweep.arms]

    def paint(axes: Axes) -> None:
        for arm, points in lines.items():
            place = arms.index(arm)
            colour = LIGHT[list(SERIES)[place % len(SERIES)]]
            style = LINE_STYLES[place // len(SERIES) % len(LINE_STYLES)]
            x, y, error = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3.5, label=arm)
            axes.errorbar(x, y, yerr=error, color=colour, linestyle="none")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        if lowest is None:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.set_xticks(results.sweep.l0, labels=[str(l0) for l0 in results.sweep.l0])
            axes.set_ylim(bottom=max(lowest, axes.get_ylim()[0]))
        if lines:
            corner = (-0.02, -0.42 / HEIGHT)
            axes.legend(loc="upper left", bbox_to_anchor=corner, ncols=2, borderaxespad=0, handlelength=3.5)
        axes.grid()
        axes.set_xlabel(x_label)
        axes.set_title(title)

    said = "; ".join(f"{arm}: {', '.join(f'{y:.3f} at {x:.4g}' for x, y, _ in p)}" for arm, p in lines.items())
    frame = Frame(HEIGHT, LEFT, LINE_HEIGHT * ((len(arms) + 1) // 2))
    return draw(name, title, said or "no runs", frame, paint)


def _target(results: Results, name: str) -> Drawing:
    """A row for every hook and arm: ticks are seeds, the dot and its bar are the value over seeds."""
    words = TARGETS[name]
    rows, required = [], [None, None]
    for hook in results.shown_hooks:
        plan = results.sweep.plan(hook)
        for found in (results.arm(hook, plan.teacher), results.arm(hook, plan.control)):
            if found is None:
                continue
            over = named(results.targets(found, list(found.records)), name)
            if over["measured"] is not None:
                rows.append((f"{_short(hook)}: {found.cell.arm}", over, _by_seed(results, found, name)))
                required = over["required"]

    def paint(axes: Axes) -> None:
        for y, (_, over, by_seed) in enumerate(rows):
            colour = LIGHT[VERDICTS[over["verdict"]]]
            axes.plot([value * words.factor for value in by_seed], [y] * len(by_seed), "|", color=LIGHT["muted"], ms=8)
            if over["ci95"] is not None:
                axes.plot([bound * words.factor for bound in over["ci95"]], [y, y], color=colour, linewidth=2)
            axes.plot([over["measured"] * words.factor], [y], "o", color=colour, markersize=4.5)
        for bound in required:
            if bound is not None:
                axes.axvline(bound * words.factor, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (4, 2)))
        _name_rows(axes, [row for row, *_ in rows])
        axes.set_xlabel(f"{words.within},{words.unit or ' degrees'}")

    said = "; ".join(f"{row}: {number(over['measured'] * words.factor, 1)} {over['verdict']}" for row, over, _ in rows)
    figure = f"{results.sweep.name}-target-{name}"
    return draw(figure, words.name, said or "no values", _frame([row for row, *_ in rows]), paint)


def _by_seed(results: Results, found: Result, name: str) -> list[float]:
    values = [named(results.targets(found, [seed]), name)["measured"] for seed in found.records]
    return [value for value in values if value is not None]


def _evidence(results: Results) -> list[Drawing]:
    """One dot per parent: z of the direction that its children share, for the hierarchy, controls and other metrics."""
    of_hook = [variants(results.evidence(hook)) for hook in results.shown_hooks]
    rows: dict[str, list[float]] = {}
    for blocks in of_hook:
        with_z = {name: block["parents"]["z"] for name, block in blocks.items() if "z" in (block.get("parents") or {})}
        if len(with_z) > len(rows):
            rows = {name: [z for z in values if z is not None] for name, values in with_z.items()}
    if not rows:
        return []

    def paint(axes: Axes) -> None:
        for y, (name, values) in enumerate(rows.items()):
            colour = LIGHT["s3" if name in CONTROLS else "s1"]
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        axes.axvline(3, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (4, 2)))
        _name_rows(axes, [name.replace("_", " ") for name in rows])
        axes.set_xlabel("z of the direction that a parent's children share")

    said = "; ".join(f"{name}: {sum(z > 3 for z in values)} of {len(values)} above 3" for name, values in rows.items())
    name = f"{results.sweep.name}-evidence-z"
    return [draw(name, "Do children of a parent share a direction?", said, _frame(list(rows)), paint)]


def _short(hook: str) -> str:
    return hook.removesuffix("_pre_unembed").replace("_", " ")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _frame(names: Sequence[str]) -> Frame:
    return Frame(max(1, len(names)) * ROW + 0.1, 0.2 + LETTER * max(map(len, names), default=0))
