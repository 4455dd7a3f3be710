"""The least that a training step has to move and to multiply, from its shape alone.

The floor is the time that this takes at the ceilings which the same run measured: a part takes the longer of its bytes
at the speed of a copy and its products at the speed of a large matrix product, and parts follow one another. A routed
row is counted once for every parent that reads it; where a cache serves such reads, a part may beat its floor.

Shapes: B rows, d width, P parents, k of them active, N = B k pairs, C children per parent, K active children, M = B
min(k, K) pairs with an active child at most, s subspace width, e bytes of an operand (2 in bf16, else 4). Weights,
gradients of weights and Adam's moments take 4 bytes a number.
"""

from typing import Any, NamedTuple

from ..config import FlatConfig, HSAEConfig
from ..models.flops import parameter_count

OPERAND = {"bf16": 2, "tf32": 4, "float32": 4}
ADAM = 28  # bytes per weight: weight and two moments read and written, gradient read


class Part(NamedTuple):
    """Bytes and FLOPs (a multiply-add is 2) of one part of a step."""

    name: str
    bytes: float
    flops: float


class Ceilings(NamedTuple):
    """What the machine did at best in this run: copies in TB/s (read and written), products in TFLOP/s by precision."""

    copy_tb_per_s: float
    tflop_per_s: dict[str, float]


def hsae_parts(config: HSAEConfig, width: int, batch: int, precision: str) -> list[Part]:
    """The parts of an H-SAE's step: forward, backward, constraints and Adam."""
    B, d, P, k = batch, width, config.n_parents, config.topk_parent
    C, s, e = config.n_children_per_parent, config.subspace_dim, OPERAND[precision]
    N, M = B * k, B * min(k, config.active_children)
    K = config.active_children
    every = config.magnitude == "leaky_offset"
    dense = (config.l1_parent > 0 and every) or (config.gate == "straight_through" and k == 1)
    all_children = config.l1_child > 0 and every
    codes, opened = (N * C, N) if all_children else (B * K, M)  # children, and pairs, that a gradient reaches
    back = opened if config.child_input == "residual" else 0
    decode = min((N + M * s) * d * e, (N + 2 * M) * d * e)  # rows gather weights, or parents write their part of rows
    reading, writing = N + M * s, P * (1 + 2 * s) * d + 2 * P * C * s
    return [
        *_router(B, P, d, e, B * P if dense else N),
        Part("children, forward", (N * d + P * s * (d + C) + N * C) * e, 2 * N * s * (d + C)),
        Part("decoding and errors", decode + 2 * B * d * 4, 2 * reading * d + 2 * B * K * s),
        Part(
            "codes, backward",
            (N * d + P * (1 + s) * d + back * d) * e,
            2 * reading * d + 2 * (B * K + codes) * s + 2 * back * s * d,
        ),
        Part(
            "routed weights, backward",
            opened * d * e + writing * 4,
            2 * (reading + opened * s) * d + 2 * (B * K + codes) * s,
        ),
        *_orthogonality(config, d, e),
        Part("Adam", ADAM * parameter_count(config, d), 0),
    ]


def flat_parts(config: FlatConfig, width: int, batch: int, precision: str) -> list[Part]:
    """The parts of a flat TopK's step, whose decoder reads and writes the chosen latents only."""
    B, d, P, e = batch, width, config.n_latents, OPERAND[precision]
    N = round(B * config.k)
    return [
        *_router(B, P, d, e, N),
        Part("decoding and errors", N * d * e + 2 * B * d * 4, 2 * N * d),
        Part("codes and decoder, backward", N * d * e + P * d * (e + 4), 4 * N * d),
        Part("Adam", ADAM * parameter_count(config, d), 0),
    ]


def _router(B: int, P: int, d: int, e: int, reached: int) -> list[Part]:
    """All logits; their choice; E's gradient from the `reached` logits of the batch, of which each reads its row."""
    dense = reached == B * P
    read = (B * P + B * d) * e if dense else reached * d * e
    return [
        Part("router", (B * d + P * d + B * P) * e, 2 * B * P * d),
        Part("choice of parents", (2 if dense else 1) * B * P * e, 0),
        Part("router, backward", read + P * d * 4, 2 * reached * d),
    ]


def _orthogonality(config: HSAEConfig, d: int, e: int) -> list[Part]:
    """Bi-orthogonality through products whose sides are the smaller of rows and columns: value and gradient."""
    if config.biorth_lambda == 0:
        return []
    jax = config.use_offdiag_biorth == "jax"
    pairs = [(1, config.n_parents, d)]
    pairs += [] if jax else [(config.n_parents, config.n_children_per_parent, config.subspace_dim)]
    flops = sum(n * 2 * rows * columns * min(rows, columns) * _products(rows, columns) for n, rows, columns in pairs)
    weights = sum(n * rows * columns for n, rows, columns in pairs)
    return [Part("orthogonality", 2 * weights * (e + 4), flops)]


def _products(rows: int, columns: int) -> int:
    """Of E D^T one product and two for its gradients; through both Gram matrices two and two."""
    return 3 if rows <= columns else 4


def seconds(part: Part, ceilings: Ceilings, precision: str) -> float:
    """Time of a part at the ceilings."""
    moving = part.bytes / (ceilings.copy_tb_per_s * 1e12)
    return max(moving, part.flops / (ceilings.tflop_per_s[precision] * 1e12))


def floor_record(parts: list[Part], ceilings: Ceilings, precision: str) -> dict[str, Any]:
    """Totals and parts: bytes, FLOPs, and milliseconds at the ceilings."""
    times = [seconds(part, ceilings, precision) * 1e3 for part in parts]
    return {
        "ms": sum(times),
        "bytes": sum(part.bytes for part in parts),
        "flops": sum(part.flops for part in parts),
        "parts": [{**part._asdict(), "ms": ms} for part, ms in zip(parts, times, strict=True)],
    }
