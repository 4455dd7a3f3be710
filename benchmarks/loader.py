"""Do rows come as fast as a GPU trains on them? Milliseconds of a training step, by the way its rows take.

    python benchmarks/loader.py --out FOLDER [--shape jax-compat] [--rows 1000000] [--steps 200] [--device auto]

`given`: batches that lie on the device, the time to reach. `resident`, `prefetch`: the two ways of data/feed.py.
`blocking`: each step reads and copies its batch. Rows are random, in bfloat16, read from FOLDER through the system's
file cache; every way must give the same batches. On a GPU a step that waits for it is an error, except for `blocking`,
with all tensors trained and with D and G frozen; the exit code is then 1. Writes loader.json and loader.md.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch

from polytope_hsae.bench.measure import Rows, deterministic, wait
from polytope_hsae.bench.run import device_of
from polytope_hsae.bench.shapes import Shape, load_shape
from polytope_hsae.bench.table import machine, table, write
from polytope_hsae.config import StageConfig
from polytope_hsae.data.feed import Prefetch
from polytope_hsae.data.store import FORMAT, ActivationStore, Manifest, ResidentStore, Shard
from polytope_hsae.data.stream import RowStream
from polytope_hsae.fileio import write_tensors
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.provenance import environment
from polytope_hsae.training.trainer import HSAETrainer

SHARD_ROWS = 65_536  # as a harvest's
WARM_UP = 10
COMPARED = 5  # batches


def make_store(folder: Path, rows: int, width: int) -> ActivationStore:
    """Random train rows as a harvest stores them, without labels; existing shards are kept."""
    generator, shards = torch.Generator().manual_seed(0), list[Shard]()
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        file, n = f"train-{number:05d}.safetensors", min(SHARD_ROWS, rows - first)
        if not (folder / file).exists():
            write_tensors(folder / file, {"acts": torch.randn(n, width, generator=generator).bfloat16()})
        size = (folder / file).stat().st_size
        shards.append({"file": file, "split": "train", "rows": n, "bytes": size, "sha256": ""})
    made = Manifest(format=FORMAT, dtype="bfloat16", rows={"train": rows}, width=width, complete=True, shards=shards)
    return ActivationStore(folder, made)


def step_ms(
    shape: Shape, stage: StageConfig, stream: RowStream | Prefetch | Rows, device: str, steps: int, may_wait: bool
) -> float:
    """Milliseconds of a step, a mean; unless it may wait, RuntimeError if one waits for the GPU."""
    model = HierarchicalSAE(shape.hsae, shape.width, shape.normalize, seed=0).to(device)
    trainer = HSAETrainer(model, stream, [stage], shape.training)  # type: ignore[arg-type]
    model.freeze(stage.freeze)
    for _ in range(WARM_UP):
        trainer.train_step(stage)
    wait(device)
    if device == "cuda" and not may_wait:
        torch.cuda.set_sync_debug_mode("error")
    started = time.perf_counter()
    try:
        for _ in range(steps):
            trainer.train_step(stage)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    wait(device)
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
    batch = shape.training.batch_size
    stored = make_store(options.out / f"rows-{options.rows}-{shape.width}", options.rows, shape.width)
    resident = ResidentStore(stored, device)
    found: dict[str, float | str] = {}
    failed = False
    for way, freeze in product(("given", "resident", "prefetch", "blocking"), ([], ["D", "G"])):
        plain = RowStream(resident if way == "resident" else stored, "train", batch, seed=0)
        rows = Prefetch(plain, torch.device(device)) if way == "prefetch" else plain
        again = RowStream(stored, "train", batch, seed=0)
        for _ in range(COMPARED):
            if not torch.equal(rows.next().cpu(), again.next()):
                sys.exit(f"{way}: other rows than the store's")
        stage = shape.stage.model_copy(update={"freeze": freeze})
        given = Rows(rows.next().to(device), batch)
        name = f"{way}, {'D and G frozen' if freeze else 'all'}"
        try:
            with deterministic():  # as in a run
                ms = step_ms(shape, stage, given if way == "given" else rows, device, options.steps, way == "blocking")
            found[name] = round(ms, 3)
        except RuntimeError as error:
            found[name], failed = str(error).splitlines()[0], True
        finally:
            if isinstance(rows, Prefetch):
                rows.close()
    document = {
        "environment": environment(device), "shape": shape.name, "overrides": options.overrides, "rows": options.rows,
        "width": shape.width, "batch": batch, "steps": options.steps, "ms_per_step": found,
    }  # fmt: skip
    lines = [f"{shape.name}, batches of {batch} rows of {shape.width}.", ""]
    lines += [*table(("rows, trained", "ms per step"), list(found.items())), machine(environment(device)), ""]
    write(options.out, "loader", document, "\n".join(lines))
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    main()
