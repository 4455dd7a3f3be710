"""Adam's update with the clipping factor inside: one pass over parameter, gradient and both moments."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _adam_kernel(p, g, m, v, scale, hyper, n, b1, b2, eps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    rate, shrink, correct_1, correct_2 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    usable = tl.zeros((BLOCK,), tl.float32) + factor
    inside = (at < n) & (usable == usable)  # a gradient that is not finite reaches neither parameter nor moment
    grad = tl.load(g + at, mask=inside, other=0.0) * factor
    first = tl.load(m + at, mask=inside, other=0.0)
    second = tl.load(v + at, mask=inside, other=0.0)
    old = tl.load(p + at, mask=inside, other=0.0)
    first = first + (1 - b1) * (grad - first)
    second = b2 * second + (1 - b2) * grad * grad
    size = tl.sqrt(second) * correct_2 + eps
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(p + at, old * shrink - rate * correct_1 * first / size, mask=inside)


def adam_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: Tensor, hyper_4: Tensor, b1: float, b2: float, eps: float
) -> None:
    """As `naive.adam_`; contiguous float32, but for g."""
    n = p.numel()
    _adam_kernel[(triton.cdiv(n, BLOCK),)](
        p, g.contiguous(), m, v, scale, hyper_4, n, b1, b2, eps, BLOCK=BLOCK, num_warps=8
    )
