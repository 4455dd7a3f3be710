"""How our training step scales: rows per second and peak memory over P, k, (s, C), d and B.

    python benchmarks/scaling.py --out FOLDER [--seconds 270] [--steps 5]

Every curve changes one size of BASE, with the published losses. scaling.json is written after every point, and a point
that stands there is not measured again: the same command goes on after an interruption, or after `--seconds`. A point
that does not fit into memory is null with a `why`. Then scaling.html, one page with the curves, and scaling.md.
"""

import argparse
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from polytope_hsae.bench.measure import guarded
from polytope_hsae.bench.run import device_of, ours
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.fileio import read_json, write_json, write_text
from polytope_hsae.provenance import environment
from polytope_hsae.report.palette import LIGHT, css_variables
from polytope_hsae.report.svg import Frame, draw

BASE = {"P": 16_384, "C": 16, "s": 4, "k": 32, "d": 2_304, "B": 8_192}
SMALL = {"P": 64, "C": 4, "s": 4, "k": 4, "d": 32, "B": 64}  # for a CPU: it shows that the script runs
CURVES: dict[str, list[dict[str, int]]] = {
    "P": [{"P": 2**n} for n in range(8, 18)],
    "k": [{"k": 2**n} for n in range(8)],
    "s and C": [
        {"s": s, "C": C, "P": 2_048} for s, C in ((4, 16), (4, 64), (8, 16), (8, 64), (16, 16), (32, 16), (96, 32))
    ],
    "d": [{"d": d} for d in (256, 512, 768, 1_024, 2_304, 3_584, 4_608)],
    "B": [{"B": 2**n} for n in range(10, 17)],
}
SMALL_CURVES: dict[str, list[dict[str, int]]] = {
    "P": [{"P": 32}, {"P": 64}],
    "k": [{"k": 2}, {"k": 4}],
    "s and C": [{"s": 2, "C": 4}, {"s": 4, "C": 8}],
    "d": [{"d": 16}, {"d": 32}],
    "B": [{"B": 32}, {"B": 64}],
}
MEANINGS = {"P": "parents", "k": "active parents per row", "s and C": "subspace width and children per parent",
            "d": "width", "B": "rows of a batch"}  # fmt: skip


def shape_of(sizes: dict[str, int]) -> Shape:
    """The published config with these sizes."""
    P, C, s, k, d, B = (sizes[name] for name in BASE)
    fields = {"n_parents": P, "n_children_per_parent": C, "subspace_dim": s, "topk_parent": k}
    overrides = [f"hsae.{name}={value}" for name, value in fields.items()]
    return load_shape("jax-compat", [*overrides, f"training.batch_size={B}"])._replace(width=d)


def name_of(point: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in point.items())


def measured(sizes: dict[str, int], device: str, steps: int) -> dict[str, Any]:
    """One point: rows per second, ms and peak, or why there are none."""
    found = guarded(lambda: ours(shape_of(sizes), device, "uniform", steps, 2, by_part=False), device)
    if "why" not in found:
        found["rows_per_s"] = found["batch"] / found["ms"] * 1e3
    return {"sizes": sizes, **found}


def drawing(curve: str, points: list[dict[str, Any]], quantity: str, title: str) -> str:
    """One curve as an SVG element that follows the page's theme."""
    shown = [point for point in points if point.get(quantity) is not None]

    def paint(axes: Axes) -> None:
        grid = curve == "s and C"
        x = range(len(shown)) if grid else [point["sizes"][curve] for point in shown]
        axes.plot(x, [point[quantity] for point in shown], "o" if grid else "o-", color=LIGHT["s1"], markersize=4)
        plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plain)
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(plain if high / low < 10 else NullFormatter())
        if grid:
            axes.set_xticks(list(x), [f"{point['sizes']['s']}, {point['sizes']['C']}" for point in shown])
        else:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(plain)
        axes.grid()
        axes.set_xlabel(f"{curve}: {MEANINGS[curve]}")
        axes.set_title(title)

    said = "; ".join(f"{name_of(point['point'])}: {point[quantity]:,.4g}" for point in shown)
    name = f"{quantity}-{curve}".replace(" ", "-").replace("_", "-")
    return draw(name, f"{title} over {curve}", said, Frame(1.8, 0.85), paint).inline if shown else ""


def markdown(document: dict[str, Any]) -> str:
    base = name_of(document["base"])
    lines = [f"{document['environment']['device']}, torch {document['environment']['packages']['torch']}.", ""]
    lines += [f"Where nothing else is said: {base}; bf16 on a GPU, Gaussian rows, the losses of jax-compat.", ""]
    for curve, points in document["curves"].items():
        lines += ["| " + curve + " | ms | rows/s | peak GiB |", "| --- | --- | --- | --- |"]
        for point in points:
            peak = point.get("peak_gib")
            numbers = "- | - | " + point["why"] if "why" in point else (
                f"{point['ms']:.2f} | {point['rows_per_s']:,.0f} | {'-' if peak is None else f'{peak:.1f}'}"
            )  # fmt: skip
            lines.append(f"| {name_of(point['point'])} | {numbers} |")
        lines.append("")
    return "\n".join(lines)


def page(document: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    figures = []
    for curve, points in document["curves"].items():
        for quantity, title in (("rows_per_s", "rows per second"), ("peak_gib", "peak memory, GiB")):
            if svg := drawing(curve, points, quantity, title):
                figures.append(f"<figure>{svg}</figure>")
    style = f"""
:root {{ color-scheme: light dark; {css_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(1)} }} }}
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--bg);
color: var(--ink); }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} pre {{ overflow-x: auto; }}"""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>How a training step scales</title>'
        f"<style>{style}</style><h1>How a training step scales</h1>"
        f"<main>{''.join(figures)}</main><pre>{escape(markdown(document))}</pre></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=270, help="no point begins after this")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, began = device_of(options.device), time.monotonic()
    base, plan = (BASE, CURVES) if device == "cuda" else (SMALL, SMALL_CURVES)
    file = options.out / "scaling.json"
    curves = read_json(file)["curves"] if file.is_file() else {}
    torch.manual_seed(0)
    for curve, wanted in plan.items():
        points = curves.setdefault(curve, [])
        for point in wanted:
            sizes = base | point
            if any(one["sizes"] == sizes for one in points) or time.monotonic() - began > options.seconds:
                continue
            points.append({"point": point, **measured(sizes, device, options.steps)})
            print(f"{time.monotonic() - began:5.0f} s  {name_of(point)}: {points[-1].get('rows_per_s')}", flush=True)
            document = {"environment": environment(device), "base": base, "steps": options.steps, "curves": curves}
            write_json(file, document)
    if not file.is_file():
        sys.exit("no point was measured")
    document = read_json(file)
    write_text(options.out / "scaling.md", markdown(document))
    write_text(options.out / "scaling.html", page(document))
    missing = sum(map(len, plan.values())) - sum(map(len, curves.values()))
    print(f"{options.out / 'scaling.html'}" + f"; {missing} points left: run it again" * (missing > 0))


if __name__ == "__main__":
    main()
