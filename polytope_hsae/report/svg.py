"""One pair of axes as SVG: the same input gives the same bytes, without a date, with words for screen readers."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .palette import LIGHT, themed

WIDTH, TOP, BOTTOM, RIGHT = 4.6, 0.28, 0.46, 0.12  # inches of 72 units each; the page scales the whole
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["muted"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.transparent": True,
}


class Drawing(NamedTuple):
    """`standalone`: a whole SVG file. `inline`: the element for the page, which follows its theme."""

    name: str
    standalone: str
    inline: str


class Frame(NamedTuple):
    """Height of the axes, and room to their left and below their labels (for a legend); inches."""

    height: float
    left: float
    below: float = 0.0


def draw(name: str, title: str, description: str, frame: Frame, paint: Callable[[Axes], None]) -> Drawing:
    """What `paint` does to one pair of axes, as a drawing with a title and a description."""
    total = TOP + frame.height + BOTTOM + frame.below
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, total))
        # Fixed margins: a layout engine would draw everything twice.
        width = WIDTH - frame.left - RIGHT
        place = (frame.left / WIDTH, (BOTTOM + frame.below) / total, width / WIDTH, frame.height / total)
        paint(figure.add_axes(place))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Drawing(name, *_labelled(buffer.getvalue(), name, title, description))


def _labelled(svg: str, name: str, title: str, description: str) -> tuple[str, str]:
    """(file, element): both with title and description, and with ids that no other figure has."""
    svg = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    words = f"<title>{escape(title)}</title>\n <desc>{escape(description)}</desc>\n <defs>"
    svg = svg.replace("<defs>", words, 1).replace("<svg ", '<svg role="img" ', 1)
    element = svg[svg.index("<svg ") :]
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)  # it would style the whole page
    return svg, themed(element.replace("font-family: sans-serif; ", ""))
