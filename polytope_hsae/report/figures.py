"""The figures of a report: metrics of the arms, training curves, evidence beside its controls, firing rates."""

from typing import Any, NamedTuple

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
Floats = NDArray[np.float64]
Series = dict[str, tuple[Any, Any]]  # by arm: x and y
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


# name of the figure, what training logged (several are added up), title, label
CURVES = (
    ("val_ev", ("val_ev",), "Explained variance on validation rows", "explained variance"),
    ("loss", ("loss",), "Training loss", "loss per row (log scale)"),
    ("l0", ("active_parents_per_sample", "active_children_per_sample"), "L0", "L0, parents and children"),
    ("dead", ("dead_parents",), "Dead parents in training", "dead parents, share"),
)


class Distribution(NamedTuple):
    """A figure of one statistic of evidence.json; `band` is shaded, `limits` cut the axis."""

    name: str
    group: str
    key: str
    title: str
    label: str
    band: tuple[float, float]
    limits: tuple[float, float] | None = None


def figures(run: RunFiles) -> dict[str, Drawing]:
    """All figures of a run by name; those without anything to show are left out."""
    low, high = run.target("median_angle_deg")["required"]
    distributions = (
        Distribution("z", "parents", "z", "z of the shared direction", "z", (3.0, np.inf)),
        Distribution("angle", "children", "angle_deg", "Hierarchy angle", "angle, degrees", (low, high)),
        Distribution("beta", "children", "beta", "Orthogonality ratio β", "β", (0.8, 1.25), (-1.0, 3.0)),
    )
    drawn = [
        *(_metric(run, metric) for metric in ("ev", "purity", "leakage", "recall")),
        *(_curve(run, *curve) for curve in CURVES),
        *(_distribution(run, plan) for plan in distributions),
        _firing_rates(run),
    ]
    return {drawing.name: drawing for drawing in drawn if drawing is not None}


def _metric(run: RunFiles, metric: str) -> Drawing | None:
    """A metric of every arm with its interval and the chance level."""
    styles = arm_styles(run.config)
    found = {arm: value for arm in run.arms if (value := run.metric(arm, metric)) is not None}
    if not found:
        return None
    title = METRICS[metric].name

    def paint(axes: Axes) -> None:
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
        axes.set_xlabel(title.lower())
        _names_at_left(axes)

    described = "; ".join(f"{arm_title(arm)} {number(value['value'])}" for arm, value in found.items())
    frame = Frame(0.3 * len(found), max(LETTER * len(arm) for arm in run.arms) + 0.1)
    return draw(f"arms-{metric}", f"{title} of every arm", described, frame, paint)


def _names_at_left(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def curves(run: RunFiles, *names: str) -> Series:
    """{arm: (steps, values)}; several names are added up (parents and children)."""
    found: dict[str, dict[int, float]] = {}
    for record in run.metrics:
        if record["name"] in names:
            steps = found.setdefault(record["arm"], {})
            steps[record["step"]] = steps.get(record["step"], 0.0) + record["value"]
    return {arm: (list(found[arm]), list(found[arm].values())) for arm in run.arms if arm in found}


def _curve(run: RunFiles, name: str, logged: tuple[str, ...], title: str, label: str) -> Drawing | None:
    """A training curve of all arms over optimiser steps."""
    found = curves(run, *logged)
    everything = [value for _, values in found.values() for value in values]
    if not any(everything):
        return None

    def paint(axes: Axes) -> None:
        _lines(axes, run, found, marker="o" if name == "val_ev" else None)
        if name == "loss" and min(everything) > 0:
            axes.set_yscale("log")
            _plain_numbers(axes)
        elif name in ("l0", "dead"):
            axes.set_ylim(-0.01 * max(everything), max(1.15 * max(everything), 0.1))
        axes.grid(axis="y")
        axes.set_xlabel("optimiser step")
        axes.set_title(label)

    described = "; ".join(f"{arm_title(arm)} ends at {number(values[-1])}" for arm, (_, values) in found.items())
    return draw(f"curve-{name}", title, described, _frame_with_legend(len(found)), paint)


def _firing_rates(run: RunFiles) -> Drawing | None:
    """Firing rate of every parent, the highest first; None where none fires."""
    rates: Series = {}
    for arm in run.arms:
        positive = sorted((rate for rate in run.latents["arms"][arm]["usage"] if rate > 0), reverse=True)
        if positive:
            rates[arm] = (np.arange(1, len(positive) + 1), positive)
    if not rates:
        return None

    def paint(axes: Axes) -> None:
        _lines(axes, run, rates)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(PLAIN)
        _plain_numbers(axes)
        axes.grid()
        axes.set_xlabel("rank (log scale)")
        axes.set_title("firing rate (log scale)")

    described = "; ".join(
        f"{arm_title(arm)}: median {number(float(np.median(positive)), 4)} of {len(positive)} that fire"
        for arm, (_, positive) in rates.items()
    )
    return draw("usage", "Firing rates of the parents", described, _frame_with_legend(len(rates)), paint)


def _lines(axes: Axes, run: RunFiles, found: Series, marker: str | None = None) -> None:
    """One line per arm, and the legend below the axes, where it covers nothing."""
    styles = arm_styles(run.config)
    for arm, (x, y) in found.items():
        colour, style = LIGHT[styles[arm][0]], LINE_STYLES[styles[arm][1]]
        axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=3.5, label=arm_title(arm))
    handles, labels = axes.get_legend_handles_labels()
    row_by_row = [*range(0, len(labels), 2), *range(1, len(labels), 2)]  # of two columns, which are filled one by one
    axes.legend(
        [handles[place] for place in row_by_row],
        [labels[place] for place in row_by_row],
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.42 / HEIGHT),  # as shares of the axes, under the axis label
        ncols=2,
        borderaxespad=0,
        columnspacing=1.5,
    )


