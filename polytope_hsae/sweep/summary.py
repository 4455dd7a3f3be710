"""Records as results: the chosen learning rate of every cell, numbers over seeds, differences, targets.

Over seeds, every unit (a concept, or a group of documents) enters with the sum of its values of all seeds; intervals
resample units. The deviation over seeds stands beside them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import Config
from ..evaluation.bootstrap import Metric, Resampling, Units, paired
from ..evaluation.targets import assess_targets
from .plan import Cell, RunKey, Sweep, load_sweep, settings_hash
from .records import read_hooks, read_runs, unpack_units
from .run import best_trial, trials_of

TOLERANCE = 0.02  # relative difference up to which two arms have equally many atoms or parameters, or one L0
TOGETHER = ("purity_gain_pp", "leakage_reduction", "steering_leakage_reduction", "reconstruction_parity")
OF_CONCEPTS = TOGETHER[:3]
PASS, FAIL = "PASS", "FAIL"


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for one value) and number of values."""

    mean: float
    sd: float | None
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Result:
    """A cell at its chosen learning rate.

    records: by seed, those that have values of the split; trials: the first seed's, by learning rate; failed: how many
    runs had a loss that is not finite.
    """

    cell: Cell
    split: str
    lr: float | None
    records: Mapping[int, Mapping[str, Any]]
    trials: Mapping[float | None, Mapping[str, Any]]
    failed: int

    @property
    def kind(self) -> str:
        return str(next(iter([*self.records.values(), *self.trials.values()]))["kind"])

    def numbers(self, *path: str) -> dict[int, float]:
        """By seed, the number at a path of the record, or the `value` there; seeds without one are left out."""
        found = {}
        for seed, record in self.records.items():
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, Mapping):
                value = value.get("value")
            if value is not None:
                found[seed] = float(value)
        return found

    def spread(self, *path: str) -> Spread | None:
        """Mean and deviation of a number over the seeds; None where no record has it."""
        return spread(list(self.numbers(*path).values()))

    def metric(self, name: str) -> Spread | None:
        """Mean and deviation of a metric of the split."""
        return self.spread(self.split, "metrics", name)


