"""Numbers of the published JAX H-SAE that the PyTorch one is tested against. Needs jax, equinox and optax.

    PYTHONPATH=benchmarks python scripts/make_jax_fixture.py tests/data/jax_hsae.safetensors
    PYTHONPATH=benchmarks python scripts/make_jax_fixture.py --check tests/data/jax_hsae.safetensors

What lies in the file (leaf: a dotted name of the published tree, see benchmarks/jax_hsae.py; variants:
`narrow` has P < d, `wide` has P > d):

- `{variant}/start/{leaf}` and `{variant}/inputs` [steps, B, d], raw rows: float32, where both precisions start;
- `{variant}/{dtype}/{name}` [steps]: the loss parts without their weights, `warmup` (their weight's factor), `loss`,
  `grad_norm` (before clipping), `lr`, and `margin`: how far the nearest row is from another choice of codes;
- `{variant}/{dtype}/end/{leaf}`: the parameters after the last step;
- `{variant}/float64/gradients/{step}/{parameters, raw, projected, clipped}/{leaf}`: what the step starts from, and its
  gradients;
- `ties/parameters/{leaf}`, `ties/x` (in the model's units) and the codes that are selected where codes tie exactly.

The header's `fixture` holds the sizes, the weights and the versions as JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_hsae import (
    HSAE,
    L1,
    MAX_NORM,
    ORTH,
    TOP_LEVEL,
    Config,
    encode,
    init,
    leaves,
    margins,
    precision,
    train,
    unit_rows,
    with_leaves,
)
from safetensors.numpy import load_file, save_file

VARIANTS = {"narrow": Config(), "wide": Config(P=40, k=8, seed=1)}
MIN_MARGIN = 1e-4
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


def draw_rows(config: Config) -> Callable[[HSAE, int], np.ndarray]:
    """Rows of unequal norm: sparse sums of fixed directions, at every fourth step all along one (large gradients).

    Rows that are near another choice of codes are left out.
    """
    rng = np.random.default_rng([config.seed, 1])
    directions = rng.normal(size=(2 * config.P, config.d))

    def next_rows(model: HSAE, step: int) -> np.ndarray:
        shape = 16 * config.B, len(directions)
        present = rng.random(shape) < 2.5 / len(directions)
        if step % 4 == 2:
            present[:] = np.arange(len(directions)) == step
        h = (present * rng.exponential(size=shape)) @ directions + 0.3 * rng.normal(size=(shape[0], config.d))
        h = (h * rng.uniform(0.5, 20, size=(shape[0], 1))).astype(np.float32)
        clear = np.asarray(margins(model, unit_rows(jnp.array(h, "float64")))) > 2 * MIN_MARGIN
        assert clear.sum() >= config.B, f"step {step}: {clear.sum()} rows are left"
        return h[clear][: config.B]

    return next_rows


def tied_model() -> HSAE:
    """A model of ones and zeros, threshold 1/√4: its codes are exact. Parents 1 to 3 are equal, 4 and 5 too."""
    encoder = np.eye(4)[[0, 1, 1, 1, 2, 2]]
    down = np.tile(np.eye(4)[1:3], (6, 1, 1))
    child = np.tile([[1.0, 0], [0, 1], [0, 1]], (6, 1, 1))
    model = init(Config(d=4, P=6, C=3, s=2, k=3), "float32")
    arrays = {
        "top_level_autoencoder.encoder": encoder,
        "top_level_autoencoder.decoder": encoder.T,
        "W_down": down,
        "W_up": down.transpose(0, 2, 1),
        "encoder_weights": child,
        "decoder_weights": child.transpose(0, 2, 1),
    }
    return with_leaves(model, leaves(model) | arrays)


TIED_ROWS = [
    [0.25, 1, 1, 0],  # five equal codes for three places
    [0.25, 0.25, 0.75, 0],  # two codes above the threshold: the third place goes to the first of the zeros
    [0.5, 0.5, 0.25, 0],  # logits and a child's exactly at the threshold are kept
    [0, 0, 0, 0],
    [1, 0.75, 1, 0],  # three codes for three places; children 1 and 2 tie
    [1, -1, -1, 0],  # the children tie below the threshold: a negative code
]


def make() -> dict[str, np.ndarray]:
    """All tensors of the file by name."""
    tensors: dict[str, np.ndarray] = {}

    def add(prefix: str, arrays: dict[str, np.ndarray]) -> None:
        tensors.update({f"{prefix}/{name}": array for name, array in arrays.items()})

    for variant, config in VARIANTS.items():
        inputs: list[np.ndarray] = []
        draw = draw_rows(config)

        def new_rows(model: HSAE, step: int, inputs: list = inputs, draw: Callable = draw) -> np.ndarray:
            inputs.append(draw(model, step))
            return inputs[-1]

        def same_rows(model: HSAE, step: int, inputs: list = inputs) -> np.ndarray:
            return inputs[step]

        add(f"{variant}/start", leaves(init(config, "float32")))
        for dtype, next_rows in (("float64", new_rows), ("float32", same_rows)):
            with precision(dtype):
                model, log, gradients = train(init(config, dtype), next_rows, config)
            assert log["margin"].min() > MIN_MARGIN
            add(f"{variant}/{dtype}", log)
            add(f"{variant}/{dtype}/end", leaves(model))
            if dtype == "float64":
                for step, stages in gradients.items():
                    for stage, gradient in stages.items():
                        add(f"{variant}/{dtype}/gradients/{step}/{stage}", leaves(gradient))
        tensors[f"{variant}/inputs"] = np.stack(inputs)

    model, x = tied_model(), np.array(TIED_ROWS, np.float32)
    found = encode(model, jnp.array(x))
    add("ties/parameters", leaves(model))
    add("ties", {"x": x, **{name: np.asarray(found[name]) for name in SELECTED}})
    return tensors


SELECTED = "parents", "parent_codes", "children", "child_codes"


def metadata() -> dict[str, str]:
    header = {
        "configs": {variant: asdict(config) for variant, config in VARIANTS.items()},
        "tied": "init",
        "weights": {"recon_top": TOP_LEVEL, "l1": L1, "orth": ORTH, "max_norm": MAX_NORM},
        "versions": {module.__name__: module.__version__ for module in (jax, eqx, optax, np)},
    }
    return {"fixture": json.dumps(header)}  # one entry: safetensors keeps no order of several


def differences(made: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> list[str]:
    """One line for each tensor that is missing, has another shape or type, or is off by more than its tolerance."""
    lines = [f"{name}: only in one of the two" for name in sorted(made.keys() ^ stored.keys())]
    for name in sorted(made.keys() & stored.keys()):
        a, b = made[name], stored[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            lines.append(f"{name}: {a.dtype} {a.shape} against {b.dtype} {b.shape}")
        elif (error := np.abs(a - b).max()) > TOLERANCES.get(str(a.dtype), 0):
            lines.append(f"{name}: differs by {error:.1e}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="the file to write")
    parser.add_argument("--check", type=Path, metavar="FILE", help="an existing file to compare with")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.check):
        parser.error("give OUT, --check FILE or both")
    tensors = make()
    if arguments.out:
        save_file(tensors, arguments.out, metadata())
    if arguments.check:
        found = differences(tensors, load_file(arguments.check))
        print("\n".join(found) or f"{len(tensors)} tensors agree")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
