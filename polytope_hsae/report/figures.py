"""The figures of a report: metrics of the arms, training curves, evidence beside its controls, use of the parents."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from .palette import LIGHT, LINE_STYLES, arm_styles
from .read import RunFiles
from .svg import Drawing, Frame, draw
from .words import METRICS, arm_title, number

INK, MUTED, LINE, BAND = (LIGHT[name] for name in ("ink", "muted", "line", "band"))
VARIANTS = {
    "main": ("concepts", "s1"),
    "pseudo_parents": ("pseudo-parents", "s3"),
    "shuffled_rows": ("shuffled rows", "s2"),
}
LETTER, LINE_HEIGHT = 0.072, 0.17  # inches: the widest letters of a label, a line of a legend
HEIGHT, LEFT = 1.7, 0.55
BINS = 48
Limits = tuple[float, float]
Band = tuple[float | None, float | None]
Floats = NDArray[np.float64]


def figures(run: RunFiles) -> dict[str, Drawing]:
    """All figures of a run by name; those without anything to show are left out."""
    drawn = [*arm_figures(run), *curve_figures(run), *evidence_figures(run), *usage_figure(run)]
    return {drawing.name: drawing for drawing in drawn}


def arm_figures(run: RunFiles) -> list[Drawing]:
    """A metric of every arm with its interval and the chance level."""
    styles = arm_styles(run.config)
    drawn = []
    for metric in ("ev", "purity", "leakage", "recall"):
        found = {arm: value for arm in run.arms if (value := run.metric(arm, metric)) is not None}
        if not found:
            continue
        title = METRICS[metric].name

        def paint(axes: Axes, metric: str = metric, found: dict[str, Any] = found, title: str = title) -> None:
            for row, (arm, value) in enumerate(found.items()):
                colour = LIGHT[styles[arm][0]]
                if value["ci95"] is not None:
                    axes.plot(value["ci95"], [row, row], color=colour, linewidth=3.5, solid_capstyle="round", alpha=0.4)
                axes.plot([value["value"]], [row], "o", color=colour, markersize=6)
                if metric != "ev" and value["chance"] is not None:
                    axes.plot([value["chance"]] * 2, [row - 0.5, row + 0.5], color=INK, linewidth=1, linestyle=":")
            axes.set_yticks(range(len(found)), [arm_title(arm) for arm in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
            if metric != "ev":
                axes.set_xlim(0, 1)
            axes.grid(axis="x")
            axes.set_xlabel(f"{title.lower()}, share")
            _names_at_left(axes)

        described = "; ".join(f"{arm_title(arm)} {number(value['value'])}" for arm, value in found.items())
        frame = Frame(0.3 * len(found), max(LETTER * len(arm) for arm in run.arms) + 0.1)
        drawn.append(draw(f"arms-{metric}", f"{title} of every arm", described, frame, paint))
    return drawn


def _names_at_left(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


CURVES = (
    ("val_ev", ("val_ev",), "Explained variance on validation rows", "explained variance, share"),
    ("loss", ("loss",), "Training loss", "loss per row (log scale)"),
    ("l0", ("active_parents_per_sample", "active_children_per_sample"), "Active latents", "latents in use per row"),
    ("dead", ("dead_parents",), "Dead parents in training", "dead parents, share"),
)


def curves(run: RunFiles, *names: str) -> dict[str, tuple[list[int], list[float]]]:
    """{arm: (steps, values)}; several names are added up (parents and children in use)."""
    found: dict[str, dict[int, float]] = {}
    for record in run.metrics:
        if record["name"] in names:
            steps = found.setdefault(record["arm"], {})
            steps[record["step"]] = steps.get(record["step"], 0.0) + record["value"]
    return {arm: (list(found[arm]), list(found[arm].values())) for arm in run.arms if arm in found}


def curve_figures(run: RunFiles) -> list[Drawing]:
    """Training curves of all arms over optimiser steps."""
    drawn = []
    for name, logged, title, label in CURVES:
        found = curves(run, *logged)
        if not any(value for _, values in found.values() for value in values):
            continue

        def paint(axes: Axes, name: str = name, found: dict[str, Any] = found, label: str = label) -> None:
            _lines(axes, run, found, marker="o" if name == "val_ev" else None)
            everything = [value for _, values in found.values() for value in values]
            if name == "loss" and min(everything) > 0:
                axes.set_yscale("log")
                _plain_numbers(axes)
            elif name in ("l0", "dead"):
                axes.set_ylim(-0.01 * max(everything), max(1.15 * max(everything), 0.1))
            axes.grid(axis="y")
            axes.set_xlabel("optimiser step")
            axes.set_title(label)

        described = "; ".join(f"{arm_title(arm)} ends at {number(values[-1])}" for arm, (_, values) in found.items())
        drawn.append(draw(f"curve-{name}", title, described, _frame_with_legend(len(found)), paint))
    return drawn


def _lines(axes: Axes, run: RunFiles, found: dict[str, Any], marker: str | None = None) -> None:
    """One line per arm, and the legend below the axes, where it covers nothing."""
    styles = arm_styles(run.config)
    for arm, (x, y) in found.items():
        colour, style = styles[arm]
        axes.plot(
            x, y, color=LIGHT[colour], linestyle=LINE_STYLES[style], marker=marker, markersize=3.5, label=arm_title(arm)
        )
    below = -0.42 / HEIGHT  # as a share of the axes, under the axis label
    handles, labels = axes.get_legend_handles_labels()
    row_by_row = [*range(0, len(labels), 2), *range(1, len(labels), 2)]  # of two columns, which are filled one by one
    axes.legend(
        [handles[place] for place in row_by_row],
        [labels[place] for place in row_by_row],
        loc="upper left",
        bbox_to_anchor=(-0.02, below),
        ncols=2,
        borderaxespad=0,
        columnspacing=1.5,
    )


def _frame_with_legend(entries: int) -> Frame:
    return Frame(HEIGHT, LEFT, LINE_HEIGHT * ((entries + 1) // 2))


def _plain_numbers(axes: Axes) -> None:
    """Numbers as 0.01 and 200 on a logarithmic y axis; the minor ones too where it spans less than a decade."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high / low < 10 else NullFormatter())


