"""The JAX H-SAE's training step, measured in a process of its own: `measure` starts it, `main` is what runs there.

In JAX's own way: float32 arrays, products in its default precision (TF32 on a GPU), one compiled step whose buffers are
donated. The published code's losses, whatever the shape's own are.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from .shapes import Shape

NEEDS = ("jax", "equinox", "optax")
WARM_UP, MOST_MS = 2, 5_000  # steps that are not counted; no step begins after the counted ones took this


def measure(shape: Shape, routings: list[str], device: str, steps: int, limit: float) -> dict[str, dict[str, Any]]:
    """{routing: times and peak, or why there are none}. `limit`: seconds that the process may take in all."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return {routing: {"why": f"{', '.join(missing)} not installed"} for routing in routings}
    hsae, training = shape.hsae, shape.training
    asked = {
        "config": {
            "d": shape.width, "P": hsae.n_parents, "C": hsae.n_children_per_parent, "s": hsae.subspace_dim,
            "k": hsae.topk_parent, "B": training.batch_size, "peak_lr": training.lr,
        },
        "routings": routings,
        "steps": steps,
    }  # fmt: skip
    platform = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    found: dict[str, dict[str, Any]] = {}
    why = f"not finished within {limit:.0f} s"
    try:
        done = subprocess.run(
            command, env={**os.environ, **platform}, capture_output=True, text=True, timeout=limit, check=False
        )
        text, why = done.stdout, f"JAX failed: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    for line in text.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return {routing: found.get(routing, {"why": why}) for routing in routings}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "without a word"


def main(asked: dict[str, Any]) -> None:
    """Print one line of JSON for each routing. The batch is halved until it fits into memory."""
    import jax

    from .jax_hsae import Config

    config = Config(**asked["config"])
    batch = config.B
    for routing in asked["routings"]:
        while True:
            try:
                found = _measure(config, batch, routing, asked["steps"])
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or batch < 64:
                    raise
                batch //= 2
        print(json.dumps({routing: found}), flush=True)


def _measure(config: Any, batch: int, routing: str, steps: int) -> dict[str, Any]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from . import jax_hsae

    model = jax_hsae.init(config, "float32")
    rows = _rows(model, batch, routing)
    adam = jax_hsae.optimizer(config)
    state = adam.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(h: Any, model: Any, state: Any) -> Any:
        return jax_hsae.update(adam, model, state, jax_hsae.unit_rows(h), 1.0)[:3]

    @eqx.filter_jit
    def load(h: Any, model: Any) -> Any:
        logits = jax_hsae.unit_rows(h) @ model.top_level_autoencoder.encoder.T
        parents = jax.lax.top_k(jnp.where(logits >= model.threshold, logits, 0), config.k)[1]
        return jnp.bincount(parents.ravel(), length=config.P).max() / batch

    largest = float(load(rows, model))
    times: list[float] = []
    while len(times) < steps + WARM_UP and sum(times[WARM_UP:]) < MOST_MS:
        began = time.perf_counter()
        model, state, numbers = step(rows, model, state)
        jax.block_until_ready((model, state, numbers))
        times.append(1e3 * (time.perf_counter() - began))
    times = times[WARM_UP:]
    memory = jax.devices()[0].memory_stats() or {}
    peak = memory.get("peak_bytes_in_use")
    return {
        "ms": median(times),
        "steps": len(times),
        "batch": batch,
        "peak_gib": None if peak is None else peak / 2**30,
        "max_firing_rate": largest,
    }


def _rows(model: Any, batch: int, routing: str) -> Any:
    """As bench.measure.make_rows, one batch."""
    import jax
    import jax.numpy as jnp

    E = model.top_level_autoencoder.encoder
    noise_key, rank_key, gumbel_key = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(noise_key, (batch, E.shape[1]))
    if routing == "uniform":
        return rows
    E = E / jnp.linalg.norm(E, axis=1, keepdims=True)
    weight = jax.random.permutation(rank_key, 1 / jnp.arange(1, len(E) + 1))
    sums = []
    for start in range(0, batch, 1024):
        size = min(1024, batch - start)
        gumbel = jax.random.gumbel(jax.random.fold_in(gumbel_key, start), (size, len(E)))
        picked = jax.lax.top_k(gumbel + jnp.log(weight), model.k)[1]
        chosen = jnp.zeros((size, len(E))).at[jnp.arange(size)[:, None], picked].set(1)
        sums.append(chosen @ E)
    return 0.02 * rows + jnp.concatenate(sums)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
