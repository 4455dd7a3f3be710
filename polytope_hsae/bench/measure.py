"""Times, memory, ceilings and rows: CUDA events on a GPU, the clock on a CPU.

Shapes: B rows, d width, P parents, k active ones.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from torch.profiler import ProfilerActivity, profile

from .floor import Ceilings

BATCHES = 3  # that a measured step goes round
PROFILED = 3  # steps of which the parts are the mean
ROW = 5  # steps of a GPU that are timed as one: they follow each other unwaited for, as in training
GPU_PARTS = {
    "choice of parents": ("_select", "_list", "_merge", "_spread", "TopK", "topk"),
    "routed products, and decoding": ("_dot_kernel", "_sum_kernel", "_tile_sum", "_decode"),
    "gradients of codes and routed weights": ("_sweep", "_outer", "_add_pieces"),
    "dense matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitK"),
    "Adam": ("_adam", "Adam"),
    "rows and codes, one by one": ("_enter", "_reconstruct", "_unit", "_grad_kernel", "_size", "_best", "_keep"),
    "constraints": ("_project", "_normalize"),
    "sort": ("radix", "Radix", "searchsorted", "scan"),
}
CPU_PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "choice and sort": ("aten::topk", "aten::sort", "aten::argsort", "aten::argmax", "aten::bincount"),
    "gather and scatter": ("aten::index", "aten::gather", "aten::scatter", "aten::_embedding_bag"),
    "filling and copying": ("aten::fill_", "aten::zero_", "aten::copy_"),
}
OTHER = "everything else"


def times(work: Callable[[], object], device: str, steps: int, *, warm_up: int = 5, seconds: float = 20) -> list[float]:
    """Milliseconds of up to `steps` calls after the warm-up: none begins after `seconds`, one is always made.

    On a GPU each is the mean of ROW calls, or of one where a call takes longer than a second.
    """
    took, began = 0.0, time.perf_counter()
    for _ in range(warm_up):
        started = time.perf_counter()
        work()
        wait(device)
        took = time.perf_counter() - started
        if time.perf_counter() - began > seconds / 2:
            break
    row = ROW if took < 1 else 1
    found: list[float] = []
    began = time.perf_counter()
    while not found or (len(found) < steps and time.perf_counter() - began < seconds):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(row):
                work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / row)
        else:
            started = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - started))
    return found


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Give back what the last measurement held, and start counting the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Peak of the GPU's memory since `free_memory`; None on a CPU, whose memory PyTorch does not count."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def parts(work: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of a step by part: of kernels on a GPU, of operations on a CPU, by their names."""
    cuda = device == "cuda"
    found: dict[str, float] = defaultdict(float)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED):
            work()
        wait(device)
    for event in seen.key_averages():
        names = GPU_PARTS if cuda else CPU_PARTS
        part = next((part for part, keys in names.items() if any(key in event.key for key in keys)), OTHER)
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[part] += microseconds / 1e3 / PROFILED
    return {part: found[part] for part in [*names, OTHER] if part in found}


def ceilings(device: str, steps: int) -> Ceilings:
    """Copies and large products, as fast as PyTorch does them here."""
    cuda = device == "cuda"
    source = torch.randn(2**29 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median(times(partial(target.copy_, source), device, steps)) / 1e9
    del source, target
    rows, width, columns = (32_512, 2_304, 16_384) if cuda else (1_024, 1_024, 1_024)
    x, E = torch.randn(rows, width, device=device), torch.randn(columns, width, device=device)

    def tflop_per_s(x: Tensor, E: Tensor) -> float:
        return 2 * rows * width * columns / median(times(lambda: x @ E.T, device, steps)) / 1e9

    products = {"float32": tflop_per_s(x, E)}
    if cuda:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        products["tf32"] = tflop_per_s(x, E)
        torch.backends.cuda.matmul.allow_tf32 = before
        products["bf16"] = tflop_per_s(x.bfloat16(), E.bfloat16())
    return Ceilings(copied, products)


class Rows:
    """A stream of batches that lie on the device already."""

    def __init__(self, rows_nd: Tensor, batch: int):
        self.batches, self.at = rows_nd.split(batch), 0

    def next(self) -> Tensor:
        """The next batch [B, d]."""
        self.at += 1
        return self.batches[self.at % len(self.batches)]


def make_rows(routing: str, batch: int, E: Tensor, k: int) -> Rows:
    """`uniform`: Gaussian rows. `zipf`: sums of k unit rows of E each, drawn without replacement with weights 1/rank,
    and a little noise, so that few parents take most rows.
    """
    rows = torch.randn(BATCHES * batch, E.shape[1], device=E.device)
    if routing == "zipf":
        E, weight_P = normalize(E.detach(), dim=1), 1 / torch.arange(1, len(E) + 1, device=E.device)
        weight_P = weight_P[torch.randperm(len(E), device=E.device)]
        for part in rows.split(1024):
            gumbel = -torch.empty(len(part), len(E), device=E.device).exponential_().log()
            picked = (gumbel + weight_P.log()).topk(k, dim=1).indices
            part.mul_(0.02).add_(embedding_bag(picked, E, mode="sum"))
    return Rows(rows, batch)


def max_rate(chosen_Bk: Tensor, n_parents: int) -> float:
    """Share of rows that the most chosen parent is chosen for."""
    return float(torch.bincount(chosen_Bk.flatten(), minlength=n_parents).max() / len(chosen_Bk))


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, as `run.deterministic` asks for them: without filling fresh memory."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def guarded(work: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What `work` returns, or `why` it has no numbers where it needs more memory than the GPU has."""
    free_memory(device)
    try:
        return work()
    except torch.OutOfMemoryError:
        why = "needs more memory than the GPU has"
    free_memory(device)
    return {"why": why}
