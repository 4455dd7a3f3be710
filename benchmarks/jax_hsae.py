"""The published JAX H-SAE, written again from section 6 of docs/method.md.

Needs jax, equinox and optax. It shares no code with the package, so that a misreading on one side shows as a
difference: scripts/make_jax_fixture.py writes the tests' fixture with it, and jax_peer.py times its training step.
Tensors have the names and the layout of the published parameter tree, whose decoders are transposed. Shapes: B rows,
d width, P parents, C children per parent, s subspace width, k active parents.

    with precision("float64"):
        model, log, gradients = train(init(config, "float64"), lambda model, step: rows[step], config)
"""

import functools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")  # a GPU would round float32 products to TF32

TOP_LEVEL, L1, ORTH, MAX_NORM = 0.1, 1e-3, 0.1, 0.75


@dataclass(frozen=True)
class Config:
    d: int = 24
    P: int = 16
    C: int = 4
    s: int = 3
    k: int = 4
    B: int = 48
    steps: int = 20
    warmup_steps: int = 5  # of the learning rate and of the weights of L1 and orthogonality
    decay_steps: int = 40  # warm-up and cosine together
    first_lr: float = 1e-11
    peak_lr: float = 5e-3
    gradient_steps: tuple[int, ...] = (0, 13)  # whose gradients `train` returns
    seed: int = 0


class TopLevelAutoencoder(eqx.Module):
    encoder: jax.Array  # [P, d]
    decoder: jax.Array  # [d, P]


class HSAE(eqx.Module):
    """The published tree. The integers and `use_bias` are leaves too; only the float arrays are trained."""

    top_level_autoencoder: TopLevelAutoencoder
    W_down: jax.Array  # [P, s, d]
    W_up: jax.Array  # [P, d, s]
    encoder_weights: jax.Array  # [P, C, s]
    decoder_weights: jax.Array  # [P, s, C]
    bias: jax.Array  # [d], zero and not used
    threshold: jax.Array  # [], its gradient is 0
    use_bias: bool
    input_dim: int
    num_experts: int
    atoms_per_expert: int
    subspace_dim: int
    k: int


def precision(dtype: str) -> AbstractContextManager:
    """Inside it JAX computes in `float32` or `float64`."""
    return jax.enable_x64(dtype == "float64")


def init(config: Config, dtype: str) -> HSAE:
    """A new model. Its numbers are rounded to float32, so that both precisions start from the same ones."""
    rng = np.random.default_rng(config.seed)

    def he_uniform(*shape: int) -> np.ndarray:
        limit = math.sqrt(6 / shape[-1])
        return rng.uniform(-limit, limit, shape)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def array(values: np.ndarray) -> jax.Array:
        return jnp.array(values.astype(np.float32), dtype)

    encoder = he_uniform(config.P, config.d)
    down = unit(he_uniform(config.P, config.s, config.d))
    child = unit(he_uniform(config.P, config.C, config.s))
    return HSAE(
        TopLevelAutoencoder(array(encoder), array(encoder.T)),
        W_down=array(down),
        W_up=array(down.transpose(0, 2, 1)),
        encoder_weights=array(child),
        decoder_weights=array(child.transpose(0, 2, 1)),
        bias=array(np.zeros(config.d)),
        threshold=array(np.array(1 / math.sqrt(config.d))),
        use_bias=False,
        input_dim=config.d,
        num_experts=config.P,
        atoms_per_expert=config.C,
        subspace_dim=config.s,
        k=config.k,
    )


def unit_rows(rows: jax.Array) -> jax.Array:
    """What the model reads for raw rows [B, d]: rows of unit norm, not centred."""
    return rows / (jnp.linalg.norm(rows, axis=-1, keepdims=True) + 1e-6)


