"""One model of a study: trained and measured in its hook's run folder, and all of it in one small record."""

import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.feed import place
from ..evaluation.bootstrap import FloatArray, Metric, Units
from ..fileio import read_json
from ..models.base import SparseAutoencoder
from ..phases.arms import train_arm
from ..phases.measure import HeldOut, measure_models
from ..phases.preflight import check_arms, check_rows, memory_of
from ..phases.run import Run
from ..provenance import environment
from ..records import Train
from ..study.measure import sources_sha256
from ..training.trainer import Diverged, discard_checkpoints
from .plan import Findings, Key

DIGITS = 5  # significant ones that a record keeps
MAX_UNITS = 100
KEPT_COLUMNS = ("z", "ci95", "median_ci95", "beta_ci95", "omega_ci95", "kappa_ci95")
RESERVED = 4 << 30  # bytes of a GPU left to models when rows are placed there


class Bench:
    """The opened run folders of one process: each with its rows on the device and its held-out contexts, read once."""

    def __init__(self, folders: Mapping[str, Path], device: str) -> None:
        self.folders, self.device = folders, device
        self._runs: dict[str, Run] = {}
        self._held_out: dict[tuple[str, str], HeldOut] = {}

    def run(self, hook: str) -> Run:
        """The hook's run folder, its store on the device if it fits there. Raises ConfigError where an arm does not."""
        if hook not in self._runs:
            run = Run.open(self.folders[hook], self.device, quiet=True)
            check_arms(run.config, run.store.width, memory_of(run.device))
            check_rows(run.config, run.store.n_rows("train"), run.concepts.n_parents)
            run.store = place(run.store, run.device, RESERVED)
            self._runs[hook] = run
        return self._runs[hook]

    def held_out(self, hook: str, split: str) -> HeldOut:
        """The contexts of a split."""
        if (hook, split) not in self._held_out:
            self._held_out[hook, split] = HeldOut(self.run(hook), split)
        return self._held_out[hook, split]


def make_record(study: Findings, bench: Bench, key: Key, identity: Mapping[str, Any], splits: list[str]) -> Any:
    """Train a model, unless it is there, and measure it on the splits. A loss that is not finite is a record, too.

    identity: fields that say what the record was made from.
    """
    run = bench.run(key.hook)
    arm = run.config.arm(key.name)
    record: dict[str, Any] = {
        **key._asdict(),
        **identity,
        "kind": arm.kind,
        "init": arm.init,
        "label": run.label,
        "parents": run.concepts.n_parents,
        "children": run.concepts.n_children,
        "code": {"version": __version__, "sources_sha256": sources_sha256(), **_machine(run.device)},
        "failed": None,
    }
    clock = time.monotonic()
    try:
        train_arm(run, arm, run.store, tracked=False)
    except Diverged as error:
        return {**record, "failed": str(error).split(";")[0]}
    folder = run.arm_folder(arm.name)
    discard_checkpoints(folder)  # the model is there; its optimiser's state would take twice as much room
    trained = read_json(folder / "train.json", Train)
    seconds = {"train": round(time.monotonic() - clock, 1)}
    gc.collect()
    if run.device.startswith("cuda"):
        torch.cuda.empty_cache()  # each arm trains on a stream of its own, whose memory no other stream takes over
    record |= {name: trained[name] for name in ("steps", "tokens", "parameters", "flops_per_row")}
    sae = SparseAutoencoder.from_pretrained(folder / "model", device=run.device)
    for split in splits:
        clock = time.monotonic()
        teacher = {arm.name: trained["teacher_parents"]}
        held_out = bench.held_out(key.hook, split)
        measured = measure_models(run, {arm.name: sae}, split, teacher_parents=teacher, step="", held_out=held_out)
        found = measured[arm.name].evaluation
        record[split] = {
            "rows": run.store.n_rows(split),
            "metrics": {name: _short(metric) for name, metric in sorted(found.metrics.items())},
            "units": {name: pack_units(found.units[name]) for name in study.units if name in found.units},
        }
        seconds[split] = round(time.monotonic() - clock, 1)
    return {**record, "seconds": seconds}


def _machine(device: str) -> dict[str, Any]:
    made = environment(device)
    return {"commit": made["commit"], "torch": made["packages"]["torch"], "device": made["device"]}


def _short(metric: Metric) -> dict[str, Any]:
    """A metric with as many digits as a record keeps."""
    tree = metric.to_json()
    ci95 = None if tree["ci95"] is None else [_rounded(value) for value in tree["ci95"]]
    return {**tree, "value": _rounded(tree["value"]), "ci95": ci95, "chance": _rounded(tree["chance"])}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.{DIGITS}g}")


def pack_units(units: Units) -> dict[str, list[Any]]:
    """Units as lists: at most 100, else sums over 100 groups of units that follow each other.

    `keys` names the units or groups; without `denominator` all are 1; null stands for a unit without a value.
    """
    numerator_U, denominator_U, keys_U = units.numerator_U, units.denominator_U, units.keys_U
    if len(keys_U) > MAX_UNITS:
        sums = np.zeros((MAX_UNITS, 2))
        np.add.at(sums, np.arange(len(keys_U)) * MAX_UNITS // len(keys_U), _present(units).T)
        numerator_U, denominator_U = sums.T
        keys_U = np.arange(MAX_UNITS)
    packed = {"keys": keys_U.tolist(), "numerator": [_rounded(value) for value in numerator_U.tolist()]}
    if (denominator_U != 1).any():
        packed["denominator"] = [_rounded(value) for value in denominator_U.tolist()]
    return packed


def _present(units: Units) -> FloatArray:
    """Numerators and denominators [2, U], 0 for a unit without a value."""
    return np.where(units.present_U, np.stack([units.numerator_U, units.denominator_U]), 0.0)


def unpack_units(packed: Mapping[str, list[Any]]) -> Units:
    """What `pack_units` packed."""
    numerator = np.array([np.nan if value is None else value for value in packed["numerator"]])
    denominator = packed.get("denominator")
    if denominator is None:
        return Units.mean(numerator, packed["keys"])
    return Units.ratio(numerator, [np.nan if value is None else value for value in denominator], packed["keys"])


def short_evidence(tree: Any) -> Any:
    """evidence.json with fewer digits and without its columns, but for z of the parents."""
    if isinstance(tree, dict):
        kept = {name: short_evidence(value) for name, value in tree.items() if name != "children"}
        return {name: value for name, value in kept.items() if not isinstance(value, list) or name in KEPT_COLUMNS}
    if isinstance(tree, list):
        return [short_evidence(value) for value in tree]
    return _rounded(tree) if isinstance(tree, float) else tree
