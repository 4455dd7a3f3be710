"""Operations of the models: for each a plain PyTorch specification (`naive`) and, where that is faster, a twin for a
CPU (`cpu`) or for a GPU (`triton`), with the same outputs and the same gradients.

Every part of a model holds the operations for the device that its weights lie on (`models.base.Part`), and calls them
by name. A model asks for a device nowhere else, but for `FlatSAE.trains_whole`; the trainer chooses the precision.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .gate import naive as gate
from .l1 import naive as l1
from .norms import naive as norms
from .orthogonality import naive as orthogonality
from .routed import Children as Children
from .routed import Routed as Routed
from .routed import Routing as Routing
from .routed import Rows as Rows
from .routed import cpu, naive

Precision = Literal["bf16", "tf32", "float32"]
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Ops(NamedTuple):
    """One implementation of every operation; what each computes stands in its `naive` function."""

    enter: Callable[..., Any] = naive.enter
    linear: Callable[..., Tensor] = naive.linear
    route: Callable[..., Any] = naive.route
    decode: Callable[..., Tensor] = naive.decode
    encode_children: Callable[..., Tensor] = naive.encode_children
    decode_children: Callable[..., Tensor] = naive.decode_children
    reconstruct: Callable[..., Any] = naive.reconstruct
    squared_error: Callable[..., Tensor] = naive.squared_error
    gate: Callable[..., Tensor] = gate.gate
    l1: Callable[..., Tensor] = l1.l1
    cross: Callable[..., Tensor] = orthogonality.cross
    biorth_jax: Callable[..., Tensor] = orthogonality.biorth_jax
    normalize_rows_: Callable[..., None] = norms.normalize_rows_
    project_out_: Callable[..., None] = norms.project_out_
    adam_: Callable[..., None] | None = None  # None: PyTorch's own optimiser is as fast
    on_host: bool = True  # numbers lie on the host: to look at one costs nothing


NAIVE = Ops()
CPU = NAIVE._replace(
    linear=cpu.linear,
    route=cpu.route,
    decode=cpu.decode,
    encode_children=cpu.encode_children,
    decode_children=cpu.decode_children,
    reconstruct=cpu.reconstruct,
)


@cache
def kernels(precision: Precision) -> Ops:
    """The operations as Triton kernels for float32 tensors; `precision` is that of the matrix products alone."""
    from .adam.triton import adam_
    from .gate.triton import gate
    from .l1.triton import l1
    from .norms import triton as norms
    from .orthogonality import triton as orthogonality
    from .routed import triton as routed

    return NAIVE._replace(
        enter=partial(routed.enter, precision=precision),
        linear=routed.linear,
        route=partial(routed.route, precision=precision),
        decode=partial(routed.decode, precision=precision),
        encode_children=partial(routed.encode_children, precision=precision),
        decode_children=partial(routed.decode_children, precision=precision),
        reconstruct=partial(routed.reconstruct, precision=precision),
        squared_error=routed.squared_error,
        gate=gate,
        l1=l1,
        cross=orthogonality.cross,
        biorth_jax=partial(orthogonality.biorth_jax, precision=precision),
        normalize_rows_=norms.normalize_rows_,
        project_out_=norms.project_out_,
        adam_=adam_,
        on_host=False,
    )


def of(weight: Tensor, precision: Precision = "float32") -> Ops:
    """The operations on weights that lie where this one lies."""
    if weight.device.type in ("cpu", "meta"):
        return CPU
    if HAS_TRITON and weight.is_cuda and weight.dtype == torch.float32:
        return kernels(precision)
    return NAIVE._replace(on_host=False)
