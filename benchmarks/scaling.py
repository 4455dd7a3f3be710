"""How our training step scales: rows per second and peak memory over P, k, (s, C), d and B.

    python benchmarks/scaling.py --out FOLDER [--seconds 270] [--steps 5]

Every curve changes one size of BASE, with the published losses. scaling.json and scaling.md are written after every
point, and a point in them is not measured again, so the same command continues after an interruption or after
`--seconds`. A point that does not fit into memory has a `why` and no numbers.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polytope_hsae.bench.measure import guarded
from polytope_hsae.bench.run import device_of, ours
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.bench.table import machine, table, write
from polytope_hsae.fileio import read_json
from polytope_hsae.provenance import environment

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
SMALL_CURVES = {name: [{n: SMALL[n] // 2 for n in name.split(" and ")}] for name in CURVES}


def shape_of(sizes: dict[str, int]) -> Shape:
    """The published config with these sizes."""
    P, C, s, k, d, B = (sizes[name] for name in BASE)
    fields = {"n_parents": P, "n_children_per_parent": C, "subspace_dim": s, "topk_parent": k}
    overrides = [f"hsae.{name}={value}" for name, value in fields.items()]
    return load_shape("jax-compat", [*overrides, f"training.batch_size={B}"])._replace(width=d)


def cells(point: dict[str, Any]) -> list[str]:
    name = ", ".join(f"{letter} {value:,}" for letter, value in point["point"].items())
    if "why" in point:
        return [name, "-", "-", point["why"]]
    peak = "-" if point["peak_gib"] is None else f"{point['peak_gib']:.1f}"
    return [name, f"{point['ms']:.2f}", f"{point['batch'] / point['ms'] * 1e3:,.0f}", peak]


def save(folder: Path, document: dict[str, Any]) -> None:
    base = ", ".join(f"{name} {value:,}" for name, value in document["base"].items())
    lines = [machine(document["environment"]), "", f"Unless a row says otherwise: {base}; Gaussian rows.", ""]
    for curve, points in document["curves"].items():
        lines += table((curve, "ms", "rows/s", "peak GiB"), [cells(point) for point in points])
    write(folder, "scaling", document, "\n".join(lines))


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
    document = {"environment": environment(device), "base": base, "steps": options.steps, "curves": curves}
    torch.manual_seed(0)
    left = 0
    for curve, wanted in plan.items():
        points = curves.setdefault(curve, [])
        for point in wanted:
            sizes = base | point
            if any(one["sizes"] == sizes for one in points):
                continue
            if time.monotonic() - began > options.seconds:
                left += 1
                continue
            found = guarded(partial(ours, shape_of(sizes), device, "uniform", options.steps, 2), device)
            points.append({"point": point, "sizes": sizes, **found})
            save(options.out, document)
            print(f"{time.monotonic() - began:5.0f} s  {curve}: {' | '.join(cells(points[-1]))}", flush=True)
    print(f"{left} points left: run it again" if left else f"{options.out / 'scaling.md'}")


if __name__ == "__main__":
    main()
