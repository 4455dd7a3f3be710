"""Parameters and training FLOPs of a model, from its shape alone (docs/method.md section 1).

Counted are the products that one row's forward and backward pass needs, a multiply-add as 2. A logit's gradient counts
only where it can differ from 0: for the selected codes, or for all where the published form's L1 (or the softmax of
a straight-through gate with k = 1) reaches every logit. Not counted: additions, activations, selection, norms, and what
a step does once for all of its rows (penalties on weights, constraints, the optimiser).

Shapes: d width, P parents or latents, k active ones, C children per parent, K active children, s subspace width.
"""

from collections.abc import Callable
from typing import Any

from ..config import FlatConfig, HSAEConfig, JumpReLUConfig


def training_flops(config: HSAEConfig | FlatConfig, width: int) -> int:
    """FLOPs of training on one row, forward and backward."""
    if isinstance(config, FlatConfig):
        aux = config.aux_k if config.aux_weight > 0 else 0
        return round(_encode(config.n_latents, config.k + aux, width, True) + _decode(config.k + aux, width))
    return round(_parents(config, width) + _children(config, width))


def parameter_count(config: HSAEConfig | FlatConfig, width: int) -> int:
    """Parameters of a model; tied tensors count once."""
    if isinstance(config, FlatConfig):
        return config.n_latents * ((2 - config.tied) * width + 1 + isinstance(config, JumpReLUConfig)) + width
    P, C = config.n_parents, config.n_children_per_parent
    direct = config.children == "direct"
    router = P * width * (1 if config.use_tied_decoders_parent is True else 2)
    projectors = 0 if direct else P * config.subspace_dim * width * (1 if config.tie_projectors is True else 2)
    atoms = P * C * (width if direct else config.subspace_dim)
    readers = 0 if config.use_tied_decoders_child is True else atoms
    biases = config.use_encoder_bias * P * (1 + C) + config.use_decoder_bias * width
    return router + projectors + readers + atoms + biases


def latents_for(size: Callable[[Any, int], int], config: FlatConfig, width: int, wanted: int) -> int:
    """The number of latents whose `size`, linear in it, is nearest to `wanted`; below 1 where there is none."""
    one, two = (size(config.model_copy(update={"n_latents": n}), width) for n in (1, 2))
    return 1 + round((wanted - one) / (two - one))


def _encode(P: int, reached: float, d: int, input_gradient: bool) -> float:
    """All P logits, 2Pd; for each one that a gradient reaches 2d for E and, where x - b_dec needs one, 2d for that."""
    return 2 * P * d + (4 if input_gradient else 2) * reached * d


def _decode(k: float, d: int) -> float:
    """k rows of D: 2kd forward, 2kd for D and 2kd for the codes backward."""
    return 6 * k * d


def _parents(config: HSAEConfig, d: int) -> float:
    P, k = config.n_parents, config.topk_parent
    all_codes = config.l1_parent > 0 and config.magnitude == "leaky_offset"
    reaches_all = all_codes or (config.gate == "straight_through" and k == 1)
    return _encode(P, P if reaches_all else k, d, config.use_decoder_bias) + _decode(k, d)


def _children(config: HSAEConfig, d: int) -> float:
    """Down_p x and F_p for k parents, 2ksd + 2kCs; Up_p^T G for K children of at most min(k, K) parents, thrice.

    Direct children have rows of width d in place of both: 2kCd, and thrice 2Kd.

    Backward through F and Down go only children that a gradient reaches, and their parents. Codes of one parent are
    added up in its subspace, so that a parent is the unit of what Down and Up cost.
    """
    k, C, s = config.topk_parent, config.n_children_per_parent, config.subspace_dim
    K = config.active_children
    reached = k * C if config.l1_child > 0 and config.magnitude == "leaky_offset" else K
    input_gradient = config.use_decoder_bias or config.child_input == "residual"
    if config.children == "direct":
        forward, backward = 2 * k * C * d, (4 if input_gradient else 2) * reached * d
    else:
        forward = 2 * k * s * d + 2 * k * C * s
        backward = 4 * reached * s + (4 if input_gradient else 2) * min(k, reached) * s * d
    decode = 3 * (2 * K * d if config.children == "direct" else 2 * K * s + 2 * min(k, K) * s * d)
    return forward + backward + decode
