"""What a record says of the code and the machine, and how a run is timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..fileio import sha256_file, sha256_json
from ..provenance import environment


@cache
def code(device: str) -> dict[str, Any]:
    """The package, its commit and sources, PyTorch and the device."""
    made, package = environment(device), Path(__file__).parents[1]
    sources = {path.relative_to(package).as_posix(): sha256_file(path) for path in sorted(package.rglob("*.py"))}
    return {
        "version": __version__,
        "sources_sha256": sha256_json(sources),
        "commit": made["commit"],
        "torch": made["packages"]["torch"],
        "device": made["device"],
    }


@contextmanager
def faster_products(device: str, precision: str | None) -> Iterator[None]:
    """Let PyTorch's own float32 products on a GPU use TF32 while a model trains, unless float32 is asked for."""
    before = torch.get_float32_matmul_precision()
    if device.startswith("cuda") and precision != "float32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class PeakMemory:
    """Bytes that a run takes on a GPU beside what lies there already."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def record(self) -> dict[str, Any]:
        """{"value": bytes}, or why there is none."""
        if not self.device.startswith("cuda"):
            return {"value": None, "why": "not counted on a CPU"}
        return {"value": int(torch.cuda.max_memory_allocated(self.device) - self.before)}


def synchronised(device: str) -> float:
    """The time when all that was asked of the device is done, in seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.monotonic()