def evidence_figures(run: RunFiles) -> list[Drawing]:
    """Distributions of the real concepts' statistics above those of the controls."""
    angle_low, angle_high = run.target("median_angle_deg")["required"]
    plans: tuple[tuple[str, str, str, str, str, Band | None, Limits | None], ...] = (
        ("z", "parents", "z", "z of the shared direction", "z, deviations of the null", (3.0, None), None),
        ("angle", "children", "angle_deg", "Angle of the hierarchy", "angle, degrees", (angle_low, angle_high), None),
        ("beta", "children", "beta", "Orthogonality ratio", "β, ratio", (0.8, 1.25), (-1.0, 3.0)),
    )
    drawn = []
    for name, group, key, title, label, band, limits in plans:
        rows = {variant: _values(run, variant, group, key) for variant in VARIANTS}
        if len(rows["main"]):
            paint = _distribution(rows, label, band, limits)
            drawn.append(draw(f"evidence-{name}", title, describe(rows, limits), Frame(1.75, 1.1), paint))
    return drawn


def _values(run: RunFiles, variant: str, group: str, key: str) -> Floats:
    found = run.evidence[variant].get(group, {}).get(key, [])
    return np.array([value for value in found if value is not None], dtype=np.float64)


def describe(rows: dict[str, Floats], limits: Limits | None) -> str:
    """The medians in words, and how many values lie outside the axis."""
    parts = []
    for variant, values in rows.items():
        said = f"{VARIANTS[variant][0]}: "
        said += f"median {number(float(np.median(values)), 2)} of {len(values)}" if len(values) else "no values"
        if limits is not None and (outside := int(((values < limits[0]) | (values > limits[1])).sum())):
            said += f", {outside} outside the axis"
        parts.append(said)
    return "; ".join(parts)


def _distribution(
    rows: dict[str, Floats], label: str, band: Band | None, limits: Limits | None
) -> Callable[[Axes], None]:
    """One histogram per row on a common axis, with its median; the band is what counts as a hierarchy."""

    def paint(axes: Axes) -> None:
        everything = np.concatenate(list(rows.values()))
        low, high = limits or (float(everything.min()), float(everything.max()) + 1e-9)
        bins = np.linspace(low, high, BINS + 1)
        width = bins[1] - bins[0]
        if band is not None:
            start = low - width if band[0] is None else band[0]
            axes.axvspan(start, high + width if band[1] is None else band[1], color=BAND, linewidth=0)
        for row, (variant, values) in enumerate(rows.items()):
            colour = LIGHT[VARIANTS[variant][1]]
            axes.axhline(row, color=LINE, linewidth=0.8)
            said = f"n = {len(values)}" if len(values) else "no values"
            axes.text(0.995, row - 0.7, said, color=MUTED, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
            if not len(values):
                continue
            counts, _ = np.histogram(values, bins)
            heights = 0.75 * counts / max(counts.max(), 1)
            axes.stairs(row - heights, bins, baseline=row, color=colour, fill=True, linewidth=0)
            median = float(np.median(values))
            axes.plot([median, median], [row, row - 0.88], color=INK, linewidth=1.2)
        axes.set_yticks([row - 0.3 for row in range(len(rows))], [VARIANTS[variant][0] for variant in rows])
        axes.set_ylim(len(rows) - 0.95, -1.0)
        axes.set_xlim(low - width, high + width)
        axes.set_xlabel(label)
        _names_at_left(axes)

    return paint


def usage_figure(run: RunFiles) -> list[Drawing]:
    """Share of rows on which each parent is active, most used first; none where nothing is active."""
    usage = {}
    for arm in run.arms:
        used = sorted((share for share in run.latents["arms"][arm]["usage"] if share > 0), reverse=True)
        if used:
            usage[arm] = (np.arange(1, len(used) + 1), used)
    if not usage:
        return []

    def paint(axes: Axes) -> None:
        _lines(axes, run, usage)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _plain_numbers(axes)
        axes.grid()
        axes.set_xlabel("place, most used first (log scale)")
        axes.set_title("share of rows (log scale)")

    described = "; ".join(
        f"{arm_title(arm)}: median {number(float(np.median(used)), 4)} of {len(used)} in use"
        for arm, (_, used) in usage.items()
    )
    return [draw("usage", "Use of the parents", described, _frame_with_legend(len(usage)), paint)]
