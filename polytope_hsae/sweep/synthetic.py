"""Runs on synthetic rows: train a model on a world's stream, and say what it recovers of the known features."""

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..evaluation.synthetic.edges import best_cofiring, cofiring, edge_scores, forest, structure, two_level_bound
from ..evaluation.synthetic.recovery import Counts, count, decoders, detection, match, recovery
from ..evaluation.synthetic.rows import BATCHES_AT_ONCE, SyntheticStream, draw
from ..evaluation.synthetic.world import World
from ..fileio import sha256_json
from ..models.base import SparseAutoencoder
from ..models.hsae import HierarchicalSAE
from ..phases.flat_arms import MODELS
from ..phases.run import use_device
from ..tracking import Trackers
from ..training.trainer import Diverged, HSAETrainer
from .machine import PeakMemory, code, faster_products, synchronised
from .plan import WORLD, RunKey, Sweep

SAMPLE_BATCH = 8192


def data_identity(sweep: Sweep) -> dict[str, Any]:
    """The rows follow from the world's fields."""
    assert sweep.world is not None
    return {"data_sha256": sha256_json(sweep.world.model_dump(mode="json", exclude_defaults=True))}


class SyntheticRuns:
    """The runs of a sweep on synthetic rows."""

    def __init__(self, sweep: Sweep, configs: Mapping[str, Config], identity: Mapping[str, Any], device: str) -> None:
        self.sweep, self.config, self.identity = sweep, configs[WORLD], identity
        self.device = use_device(device)

    def prepare(self, hook: str) -> None:
        """Nothing: rows are drawn as they are needed."""

    def is_trained(self, key: RunKey) -> bool:
        """False: no model is kept."""
        return False

    def record(self, key: RunKey) -> dict[str, Any]:
        """Train and measure one run. A loss that is not finite is a record, too."""
        sweep, device = self.sweep, self.device
        assert sweep.world is not None
        arm, chance = self.config.arm(key.name), sweep.arm(key.arm).chance
        training = self.config.arm_training(arm)
        stages = self.config.arm_stages(arm)
        if chance == "frozen":
            stages = [stage.model_copy(update={"freeze": ["D", "G"]}) for stage in stages]
        world, peak = World(sweep.world, device), PeakMemory(device)
        model, mean_d = self._initial(key, world)
        trainer = HSAETrainer(model, SyntheticStream(world, training.batch_size), stages, training, seed=key.seed)
        failed, begun = None, synchronised(device)
        if chance != "random":
            try:
                with faster_products(device, training.precision):
                    trainer.fit(Trackers([]))
            except Diverged as error:
                failed = str(error)
        seconds, rows = synchronised(device) - begun, trainer.step * trainer.rows_per_step
        del trainer
        record: dict[str, Any] = {
            **self.identity,
            "kind": arm.kind,
            "chance": chance,
            "code": code(device),
            "failed": failed,
            "latents": model.n_parents * (1 + model.n_children),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "rows": rows,
            "seconds": {"train": round(seconds, 2)},
            "rows_per_second": round(rows / seconds) if rows else None,
            "drawn_per_second": drawing_speed(world, training.batch_size),
            "peak_bytes": peak.record(),
            "world_l0": round(float(world.rate_N.sum()), 4),
        }
        if failed is None:
            model.eval()
            model.precision = "float32"
            model.calibrate(self._sample(world, "val"), model.config.total_l0)
            record["test"] = measured(model, world, count(model, world, sweep.test_rows, mean_d))
        del model
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        return record

    def _sample(self, world: World, part: str) -> list[Tensor]:
        """`sample_rows` rows of a part, in batches [B, d]."""
        rows = self.sweep.sample_rows
        size = min(SAMPLE_BATCH, rows)
        return [draw(world, size, part, number).x for number in range(-(-rows // size))]

    def _initial(self, key: RunKey, world: World) -> tuple[SparseAutoencoder, Tensor]:
        """The run's model at its random start, and the mean [d] of the sample of train rows that it is centred on."""
        arm = self.config.arm(key.name)
        model: SparseAutoencoder
        if arm.kind == "hsae":
            model = HierarchicalSAE(self.config.arm_hsae(arm), world.config.width, seed=key.seed)
        else:
            model = MODELS[arm.kind](self.config.arm_flat(arm), world.config.width, seed=key.seed)
        batches = self._sample(world, "train")
        rows_Nd = torch.cat(batches)
        mean_d = rows_Nd.double().mean(0)
        spread = (rows_Nd - mean_d.float()).double().square().sum(1).mean()
        model.set_normalization(mean_d.float().cpu(), float((spread / world.config.width).sqrt()))
        model.to(world.device)
        model.initialize_bias(batches)
        return model, mean_d.float()


def drawing_speed(world: World, batch_size: int) -> int:
    """Rows per second of the stream by itself, after a first draw."""
    stream, draws = SyntheticStream(world, batch_size), 4
    stream.next()
    begun = synchronised(str(world.device))
    for _ in range(draws * BATCHES_AT_ONCE):
        stream.next()
    return round(draws * BATCHES_AT_ONCE * batch_size / (synchronised(str(world.device)) - begun))


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
