"""A study's records as the results of its cells: mean and standard deviation over seeds at the chosen rate."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .plan import Cell, RunKey, Study, load_study, settings_hash
from .run import best_trial, records_in

TOLERANCE = 0.02  # relative difference up to which two arms have equally many atoms or parameters, or one L0


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for one value) and number of values."""

    mean: float
    sd: float | None
    n: int


class Result(NamedTuple):
    """One cell: its records at the chosen rate, by seed, and the trials that led to it: the first seed's, by rate."""

    cell: Cell
    kind: str
    lr: float
    trials: Mapping[float, Mapping[str, Any]]
    failed: int
    records: Mapping[int, Mapping[str, Any]]

    def numbers(self, *path: str) -> dict[int, float]:
        """By seed, the number at a path of the record; seeds without one are left out."""
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


class Results(NamedTuple):
    """All cells with a result, in the study's order; how many runs are there and asked for; what was left out."""

    study: Study
    found: list[Result]
    runs: int
    left_out: list[str]


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean(found: Spread | None) -> float:
    """The mean of values that are known to be there."""
    assert found is not None
    return found.mean


def read_results(folder: Path) -> Results:
    """Read a study's folder: study.yaml and runs/*.json.

    Runs that the study does not ask for, or that were made with other settings, are left out and named. Raises
    ValueError when the runs that are left come from different data, or none is left.
    """
    study, _ = load_study(folder / "study.yaml")
    there = records_in(folder)
    records = {
        run: record
        for run, record in there.items()
        if study.asks(run) and record["settings_sha256"] == settings_hash(study, run)
    }
    hashes = {record["data_sha256"]: run.file for run, record in records.items()}
    if len(hashes) > 1:
        one, other = list(hashes.values())[:2]
        raise ValueError(f"{folder}: found runs from different data, {one} and {other}, allowed: one for all")
    found = [result for cell in study.cells if (result := _result(study, cell, records)) is not None]
    if not found:
        raise ValueError(f"{folder / 'runs'}: found no runs of this study, allowed: hsae study run makes them")
    return Results(study, found, len(records), [run.file for run in there if run not in records])


def _result(study: Study, cell: Cell, records: Mapping[RunKey, Any]) -> Result | None:
    """The cell at its best rate so far; None while no trial has a value."""
    arm = study.arm(cell.arm)
    trials = [run for lr in study.rates(arm) if (run := RunKey(*cell, study.seeds[0], lr)) in records]
    best = best_trial(trials, records)
    if best is None:
        return None
    runs = {seed: records[run] for seed in study.seeds if (run := best._replace(seed=seed)) in records}
    done = {seed: record for seed, record in runs.items() if record["failed"] is None}
    made = {**{run: records[run] for run in trials}, **{best._replace(seed=seed): runs[seed] for seed in runs}}
    failed = sum(record["failed"] is not None for record in made.values())
    return Result(cell, arm.kind, best.lr, {run.lr: records[run] for run in trials}, failed, done)


def best_flat(results: Sequence[Result], of: Result, size: str, split: str) -> Result | None:
    """The flat arm with the largest mean EV among those as large as `of`; `size`: atoms or parameters."""
    rivals = [
        other
        for other in results
        if other.kind != "hsae"
        and other.cell[1:] == of.cell[1:]
        and other.numbers(split, "ev")
        and alike(other, of, size)
    ]
    return max(rivals, key=lambda other: mean(other.spread(split, "ev")), default=None)


def alike(one: Result, other: Result, *path: str) -> bool:
    """Whether the mean of a number is within TOLERANCE of the other's."""
    wanted = mean(other.spread(*path))
    return abs(mean(one.spread(*path)) - wanted) <= TOLERANCE * wanted


def difference(one: Result, other: Result, *path: str) -> Spread | None:
    """Mean and deviation, over the seeds that both have, of one minus the other."""
    first, second = one.numbers(*path), other.numbers(*path)
    return spread([first[seed] - second[seed] for seed in first if seed in second])
