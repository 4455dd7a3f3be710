"""Dense matrix products, which cuBLAS makes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPE = {"bf16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}  # of a product's operands


@contextmanager
def dense(precision: str) -> Iterator[None]:
    """Products of float32 matrices on the tensor cores (`tf32`) or in full float32, whatever PyTorch is set to."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product with a float32 result."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
