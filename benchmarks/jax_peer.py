"""Our training step beside the published model's in JAX, timed in one run.

    python benchmarks/jax_peer.py --out FOLDER [--shape jax-compat] [--steps 10] [--device auto] [--set key=value]

JAX always computes the published losses. Writes jax_peer.json and jax_peer.md. Needs jax, equinox and optax.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polytope_hsae.bench.measure import free_memory, guarded
from polytope_hsae.bench.run import ROUTINGS, device_of, ours
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.bench.table import machine, table, write
from polytope_hsae.provenance import environment

STEP_SECONDS, JAX_SECONDS = 5, 200  # no step begins after the first; the process of JAX ends after the second
HEAD = ("what", "routing", "rows of a batch", "ms", "rows/s", "peak GiB", "ours is faster by")


def jax_records(shape: Shape, device: str, steps: int, limit: float) -> dict[str, dict[str, Any]]:
    """JAX's times by routing, or `why` there are none. limit: seconds that its process may take."""
    hsae, training = shape.hsae, shape.training
    config = {
        "d": shape.width, "P": hsae.n_parents, "C": hsae.n_children_per_parent, "s": hsae.subspace_dim,
        "k": hsae.topk_parent, "B": training.batch_size, "peak_lr": training.lr,
    }  # fmt: skip
    asked = json.dumps({"config": config, "routings": ROUTINGS, "steps": steps, "seconds": STEP_SECONDS})
    command = [sys.executable, str(Path(__file__).with_name("jax_step.py")), asked]
    platform = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, env={**os.environ, **platform}, capture_output=True, text=True, timeout=limit)
        text, why = done.stdout, f"JAX failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    except subprocess.TimeoutExpired as late:
        text, why = (late.stdout or b"").decode(), f"not finished within {limit} s"  # type: ignore[union-attr]
    found: dict[str, dict[str, Any]] = {routing: {"why": why} for routing in ROUTINGS}
    for line in text.splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    return found


def cells(one: dict[str, Any], ours_rate: float | None) -> list[str]:
    """A row of the table."""
    if "why" in one:
        return [one["what"], one["routing"], one["why"], *["-"] * 4]
    rate, peak = one["batch"] / one["ms"] * 1e3, one["peak_gib"]
    numbers = f"{one['batch']:,}", f"{one['ms']:.2f}", f"{rate:,.0f}", "-" if peak is None else f"{peak:.1f}"
    return [one["what"], one["routing"], *numbers, "-" if ours_rate is None else f"{ours_rate / rate:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="jax-compat")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    device, shape = device_of(options.device), load_shape(options.shape, options.overrides)
    mine = {
        routing: guarded(partial(ours, shape, device, routing, options.steps, STEP_SECONDS), device)
        for routing in ROUTINGS
    }
    free_memory(device)
    theirs = jax_records(shape, device, options.steps, JAX_SECONDS)
    measured, rows = [], []
    for routing in ROUTINGS:
        found = mine[routing]
        rate = None if "why" in found else found["batch"] / found["ms"] * 1e3
        for what, record in ((f"ours, {shape.precision(device)}", found), ("JAX", theirs[routing])):
            measured.append({"what": what, "routing": routing, **record})
            rows.append(cells(measured[-1], rate))
    here = {**environment(device), "jax": version("jax")}
    text = "\n".join([f"{shape.name}.", "", *table(HEAD, rows), machine(here), ""])
    write(options.out, "jax_peer", {"environment": here, **shape.record(), "measured": measured}, text)
    print(text)


if __name__ == "__main__":
    main()
