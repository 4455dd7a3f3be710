"""One run: train a model at its arm's settings, measure it, and say it all in one record."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import Config, FlatConfig, HSAEConfig
from ..data.stream import RowStream
from ..evaluation.bootstrap import Metric
from ..evaluation.firings import Firings, count_firings
from ..evaluation.hierarchy import hierarchy_metrics
from ..evaluation.reconstruction import evaluate_language_model, evaluate_reconstruction
from ..fileio import sha256_file, sha256_json
from ..models.base import SparseAutoencoder
from ..models.flops import training_flops
from ..phases.arms import CALIBRATION_ROWS, Sample, fresh_model
from ..provenance import environment
from ..training.trainer import Diverged, HSAETrainer
from .data import HookData, StudyData
from .plan import RunKey, Study, model_config, run_config, settings_hash

BOOTSTRAP = 100  # resamples of intervals that no record keeps: a study's spread is that of its seeds
MEASURED = ("ev", "l0")
LM_MEASURED = ("ce_recovered", "delta_ce", "kl")


class Silent:
    """A tracker that keeps nothing: a run's record is its JSON file."""

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        return

    def close(self) -> None:
        return


def run_once(study: Study, base: Config, data: StudyData, run: RunKey, *, test: bool, workers: int) -> dict[str, Any]:
    """Train and measure one run; its record (docs/design.md, studies). A loss that is not finite is a record, too."""
    config = run_config(study, base, run)
    hook = data.hook(run.hook)
    made = model_config(study, base, run, hook.store.width)
    started, clock = now(), time.monotonic()
    peak = PeakMemory(data.device)
    model = initial_model(config, made, hook, data.device)
    trainer = HSAETrainer(
        model,
        RowStream(hook.store, "train", study.batch_size, seed=run.seed, window_rows=hook.store.n_rows("train")),
        config.arm_stages(config.arms[0]),
        config.training,
        seed=run.seed,
    )
    failed = None
    try:
        with faster_products(data.device, config.training.precision):
            trainer.fit(Silent())
    except Diverged as error:
        failed = str(error)
    train_seconds = synchronised(data.device) - clock
    record: dict[str, Any] = {
        **run._asdict(),
        "kind": config.arms[0].kind,
        "settings_sha256": settings_hash(study, run),
        "data_sha256": data.sha256,
        "text_sha256": data.identity["text_sha256"],
        "code": {"version": __version__, "sources_sha256": sources_sha256(), **versions(data.device)},
        "started": started,
        "workers": workers,
        "failed": failed,
        "atoms": model.n_parents * (1 + model.n_children),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_row": training_flops(made, model.width),
        "rows": trainer.step * trainer.rows_per_step,
        "train_seconds": round(train_seconds, 2),
        "peak_bytes": peak.record(),
        "config": made.model_dump(mode="json"),
    }
    del trainer
    if failed is None:
        model.eval()
        model.precision = "float32"
        # A threshold is a choice, and choices are made on val.
        model.calibrate(Sample(hook.store, "val", CALIBRATION_ROWS, run.seed), run.l0)
        firings = {split: count_firings(model, hook.store, split) for split in ("val", "test")[: 1 + test]}
        record |= {split: held_out(study, data, hook, run, model, split, firings[split]) for split in firings}
        in_train = count_firings(model, hook.store, "train", study.measure.usage_rows)
        dead = {"dead_parents": in_train.dead_parents, "dead_children": in_train.dead_children}
        record["usage"] = {**dead, "rows": in_train.rows}
        metrics = hierarchy_metrics(model, hook.store, firings["val"], hook.probes, run.seed)
        record["hierarchy"] = {name: _short(metric) for name, metric in metrics.items()}
    record["seconds"] = round(synchronised(data.device) - clock, 2)
    del model
    gc.collect()
    if data.device.startswith("cuda"):
        torch.cuda.empty_cache()  # each run has a stream of its own, whose memory no other stream takes over
    return record


def initial_model(config: Config, made: HSAEConfig | FlatConfig, hook: HookData, device: str) -> SparseAutoencoder:
    """The run's model at its random start."""
    flat = made if isinstance(made, FlatConfig) else None
    return fresh_model(config, config.arms[0], hook.store, hook.moments, device, flat, hook.sigma)


def held_out(
    study: Study, data: StudyData, hook: HookData, run: RunKey, model: SparseAutoencoder, split: str, firings: Firings
) -> dict[str, Any]:
    """Reconstruction, language model and L0 on the documents of `split`."""
    train_mean_d = hook.moments[0]
    found = evaluate_reconstruction(model, hook.store, split, train_mean_d, batch_size=8192, bootstrap=BOOTSTRAP)
    ids_NT, mask_NT, documents_N = data.contexts(split)
    spliced = evaluate_language_model(
        {"model": model},
        data.lm,
        run.hook,
        ids_NT,
        train_mean_d,
        documents=documents_N.numpy(),
        mask_NT=mask_NT,
        batch_size=study.measure.context_batch,
        bootstrap=BOOTSTRAP,
    )["model"]
    metrics = {name: found.metrics[name] for name in MEASURED} | {name: spliced.metrics[name] for name in LM_MEASURED}
    return {
        **{name: _short(metric) for name, metric in metrics.items()},
        "l0_parents": round(firings.l0_parents, 4),
        "l0_children": round(firings.l0_children, 4),
        "rows": firings.rows,
        "contexts": len(ids_NT),
    }


def _short(metric: Metric) -> dict[str, Any]:
    """A metric without an interval."""
    if metric.value is None:
        return {"value": None, "why": metric.why}
    chance = None if metric.chance is None else round(metric.chance, 5)
    return {"value": round(metric.value, 5), "chance": chance, "n": metric.n}


@contextmanager
def faster_products(device: str, precision: str | None) -> Iterator[None]:
    """Let PyTorch's own float32 products on a GPU use TF32 while a model trains, unless float32 is asked for.

    Flat models have no kernels of their own; an H-SAE's products are in bf16 by default.
    """
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
    """The time when all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.monotonic()


@cache
def sources_sha256() -> str:
    """SHA-256 over the package's Python files: the code's version where there is no commit."""
    package = Path(__file__).parents[1]
    return sha256_json(
        {path.relative_to(package).as_posix(): sha256_file(path) for path in sorted(package.rglob("*.py"))}
    )


@cache
def versions(device: str) -> dict[str, Any]:
    made = environment(device)
    names = ("torch", "transformers", "numpy")
    versions = {name: made["packages"][name] for name in names}
    return {"commit": made["commit"], "python": made["python"], **versions, "device": made["device"]}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
