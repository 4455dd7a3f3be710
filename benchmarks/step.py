"""Rows per second of a training step on one GPU, by part, beside the ceilings of the same GPU.

    python benchmarks/step.py --out folder [--steps 20]

Writes step.json and step.md. Forward, backward, constraints and the optimiser's step, every loss of the config on, rows
already on the GPU, medians. "Zipf": every row is the sum of 32 rows of E drawn with weights 1/rank.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from polytope_hsae.config import HSAEConfig, StageConfig, TopKConfig, TrainingConfig, load_config
from polytope_hsae.fileio import write_json
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.training.trainer import HSAETrainer

WIDTH, NEVER = 2304, 10**6
PARTS = {
    "choice of parents": ("_select", "_list", "_merge", "_spread"),
    "routed products, forward and to the codes": ("_dot_kernel", "_sum_kernel", "_tile_sum"),
    "routed products, weight gradients": ("_outer", "_add_chunks"),
    "dense matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitK"),
    "Adam": ("_adam",),
    "errors and penalties, by row": ("_reconstruct", "_unit_kernel", "_grad_kernel", "_size", "_best", "_divide"),
    "constraints": ("_project", "_normalize"),
    "sort": ("radix", "Radix", "searchsorted", "scan"),
}


def milliseconds(work: Callable[[], object], steps: int) -> float:
    """Median time of one call."""
    for _ in range(5):
        work()
    times = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


class Rows:
    """A stream of batches that lie on the GPU already."""

    def __init__(self, rows: Tensor, batch: int):
        self.batches, self.at = rows.split(batch), 0

    def next(self) -> Tensor:
        self.at += 1
        return self.batches[self.at % len(self.batches)]


def zipf_rows(n: int, E: Tensor, k: int) -> Tensor:
    """Sums of k unit rows of E each, drawn without replacement with weights 1/rank, and a little noise."""
    weight_P = 1 / torch.arange(1, len(E) + 1, device=E.device)
    weight_P = weight_P[torch.randperm(len(E), device=E.device)]
    rows = torch.empty(n, E.shape[1], device=E.device)
    for part in rows.split(2048):
        gumbel = -torch.empty(len(part), len(E), device=E.device).exponential_().log()
        picked = (gumbel + weight_P.log()).topk(k, dim=1).indices
        part.copy_(torch.nn.functional.embedding_bag(picked, normalize(E, dim=1), mode="sum"))
    return rows + 0.02 * torch.randn_like(rows)


def measure(
    name: str, model: SparseAutoencoder, config: TrainingConfig, steps: int, rows: Tensor | None = None
) -> dict[str, Any]:
    """Step time, rows per second, peak memory and the GPU's time by part."""
    batch = config.batch_size
    torch.cuda.empty_cache()
    stage = StageConfig(name="train", steps=NEVER, loss={"causal_ortho_lambda": 0})
    rows = torch.randn(3 * batch, WIDTH, device="cuda") if rows is None else rows
    quiet = config.model_copy(update={"log_every": NEVER, "val_every": NEVER, "checkpoint_every": NEVER})
    trainer = HSAETrainer(model, Rows(rows, batch), [stage], quiet)  # type: ignore[arg-type]
    trainer.step = 2 * max(1, config.penalty_warmup_steps)
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(lambda: trainer.train_step(stage), steps)
    peak = torch.cuda.max_memory_allocated() / 2**30
    parts: dict[str, float] = defaultdict(float)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            log = trainer.train_step(stage)
        torch.cuda.synchronize()
    for event in seen.key_averages():
        part = next((part for part, names in PARTS.items() if any(n in event.key for n in names)), "everything else")
        parts[part] += event.self_device_time_total / 3000
    load = float(log()["router_max_load"])
    return {
        "what": name,
        "ms": took,
        "rows_per_s": batch / took * 1e3,
        "peak_gib": peak,
        "max_load": load,
        "parts": parts,
    }


def ceilings(steps: int) -> dict[str, float]:
    """What this GPU does at best: copy in TB/s, bf16 product in TFLOP/s, PyTorch's fused Adam on 377 M parameters."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    found = {"copy TB/s": 2 * source.nbytes / milliseconds(lambda: target.copy_(source), steps) / 1e9}
    x, E = torch.randn(32512, WIDTH, device="cuda").bfloat16(), torch.randn(16384, WIDTH, device="cuda").bfloat16()
    found["bf16 TFLOP/s"] = 2 * 32512 * WIDTH * 16384 / milliseconds(lambda: x @ E.T, steps) / 1e9
    weight = torch.nn.Parameter(torch.randn(377_000_000, device="cuda"))
    weight.grad = torch.randn_like(weight)
    found["fused Adam ms"] = milliseconds(torch.optim.AdamW([weight], fused=True).step, steps)
    return found


def on_gpu(config: HSAEConfig, scaling: str) -> HierarchicalSAE:
    """A model that is ready to train."""
    model = HierarchicalSAE(config, WIDTH, scaling).cuda()
    model.normalize_decoder_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    jax, focused = load_config("jax-compat", []), load_config("v2-focused", [])
    limits = ceilings(options.steps)
    model = on_gpu(jax.hsae, "unit_row")
    found = [measure("jax-compat, Gaussian rows", model, jax.training, options.steps)]
    model = on_gpu(jax.hsae, "unit_row")
    rows = zipf_rows(3 * jax.training.batch_size, model.E.detach(), jax.hsae.topk_parent)
    found.append(measure("jax-compat, Zipf routing", model, jax.training, options.steps, rows))
    del rows
    for graph in (False, True):
        training = focused.training.model_copy(update={"cuda_graph": graph})
        name = "v2-focused" + ", CUDA graph" * graph
        found.append(measure(name, on_gpu(focused.hsae, "rms"), training, options.steps))
    flat = TopKSAE(TopKConfig(n_latents=16384, k=32), WIDTH).cuda()
    found.append(measure("flat TopK 16,384, k 32", flat, jax.training, options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    write_json(
        options.out / "step.json", {"device": device, "torch": torch.__version__, "ceilings": limits, "steps": found}
    )
    lines = [f"{device}, PyTorch {torch.__version__}; " + ", ".join(f"{k} {v:.2f}" for k, v in limits.items()), ""]
    lines += ["| what | ms | rows/s | peak GiB | largest load |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        numbers = f"{one['ms']:.2f} | {one['rows_per_s']:,.0f} | {one['peak_gib']:.1f} | {one['max_load']:.3f}"
        lines.append(f"| {one['what']} | {numbers} |")
    lines += [
        "",
        "| GPU ms by part | " + " | ".join(one["what"] for one in found) + " |",
        "| --- |" + " --- |" * len(found),
    ]
    for part in [*PARTS, "everything else"]:
        lines.append(f"| {part} | " + " | ".join(f"{one['parts'].get(part, 0):.2f}" for one in found) + " |")
    (options.out / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