def encode(model: HSAE, x: jax.Array) -> dict[str, jax.Array]:
    """All codes of rows x [B, d], and what is selected. `top_k` and `argmax` give ties to the lowest index."""
    logits = x @ model.top_level_autoencoder.encoder.T
    codes = jnp.where(logits >= model.threshold, logits, 0)  # [B, P]
    parent_codes, parents = jax.lax.top_k(codes, model.k)
    u = jnp.einsum("bksd,bd->bks", model.W_down[parents], x)
    child_logits = jnp.einsum("bkcs,bks->bkc", model.encoder_weights[parents], u)
    all_child_codes = jnp.where(child_logits >= model.threshold, child_logits, 0.01 * child_logits)
    children = all_child_codes.argmax(-1)  # [B, k]
    best = jnp.take_along_axis(all_child_codes, children[..., None], -1)[..., 0]
    return {
        "logits": logits,
        "codes": codes,
        "parents": parents,
        "parent_codes": parent_codes,
        "child_logits": child_logits,
        "all_child_codes": all_child_codes,
        "children": children,
        "child_codes": jnp.where(parent_codes > 0, best, 0),
    }


def decode(model: HSAE, found: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Reconstructions [B, d]: by the parents alone, and by parents and children."""
    D = model.top_level_autoencoder.decoder.T[found["parents"]]  # [B, k, d]
    G = model.decoder_weights[found["parents"], :, found["children"]]  # [B, k, s]
    top_level = jnp.einsum("bk,bkd->bd", found["parent_codes"], D)
    return top_level, top_level + jnp.einsum("bk,bks,bkds->bd", found["child_codes"], G, model.W_up[found["parents"]])


def orthogonality(model: HSAE) -> jax.Array:
    """‖M − 1·diag(M)ᵀ‖_F/(P² − P) with M_ij = D̂_i·Ê_j: as published, column j loses M_jj in every row."""
    D, E = unit_rows(model.top_level_autoencoder.decoder.T), unit_rows(model.top_level_autoencoder.encoder)
    M = D @ E.T
    return jnp.linalg.norm(M - jnp.diag(M)[None, :]) / (len(M) ** 2 - len(M))


def loss_parts(model: HSAE, x: jax.Array) -> dict[str, jax.Array]:
    """The terms of the loss without their weights, for rows x [B, d] of unit norm."""
    found = encode(model, x)
    top_level, full = decode(model, found)
    return {
        "recon": ((x - full) ** 2).sum(-1).mean(),
        "recon_top": ((x - top_level) ** 2).sum(-1).mean(),
        "l1_parent": jnp.abs(found["codes"]).sum() / len(x),  # all P
        "l1_child": jnp.abs(found["all_child_codes"]).sum() / len(x),  # all k·C, parents with code 0 among them
        "orth": orthogonality(model),
    }


def total(parts: dict[str, jax.Array], warmup: jax.Array | float) -> jax.Array:
    penalties = L1 * (parts["l1_parent"] + parts["l1_child"]) + ORTH * parts["orth"]
    return parts["recon"] + TOP_LEVEL * parts["recon_top"] + warmup * penalties


def decoders(tree: HSAE) -> tuple[jax.Array, jax.Array]:
    return tree.top_level_autoencoder.decoder, tree.decoder_weights


DECODER_AXES = 0, 1  # along which a decoder's row lies in the stored, transposed arrays


def of_unit_norm(rows: jax.Array, axis: int) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=axis, keepdims=True)


def project(gradient: HSAE, model: HSAE) -> HSAE:
    """The gradient without its component along the decoder rows."""

    def across(g: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
        unit = of_unit_norm(rows, axis)
        return g - unit * (g * unit).sum(axis, keepdims=True)

    return eqx.tree_at(decoders, gradient, [*map(across, decoders(gradient), decoders(model), DECODER_AXES)])


def normalize(model: HSAE) -> HSAE:
    """The model with decoder rows of unit norm."""
    return eqx.tree_at(decoders, model, [*map(of_unit_norm, decoders(model), DECODER_AXES)])


def learning_rate(config: Config) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        config.first_lr, config.peak_lr, config.warmup_steps, config.decay_steps, end_value=0.1 * config.peak_lr
    )


@eqx.filter_jit
def gradients(model: HSAE, x: jax.Array, warmup: jax.Array | float) -> tuple[dict[str, jax.Array], dict[str, HSAE]]:
    """Loss parts, `loss` and `grad_norm` (before clipping); the gradient `raw`, then `projected`, then `clipped`."""

    def loss(model: HSAE) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = loss_parts(model, x)
        return total(parts, warmup), parts

    (value, parts), raw = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    projected = project(raw, model)
    clipped, _ = optax.clip_by_global_norm(MAX_NORM).update(projected, optax.EmptyState())
    numbers = {**parts, "loss": value, "grad_norm": optax.tree.norm(projected)}
    return numbers, {"raw": raw, "projected": projected, "clipped": clipped}


@eqx.filter_jit
def margins(model: HSAE, x: jax.Array) -> jax.Array:
    """Per row [B], how far the codes are from another choice: at the threshold, the k-th parent, the best child.

    A k-th code of 0 is no close call: codes below the threshold are exactly 0, and the lowest index wins.
    """
    found = encode(model, x)
    parents = jax.lax.top_k(found["codes"], model.k + 1)[0]
    children = jax.lax.top_k(found["all_child_codes"], 2)[0]
    distances = [
        jnp.abs(found["logits"] - model.threshold).min(-1),
        jnp.abs(found["child_logits"] - model.threshold).min((-1, -2)),
        jnp.where(parents[:, -2] > 0, parents[:, -2] - parents[:, -1], jnp.inf),
        (children[..., 0] - children[..., 1]).min(-1),
    ]
    return jnp.stack(distances).min(0)


def optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(learning_rate(config), b1=0.9, b2=0.999, eps=1e-8)


def update(
    adam: optax.GradientTransformation, model: HSAE, state: optax.OptState, x: jax.Array, warmup: jax.Array | float
) -> tuple[HSAE, optax.OptState, dict[str, jax.Array], dict[str, HSAE]]:
    """One step on rows x of unit norm: the new model and state, and what `gradients` gave."""
    numbers, found = gradients(model, x, warmup)
    updates, state = adam.update(found["clipped"], state)
    return normalize(eqx.apply_updates(model, updates)), state, numbers, found


def train(
    model: HSAE, next_rows: Callable[[HSAE, int], np.ndarray], config: Config
) -> tuple[HSAE, dict[str, np.ndarray], dict[int, dict[str, HSAE]]]:
    """Train on the raw rows [B, d] that `next_rows(model, step)` returns.

    Returns the model, the log (name -> [steps]) and, at `config.gradient_steps`, the parameters before the step and its
    gradients. Numbers of a step are those before its update: gradient, projection, clipping, Adam, unit decoder rows.
    """
    schedule, adam = learning_rate(config), optimizer(config)
    dtype = model.W_down.dtype
    step_function = eqx.filter_jit(functools.partial(update, adam))
    state = adam.init(eqx.filter(model, eqx.is_inexact_array))
    log: dict[str, list[np.ndarray]] = {}
    kept = {}
    for step in range(config.steps):
        x = unit_rows(jnp.array(next_rows(model, step), dtype))
        warmup = jnp.array(min(step / config.warmup_steps, 1), dtype)
        extra = {"warmup": warmup, "lr": jnp.array(schedule(step), dtype), "margin": margins(model, x).min()}
        before = model
        model, state, numbers, found = step_function(model, state, x, warmup)
        for name, value in (numbers | extra).items():
            log.setdefault(name, []).append(np.asarray(value))
        if step in config.gradient_steps:
            kept[step] = {"parameters": before, **found}
    return model, {name: np.stack(values) for name, values in log.items()}, kept


def leaves(tree: HSAE) -> dict[str, np.ndarray]:
    """The float arrays of a model or a gradient by their dotted names."""
    found = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, eqx.is_inexact_array))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in found}


def with_leaves(model: HSAE, arrays: dict[str, np.ndarray]) -> HSAE:
    """The model with the float arrays that `leaves` gave; raises KeyError for a missing name."""
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    found = [jnp.array(arrays[name], model.W_down.dtype) for name in leaves(model)]
    return eqx.combine(jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(floats), found), rest)
