"""One run of a synthetic study: train a model on the world's stream, and say what it recovers in one record."""

import gc
import time
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...config import FlatConfig, HSAEConfig
from ...evaluation.synthetic.counts import Counts, count, decoders
from ...evaluation.synthetic.edges import best_cofiring, cofiring, edge_scores, forest, structure, two_level_bound
from ...evaluation.synthetic.recovery import detection, match, recovery
from ...evaluation.synthetic.rows import BATCHES_AT_ONCE, SyntheticStream, draw
from ...evaluation.synthetic.world import World
from ...models.base import SparseAutoencoder
from ...models.hsae import HierarchicalSAE
from ...phases.flat_arms import MODELS
from ...phases.run import use_device
from ...training.trainer import Diverged, HSAETrainer
from ..measure import PeakMemory, Silent, faster_products, now, sources_sha256, synchronised, versions
from .plan import SyntheticRun, SyntheticStudy, model_config, settings_hash, stages, training_config

SAMPLE_BATCH = 8192


def run_once(study: SyntheticStudy, run: SyntheticRun, device: str, workers: int) -> dict[str, Any]:
    """Train and measure one run; its record. A loss that is not finite is a record, too."""
    arm = study.arm(run.arm)
    made, training = model_config(study, arm), training_config(study, arm)
    use_device(device)
    started, clock = now(), time.monotonic()
    world = World(study.world, device)
    peak = PeakMemory(device)
    model, mean_d = initial_model(study, run, world)
    trainer = HSAETrainer(model, SyntheticStream(world, study.batch_size), stages(study, arm), training, seed=run.seed)
    failed, begun = None, synchronised(device)
    if arm.chance != "random":
        try:
            with faster_products(device, training.precision):
                trainer.fit(Silent())
        except Diverged as error:
            failed = str(error)
    seconds, rows = synchronised(device) - begun, trainer.step * trainer.rows_per_step
    del trainer
    record: dict[str, Any] = {
        **run._asdict(),
        "kind": arm.kind,
        "chance": arm.chance,
        "settings_sha256": settings_hash(study, run),
        "code": {"version": __version__, "sources_sha256": sources_sha256(), **versions(device)},
        "started": started,
        "workers": workers,
        "failed": failed,
        "latents": model.n_parents * (1 + model.n_children),
        "parents": model.n_parents,
        "children_per_parent": model.n_children,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": rows,
        "train_seconds": round(seconds, 2),
        "rows_per_second": round(rows / seconds) if rows else None,
        "drawn_per_second": drawing_speed(world, study.batch_size),
        "peak_bytes": peak.record(),
        "config": made.model_dump(mode="json"),
        "world_l0": round(float(world.rate_N.sum()), 4),
    }
    if failed is None:
        model.eval()
        model.precision = "float32"
        model.calibrate(sample(study, world, "val"), study.l0)
        record |= measured(model, world, count(model, world, study.test_rows, mean_d))
    record["seconds"] = round(synchronised(device) - clock, 2)
    del model
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return record


def drawing_speed(world: World, batch_size: int) -> int:
    """Rows per second of the stream by itself, after a first draw."""
    stream, draws = SyntheticStream(world, batch_size), 4
    stream.next()
    begun = synchronised(str(world.device))
    for _ in range(draws * BATCHES_AT_ONCE):
        stream.next()
    return round(draws * BATCHES_AT_ONCE * batch_size / (synchronised(str(world.device)) - begun))


def sample(study: SyntheticStudy, world: World, part: str) -> list[Tensor]:
    """`sample_rows` rows of a part, in batches [B, d]."""
    size = min(SAMPLE_BATCH, study.sample_rows)
    return [draw(world, size, part, number).x for number in range(-(-study.sample_rows // size))]


def initial_model(study: SyntheticStudy, run: SyntheticRun, world: World) -> tuple[SparseAutoencoder, Tensor]:
    """The run's model at its random start, and the mean [d] of the sample of train rows that it is centred on."""
    arm = study.arm(run.arm)
    made = model_config(study, arm)
    model: SparseAutoencoder
    if isinstance(made, HSAEConfig):
        model = HierarchicalSAE(made, world.config.width, seed=run.seed)
    else:
        assert isinstance(made, FlatConfig)
        model = MODELS[arm.kind](made, world.config.width, seed=run.seed)
    batches = sample(study, world, "train")
    rows_Nd = torch.cat(batches)
    mean_d = rows_Nd.double().mean(0)
    spread = (rows_Nd - mean_d.float()).double().square().sum(1).mean()
    model.set_normalization(mean_d.float().cpu(), float((spread / world.config.width).sqrt()))
    model.to(world.device)
    model.initialize_bias(batches)
    return model, mean_d.float()


def measured(model: SparseAutoencoder, world: World, counts: Counts) -> dict[str, Any]:
    """Everything that is said of a trained model, with five decimals; None where there is nothing to say."""
    found = match(decoders(model), world)
    P, C = model.n_parents, model.n_children
    forests = {"forest": forest(P, C, counts), "cofiring": cofiring(counts)}
    if C:
        forests["structure"] = structure(P, C, counts.latent_L)
    return {
        "test_rows": counts.rows,
        "ev": round(counts.ev, 5),
        "l0": round((counts.parent_codes + counts.child_codes) / counts.rows, 4),
        "l0_parents": round(counts.parent_codes / counts.rows, 4),
        "l0_children": round(counts.child_codes / counts.rows, 4),
        "features": _rounded({**recovery(counts, found, world), **detection(counts, found)}),
        "edges": {
            **{name: _rounded(edge_scores(above_L, found, world)) for name, above_L in forests.items()},
            "best_cofiring": _rounded(best_cofiring(counts, found, world)),
        },
        "two_level_bound": two_level_bound(world, P, C) if C else None,
    }


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 5) for name, value in values.items()}
