"""What the tests of operations share: numbers, tolerances, and where kernels run."""

import pytest
import torch

from polytope_hsae import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")  # without a GPU kernels run in Triton's interpreter
TOLERANCE = {"float32": 2e-5, "tf32": 3e-3, "bf16": 2e-2}
# The interpreter's bf16 products are wrong.
PRECISIONS = ["float32", *(pytest.param(precision, marks=pytest.mark.gpu) for precision in ("tf32", "bf16"))]
BACKENDS = {"naive": (ops.NAIVE, "cpu"), "cpu": (ops.CPU, "cpu"), "triton": (ops.kernels("float32"), DEVICE)}


def normal(*shape, seed=0):
    """float64, the same for equal arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def leaf(tensor, device=DEVICE):
    """A float32 copy on a device that asks for a gradient."""
    return tensor.detach().float().to(device).requires_grad_()


def assert_close(found, expected, tolerance):
    """Relative to the norm of all entries; nothing may be NaN."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(found).all()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, error.item()


def parents(B, k, P, repeated=False):
    """Different parents for every row, or with one that stands twice."""
    generator = torch.Generator().manual_seed(B + k + P)
    index = torch.stack([torch.randperm(P, generator=generator)[:k] for _ in range(B)])
    if repeated:
        index[:, 0] = index[:, -1]
    return index
