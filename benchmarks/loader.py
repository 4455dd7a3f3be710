"""Do rows come as fast as a GPU trains on them? Milliseconds of a training step by the way that its rows take.

    python benchmarks/loader.py --out FOLDER [--shape jax-compat] [--rows 1000000] [--steps 200] [--device auto]

`given`: one batch that is there already, the time to reach. `resident`, `prefetch`: the two ways of data/feed.py.
`blocking`: read and copied when the step asks for it. Rows are random, in bfloat16, in FOLDER/rows, and come from the
system's file cache. First all ways must give the same batches. On a GPU a step that waits for it is an error, with all
tensors trained and with D and G frozen (`blocking` has to wait), and the exit code is 1. Writes loader.json, loader.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytope_hsae.bench.run import device_of
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.data.feed import Prefetch
from polytope_hsae.data.store import FORMAT, ActivationStore, Manifest, ResidentStore, Shard
from polytope_hsae.data.stream import RowStream
from polytope_hsae.fileio import write_json, write_tensors, write_text
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.provenance import environment
from polytope_hsae.training.trainer import HSAETrainer

SHARD_ROWS = 65_536  # as a harvest's
WARM_UP = 10
COMPARED = 5  # batches


class Given(RowStream):
    """A stream whose every batch is the first one, on the device."""

    def __init__(self, stream: RowStream, device: str):
        super().__init__(stream.store, stream.split, stream.batch_size, stream.seed)
        self.rows_Bd = stream.next().to(device)

    def next(self) -> Tensor:
        return self.rows_Bd


def make_store(folder: Path, rows: int, width: int) -> Manifest:
    """Random train rows as a harvest stores them, without labels; shards that are there already are kept."""
    generator, shards = torch.Generator().manual_seed(0), list[Shard]()
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        file, n = f"train-{number:05d}.safetensors", min(SHARD_ROWS, rows - first)
        if not (folder / file).exists():
            write_tensors(folder / file, {"acts": torch.randn(n, width, generator=generator).bfloat16()})
        size = (folder / file).stat().st_size
        shards.append({"file": file, "split": "train", "rows": n, "bytes": size, "sha256": ""})
    made: Manifest = {
        "format": FORMAT,
        "dtype": "bfloat16",
        "rows": {"train": rows},
        "width": width,
        "complete": True,
        "shards": shards,
    }
    return made


def steps_ms(
    shape: Shape, stream: RowStream | Prefetch, device: str, steps: int, freeze: list[str], wait: bool
) -> float:
    """Milliseconds of a step; unless `wait`, RuntimeError if one waits for the GPU."""
    stage = shape.stage.model_copy(update={"freeze": freeze})
    model = HierarchicalSAE(shape.hsae, shape.width, shape.normalize, seed=0).to(device)
    trainer = HSAETrainer(model, stream, [stage], shape.training)
    model.freeze(freeze)
    for _ in range(WARM_UP):
        trainer.train_step(stage)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if wait else "error")
    started = time.perf_counter()
    try:
        for _ in range(steps):
            trainer.train_step(stage)
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="jax-compat")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    device, shape = device_of(options.device), load_shape(options.shape, options.overrides)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in a run
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    folder = options.out / f"rows-{options.rows}-{shape.width}"
    manifest = make_store(folder, options.rows, shape.width)
    stored = ActivationStore(folder, manifest)
    resident = ResidentStore(stored, device)

    def stream(way: str) -> RowStream | Prefetch:
        plain = RowStream(resident if way == "resident" else stored, "train", shape.training.batch_size, seed=0)
        if way == "given":
            return Given(plain, device)
        return Prefetch(plain, torch.device(device)) if way == "prefetch" else plain

    found: dict[str, Any] = {}
    failed = False
    for way in ("given", "resident", "prefetch", "blocking"):
        for name, freeze in (("all", list[str]()), ("D and G frozen", ["D", "G"])):
            rows, again = stream(way), stream("blocking")
            for _ in range(0 if way == "given" else COMPARED):
                if not torch.equal(rows.next().cpu(), again.next()):
                    raise SystemExit(f"{way}: other rows than the store's")
            try:
                ms = steps_ms(shape, rows, device, options.steps, freeze, wait=way == "blocking")
                found[f"{way}, {name}"] = round(ms, 3)
            except RuntimeError as error:
                found[f"{way}, {name}"] = str(error).splitlines()[0]
                failed = True
            finally:
                if isinstance(rows, Prefetch):
                    rows.close()
    batch = shape.training.batch_size
    document = {"environment": environment(device), "shape": shape.name, "overrides": options.overrides} | {
        "rows": options.rows, "width": shape.width, "batch": batch, "steps": options.steps, "ms_per_step": found
    }  # fmt: skip
    write_json(options.out / "loader.json", document)
    lines = [f"{document['environment']['device']}, {shape.name}, batches of {batch} rows of {shape.width}.", ""]
    lines += ["| rows, trained | ms per step |", "| --- | --- |", *(f"| {way} | {ms} |" for way, ms in found.items())]
    write_text(options.out / "loader.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    main()