@dataclass(frozen=True)
class Results:
    """All cells with a result, in the sweep's order, and the split that is shown.

    runs: records that the sweep asks for, with its present settings; left_out: the other ones.
    """

    sweep: Sweep
    configs: Mapping[str, Config]
    found: Mapping[Cell, Result]
    runs: Mapping[RunKey, Any]
    hooks: Mapping[str, Any]
    left_out: int
    split: str
    _known: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict)  # targets that were computed

    def at(self, hook: str, l0: int | None = None) -> list[Result]:
        """The results at a hook and L0, in the order of the arms."""
        return [result for cell, result in self.found.items() if (cell.hook, cell.l0) == (hook, l0) and result.records]

    @property
    def shown_hooks(self) -> list[str]:
        """The hooks that have values."""
        return [hook for hook in self.sweep.places if any(cell.hook == hook for cell in self.found)]

    def arm(self, hook: str, name: str | None) -> Result | None:
        """An arm's result at a hook of a sweep without L0s; None where it has no values."""
        found = self.found.get(Cell(name, hook, None)) if name is not None else None
        return found if found is not None and found.records else None

    def other(self, result: Result) -> Result | None:
        """The result that one is compared with."""
        found = self.found.get(result.cell._replace(arm=self.sweep.against(result.cell.arm)))
        return found if found is not None and found.records else None

    @cached_property
    def metric_names(self) -> list[str]:
        """Every metric that a record has: those of `shown` first, then by name."""
        names = {name for record in self.runs.values() for name in record.get(self.split, {}).get("metrics", {})}
        first = [name for name in self.sweep.shown if name in names]
        return first + sorted(names - set(first))

    def l0_gap(self, result: Result) -> float:
        """How far an L0 is from that of the arm that it is compared with, relative to the latter; means over seeds.

        0 where it is within the tolerance of matched arms, or not known.
        """
        other = self.other(result)
        l0, l0_other = result.metric("l0"), None if other is None else other.metric("l0")
        if l0 is None or l0_other is None:
            return 0.0
        gap = l0.mean / l0_other.mean - 1
        return gap if abs(gap) > TOLERANCE else 0.0

    def targets(self, result: Result, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The five targets of an arm against the one that it is compared with, over these seeds together."""
        asked = (result.cell, *seeds)
        if asked not in self._known:
            config = self.configs[result.cell.hook]
            first, second = self._pooled(result, seeds)
            self._known[asked] = assess_targets(
                self.angle(result.cell.hook),
                first,
                second,
                thresholds=config.eval.targets,
                resampling=Resampling(config.eval.bootstrap, config.run.seed),
            )
        return self._known[asked]

    def _pooled(self, result: Result, seeds: Sequence[int]) -> tuple[dict[str, Units], ...]:
        """The units of both arms, summed over seeds; a unit without a value in one of them counts in neither."""
        other = self.other(result)
        pairs: dict[str, list[tuple[Units, Units]]] = {}
        for seed in seeds:
            if other is None or seed not in other.records or seed not in result.records:
                continue
            packed = [found.records[seed][self.split]["units"] for found in (other, result)]
            for name in packed[0].keys() & packed[1].keys():
                pairs.setdefault(name, []).append((unpack_units(packed[0][name]), unpack_units(packed[1][name])))
        summed = {name: pooled(found) for name, found in sorted(pairs.items())}
        return tuple({name: both[side] for name, both in summed.items()} for side in (0, 1))

    def fall(self, result: Result, metric: str) -> Metric | None:
        """Relative fall of a metric against the arm that it is compared with, over all seeds; None if not kept."""
        first, second = self._pooled(result, list(result.records))
        if metric not in first:
            return None
        config = self.configs[result.cell.hook]
        return paired(first[metric], second[metric], "relative_reduction", config.eval.bootstrap, config.run.seed)

    def angle(self, hook: str) -> Metric | None:
        """The median angle of the evidence at a hook; None where there is none."""
        found = self.evidence(hook).get("main", {}).get("angles")
        if not found:
            return None
        parents = next(int(record["parents"]) for key, record in self.runs.items() if key.hook == hook)
        return Metric(found["median_angle_deg"], tuple(found["median_ci95"]), 90.0, parents)

    def evidence(self, hook: str) -> dict[str, Any]:
        """What is kept of a hook's evidence.json; {} where there is none."""
        found: dict[str, Any] = self.hooks.get(hook, {}).get("evidence", {})
        return found

    def passes(self, result: Result, target: str) -> tuple[int, int]:
        """In how many seeds a target passes, and of how many."""
        verdicts = [named(self.targets(result, [seed]), target)["verdict"] for seed in result.records]
        return verdicts.count(PASS), len(verdicts)

    def together(self, result: Result) -> bool:
        """Whether the targets but the angle pass in every seed of the sweep."""
        every = [self.passes(result, target) for target in TOGETHER]
        return all(passed == of and of == len(self.sweep.seeds) for passed, of in every)

    def together_over_seeds(self, result: Result) -> bool:
        """Whether the same targets pass over the seeds together."""
        over = self.targets(result, list(result.records))
        return all(named(over, target)["verdict"] == PASS for target in TOGETHER)


def named(targets: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A target by name."""
    return next(target for target in targets if target["name"] == name)


def variants(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of evidence.json: the hierarchy (main), its controls and the other metrics."""
    return {name: block for name, block in evidence.items() if isinstance(block, dict) and "median_z" in block}


def pooled(pairs: Sequence[tuple[Units, Units]]) -> tuple[Units, Units]:
    """Units of both arms summed over seeds by key. `pairs`: (first, second) arm of every seed.

    Raises ValueError where the arms of a seed were measured on different units.
    """
    keys_U = np.unique(np.concatenate([first.keys_U for first, _ in pairs]))
    sums = np.zeros((4, len(keys_U)))
    for first, second in pairs:
        if not np.array_equal(first.keys_U, second.keys_U):
            raise ValueError("units: found different ones in two arms of one seed, allowed: the same")
        present_U = first.present_U & second.present_U
        place_U = np.searchsorted(keys_U, first.keys_U[present_U])
        columns = (first.numerator_U, first.denominator_U, second.numerator_U, second.denominator_U)
        for row, column_U in enumerate(columns):
            sums[row, place_U] += column_U[present_U]
    sums[:, (sums[1] == 0) & (sums[3] == 0)] = np.nan
    return Units.ratio(sums[0], sums[1], keys_U), Units.ratio(sums[2], sums[3], keys_U)


def best_flat(results: Sequence[Result], of: Result, size: str) -> Result | None:
    """The flat arm with the largest mean EV among those as large as `of`; `size`: atoms or parameters."""
    flat = [other for other in results if other.kind != "hsae" and other.metric("ev") and alike(other, of, size)]
    return max(flat, key=lambda other: mean(other.metric("ev")), default=None)


def alike(one: Result, other: Result, *path: str) -> bool:
    """Whether the mean of a number is within TOLERANCE of the other's."""
    wanted = mean(other.spread(*path))
    return abs(mean(one.spread(*path)) - wanted) <= TOLERANCE * wanted


def mean(found: Spread | None) -> float:
    """The mean of values that are known to be there."""
    assert found is not None
    return found.mean


def difference(one: Result, other: Result, *path: str) -> Spread | None:
    """Mean and deviation, over the seeds that both have, of one minus the other."""
    first, second = one.numbers(*path), other.numbers(*path)
    return spread([first[seed] - second[seed] for seed in first if seed in second])


def read_results(folder: Path, split: str = "val") -> Results:
    """Read a sweep's folder: study.yaml, runs.jsonl, hooks.json.

    Records that the sweep does not ask for, or of other settings, are left out and counted. Raises ValueError when the
    records that are left come from different data, or none has values of the split.
    """
    sweep, configs = load_sweep(folder / "study.yaml")
    there = read_runs(folder)
    asked = {key for hook in sweep.places for key in sweep.keys(hook)}
    kept = {key: there[key] for key in there if key in asked and _present(sweep, key, there[key])}
    hashes = sorted({record["data_sha256"] for record in kept.values()})
    if len(hashes) > 1:
        raise ValueError(f"{folder}: found records from different data, {hashes[0]} and {hashes[1]}, allowed: one")
    of_split = sweep.world is not None or any(split in record for record in kept.values())
    if not kept or not of_split:
        flag = " --test" * (split == "test")
        raise ValueError(f"{folder}: found no {split} values, allowed: hsae sweep run{flag} makes them")
    found = {cell: result for cell in sweep.cells if (result := _result(sweep, cell, kept, split)) is not None}
    return Results(sweep, configs, found, kept, read_hooks(folder), len(there) - len(kept), split)


def _present(sweep: Sweep, key: RunKey, record: Mapping[str, Any]) -> bool:
    return bool(record["settings_sha256"] == settings_hash(sweep, key))


def _result(sweep: Sweep, cell: Cell, records: Mapping[RunKey, Any], split: str) -> Result | None:
    """The cell at its best learning rate so far, or its only one; None while there is no value."""
    tried = trials_of(sweep, cell)
    trials = [run for run in tried if run in records]
    best = best_trial(trials, records) if len(tried) > 1 else tried[0]
    if best is None or not any(best._replace(seed=seed) in records for seed in sweep.seeds):
        return None
    runs = {seed: records[run] for seed in sweep.seeds if (run := best._replace(seed=seed)) in records}
    made = {**{run: records[run] for run in trials}, **{best._replace(seed=seed): runs[seed] for seed in runs}}
    failed = sum(record["failed"] is not None for record in made.values())
    done = {
        seed: record
        for seed, record in runs.items()
        if record["failed"] is None and (sweep.world is not None or split in record)
    }
    return Result(cell, split, best.lr, done, {run.lr: records[run] for run in trials}, failed)