def _frame_with_legend(entries: int) -> Frame:
    return Frame(HEIGHT, LEFT, LINE_HEIGHT * ((entries + 1) // 2))


def _plain_numbers(axes: Axes) -> None:
    """Numbers as 0.01 and 200 on a logarithmic y axis; the minor ones too where it spans less than a decade."""
    axes.yaxis.set_major_formatter(PLAIN)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(PLAIN if high / low < 10 else NullFormatter())


def _distribution(run: RunFiles, plan: Distribution) -> Drawing | None:
    """Histograms of the real concepts' statistic and of the controls' on one axis, each with its median."""
    rows = {variant: _values(run, variant, plan) for variant in VARIANTS}
    if not len(rows["main"]):
        return None

    def paint(axes: Axes) -> None:
        everything = np.concatenate(list(rows.values()))
        low, high = plan.limits or (float(everything.min()), float(everything.max()) + 1e-9)
        bins = np.linspace(low, high, BINS + 1)
        width = bins[1] - bins[0]
        axes.axvspan(plan.band[0], min(plan.band[1], high + width), color=BAND, linewidth=0)
        for row, (variant, values) in enumerate(rows.items()):
            axes.axhline(row, color=LINE, linewidth=0.8)
            said = f"n = {len(values)}" if len(values) else "no values"
            axes.text(0.995, row - 0.7, said, color=MUTED, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
            if not len(values):
                continue
            counts, _ = np.histogram(values, bins)
            heights = 0.75 * counts / max(counts.max(), 1)
            axes.stairs(row - heights, bins, baseline=row, color=LIGHT[VARIANTS[variant][1]], fill=True, linewidth=0)
            median = float(np.median(values))
            axes.plot([median, median], [row, row - 0.88], color=INK, linewidth=1.2)
        axes.set_yticks([row - 0.3 for row in range(len(rows))], [VARIANTS[variant][0] for variant in rows])
        axes.set_ylim(len(rows) - 0.95, -1.0)
        axes.set_xlim(low - width, high + width)
        axes.set_xlabel(plan.label)
        _names_at_left(axes)

    described = "; ".join(_described(VARIANTS[variant][0], values, plan) for variant, values in rows.items())
    return draw(f"evidence-{plan.name}", plan.title, described, Frame(1.75, 1.1), paint)


def _values(run: RunFiles, variant: str, plan: Distribution) -> Floats:
    found = run.evidence[variant].get(plan.group, {}).get(plan.key, [])
    return np.array([value for value in found if value is not None], dtype=np.float64)


def _described(name: str, values: Floats, plan: Distribution) -> str:
    """The median in words, and how many values lie outside the axis."""
    if not len(values):
        return f"{name}: no values"
    low, high = plan.limits or (-np.inf, np.inf)
    outside = int(((values < low) | (values > high)).sum())
    said = f"{name}: median {number(float(np.median(values)), 2)} of {len(values)}"
    return f"{said}, {outside} outside the axis" if outside else said
