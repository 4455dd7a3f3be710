"""The training step of the published model in JAX, timed; benchmarks/jax_peer.py starts this in a process of its own.

In JAX's own way: float32 arrays, products in its default precision (TF32 on a GPU), one compiled step whose buffers are
donated. Prints one line of JSON, for the largest half, quarter, ... of the batch that fits into memory.
"""

import json
import sys
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax_hsae


def timed(config: jax_hsae.Config, batch: int, steps: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step on `batch` Gaussian rows, and the peak of the GPU's memory in GiB."""
    model = jax_hsae.init(config, "float32")
    rows = jax.random.normal(jax.random.key(0), (batch, config.d))
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


def main(config: jax_hsae.Config, steps: int, seconds: float) -> None:
    batch = config.B
    while True:
        try:
            return print(json.dumps(timed(config, batch, steps, seconds)), flush=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch < 64:
                raise
            batch //= 2


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(jax_hsae.Config(**asked.pop("config")), **asked)
