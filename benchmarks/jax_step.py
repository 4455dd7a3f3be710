"""The training step of the published model in JAX, timed; benchmarks/jax_peer.py starts this in a process of its own.

In JAX's own way: float32 arrays, products in its default precision (TF32 on a GPU), one compiled step whose buffers are
donated. Prints one line of JSON for each routing, at the largest half, quarter, ... of the batch that fits into memory.
"""

import json
import sys
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax_hsae


def timed(config: jax_hsae.Config, batch: int, routing: str, steps: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step on `batch` rows, and the peak of the GPU's memory in GiB."""
    model = jax_hsae.init(config, "float32")
    rows = make_rows(model, batch, routing)
    adam = jax_hsae.optimizer(config)
    state = adam.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(h: Any, model: Any, state: Any) -> Any:
        return jax_hsae.update(adam, model, state, jax_hsae.unit_rows(h), 1.0)[:3]

    def work() -> None:
        nonlocal model, state
        model, state, _ = jax.block_until_ready(step(rows, model, state))

    from polytope_hsae.bench.measure import times  # brings PyTorch, after JAX has loaded its own CUDA libraries

    found = times(work, "cpu", steps, warm_up=2, seconds=seconds)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"ms": median(found), "steps": len(found), "batch": batch, "peak_gib": peak and peak / 2**30}


def make_rows(model: Any, batch: int, routing: str) -> Any:
    """One batch, as bench.measure.make_rows draws it."""
    E = model.top_level_autoencoder.encoder
    noise_key, rank_key, gumbel_key = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(noise_key, (batch, E.shape[1]))
    if routing == "uniform":
        return rows
    E = jax_hsae.of_unit_norm(E, 1)
    weight = jax.random.permutation(rank_key, 1 / jnp.arange(1, len(E) + 1))
    sums = []
    for start in range(0, batch, 1024):
        gumbel = jax.random.gumbel(jax.random.fold_in(gumbel_key, start), (min(1024, batch - start), len(E)))
        sums.append(E[jax.lax.top_k(gumbel + jnp.log(weight), model.k)[1]].sum(1))
    return 0.02 * rows + jnp.concatenate(sums)


def main(config: jax_hsae.Config, routings: list[str], steps: int, seconds: float) -> None:
    for routing in routings:
        batch = config.B
        while True:
            try:
                found = timed(config, batch, routing, steps, seconds)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or batch < 64:
                    raise
                batch //= 2
        print(json.dumps({routing: found}), flush=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(jax_hsae.Config(**asked.pop("config")), **asked)
