"""Our training step beside the published model's in JAX, timed in one run on Gaussian rows.

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
from polytope_hsae.bench.run import device_of, ours
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.bench.table import machine, table, write
from polytope_hsae.provenance import environment

STEP_SECONDS, JAX_SECONDS = 5, 200  # no step begins after the first; the process of JAX ends after the second


def jax_record(shape: Shape, device: str, steps: int, limit: float) -> dict[str, Any]:
    """JAX's times, or `why` there are none. limit: seconds that its process may take."""
    hsae, training = shape.hsae, shape.training
    config = {
        "d": shape.width, "P": hsae.n_parents, "C": hsae.n_children_per_parent, "s": hsae.subspace_dim,
        "k": hsae.topk_parent, "B": training.batch_size, "peak_lr": training.lr,
    }  # fmt: skip
    asked = json.dumps({"config": config, "steps": steps, "seconds": STEP_SECONDS})
    command = [sys.executable, str(Path(__file__).with_name("jax_step.py")), asked]
    platform = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, env={**os.environ, **platform}, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"why": f"not finished within {limit} s"}
    if done.returncode:
        return {"why": f"JAX failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def rows_per_s(record: dict[str, Any]) -> float:
    """nan where there is no time."""
    return record["batch"] / record["ms"] * 1e3 if "ms" in record else float("nan")


def cells(what: str, one: dict[str, Any]) -> list[str]:
    if "why" in one:
        return [what, one["why"], *["-"] * 3]
    peak = "-" if one["peak_gib"] is None else f"{one['peak_gib']:.1f}"
    return [what, f"{one['batch']:,}", f"{one['ms']:.2f}", f"{rows_per_s(one):,.0f}", peak]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="jax-compat")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    device, shape = device_of(options.device), load_shape(options.shape, options.overrides)
    found = guarded(partial(ours, shape, device, "uniform", options.steps, STEP_SECONDS), device)
    free_memory(device)
    measured = {f"ours, {shape.precision(device)}": found, "JAX": jax_record(shape, device, options.steps, JAX_SECONDS)}
    here = {**environment(device), "jax": version("jax")}
    rows = [cells(what, record) for what, record in measured.items()]
    lines = [f"{shape.name}.", "", *table(("what", "rows of a batch", "ms", "rows/s", "peak GiB"), rows)]
    ratio = rows_per_s(found) / rows_per_s(measured["JAX"])
    text = "\n".join([*lines, f"Rows per second, ours / JAX: {ratio:.2f}.", "", machine(here), ""])
    write(options.out, "jax_peer", {"environment": here, **shape.record(), "measured": measured}, text)
    print(text)


if __name__ == "__main__":
    main()
