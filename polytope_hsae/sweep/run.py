"""`hsae sweep run`: which runs are due, in which processes they are made, and their records.

A record is written when its run is measured; one with the present settings and data is not made again. So a sweep that
was stopped goes on, and one that was changed makes anew what the change affects.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.logging import disable_progress_bar

from ..config import Config, ConfigError
from ..fileio import update_text
from ..parsing import did_you_mean
from ..phases.run import remove_leftovers, use_device
from ..report.words import number
from ..training.trainer import Interrupted
from . import language, synthetic
from .plan import Cell, RunKey, Sweep, lasting, load_sweep, settings_hash, sweep_yaml
from .records import key_of, read_runs, write_hook, write_runs
from .workers import Options, Say, results, worker_pool

Records = Mapping[RunKey, Any]
Runs = language.LanguageRuns | synthetic.SyntheticRuns


def run_sweep(path: Path, overrides: list[str], out: Path | None, options: Options, say: Say) -> Path:
    """Make all runs of a sweep that are due; returns its folder."""
    sweep, configs = load_sweep(path, overrides)
    folder = out if out is not None else path.parent if path.name == "study.yaml" else path.parent / sweep.name
    cache = options.cache or folder / "cache"
    say(f"records in {folder / 'runs.jsonl'}, activations and models in {cache}")
    remove_leftovers(folder, deep=True)
    _claim(folder, path, lasting(overrides))
    if not any(wanted(key, options.only) for hook in sweep.places for key in sweep.keys(hook)):
        names = [arm.name for arm in sweep.arms]
        meant = did_you_mean(str(options.only), names)
        raise ConfigError(f"--only: found {options.only!r}, allowed: {', '.join(names)}, or a glob of HOOK/RUN{meant}")
    disable_progress_bar()  # of loading, on standard error, where errors are one line
    of_language = sweep.world is None
    first = next(iter(configs.values()))
    identity = language.data_identity(first) if of_language else synthetic.data_identity(sweep)
    records = read_runs(folder)
    kept = _still_valid(sweep, records, identity["data_sha256"], options.test and of_language, say)
    due_now = [key for key in due(sweep, kept) if wanted(key, options.only)]
    say(f"{len(kept)} runs are there, {len(due_now)} can be made now")
    if not due_now:
        return folder
    if of_language:
        configs = {hook: language.placed(config, options, cache, say) for hook, config in configs.items()}
    devices = [use_device(name) for name in options.device.split(",")]
    work = Work(sweep, configs, identity, cache, ["val", "test"] if options.test else ["val"], devices)
    try:
        for number_made, (key, record) in enumerate(_made(work, kept, options, folder, say), start=1):
            records[key] = _with_training(records.get(key), record)
            write_runs(folder, {key: records[key] for key in _in_order(sweep, records)})
            say(f"{number_made}: {key.path}: {_line(record)}")
    except Interrupted as error:
        raise InterruptedError("the same command goes on; records that are written are kept") from error
    return folder


def _with_training(before: Mapping[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """A record of a model that was only measured again, with what its training took."""
    if before is None or "train" in record.get("seconds", {"train": 0}):
        return record
    of_training = {name: before[name] for name in ("peak_bytes",) if name in before}
    return {**record, **of_training, "seconds": {**before.get("seconds", {}), **record["seconds"]}}


def _claim(folder: Path, path: Path, changes: list[str]) -> None:
    """Write the sweep's file as its folder's study.yaml, unless that is the file that was read."""
    target = folder / "study.yaml"
    if not target.is_file() or not target.samefile(path):
        update_text(target, sweep_yaml(load_sweep(path, changes)[0]))
    elif changes:
        raise ConfigError(f"--set: found {changes[0]!r} for {path}, allowed: --out FOLDER, or a change of the file")


def wanted(key: RunKey, only: str | None) -> bool:
    """Whether --only asks for a run: by its arm's name or as HOOK/RUN, globs too."""
    return only is None or any(fnmatchcase(name, only) for name in (key.arm, key.path))


def _in_order(sweep: Sweep, records: Records) -> list[RunKey]:
    """The keys of all records: those that the sweep asks for in its order, then the others."""
    asked = [key for hook in sweep.places for key in sweep.keys(hook) if key in records]
    return asked + [key for key in records if key not in set(asked)]


def _still_valid(sweep: Sweep, records: Records, data_sha256: str, tested: bool, say: Say) -> dict[RunKey, Any]:
    """The records that the sweep asks for with the present settings and data; says why another one is made again."""
    asked, kept = {key for hook in sweep.places for key in sweep.keys(hook)}, {}
    for key, record in records.items():
        if key not in asked:
            continue
        if record["settings_sha256"] != settings_hash(sweep, key):
            say(f"{key.path}: made with other settings, is made again")
        elif record["data_sha256"] != data_sha256:
            say(f"{key.path}: made from other data, is made again")
        elif tested and record["failed"] is None and "test" not in record:
            say(f"{key.path}: has no test values, is measured again")
        else:
            kept[key] = record
    return kept


def due(sweep: Sweep, records: Records) -> list[RunKey]:
    """The runs that can be made now: every learning rate with the first seed, then the best one with the others.

    A seed at a time, so that a sweep that is cut off has all hooks and arms of its first seeds.
    """
    found = []
    for seed in sweep.seeds:
        for cell in sweep.cells:
            trials = trials_of(sweep, cell)
            runs = trials if seed == sweep.seeds[0] else _of_best(trials, records, seed)
            found += [run for run in runs if run not in records]
    return found


def trials_of(sweep: Sweep, cell: Cell) -> list[RunKey]:
    """The first seed's runs of a cell, one for every learning rate."""
    return [RunKey(*cell, lr, sweep.seeds[0]) for lr in sweep.rates(cell.arm)]


def _of_best(trials: list[RunKey], records: Records, seed: int) -> list[RunKey]:
    """The best trial with another seed, once all trials are there; a single learning rate needs no trial."""
    if len(trials) > 1 and not all(trial in records for trial in trials):
        return []
    best = best_trial(trials, records) if len(trials) > 1 else trials[0]
    return [] if best is None else [best._replace(seed=seed)]


def best_trial(trials: list[RunKey], records: Records) -> RunKey | None:
    """The trial with the largest validation EV, the first of equal ones; None where none has a value."""
    done = [run for run in trials if run in records and records[run]["failed"] is None]
    return max(done, key=lambda run: val_ev(records[run]), default=None)


def val_ev(record: Mapping[str, Any]) -> float:
    """EV on validation rows; of synthetic rows, which have no val, on the test rows."""
    found: float = record["val"]["metrics"]["ev"]["value"] if "val" in record else record["test"]["ev"]
    return found


def _line(record: Mapping[str, Any]) -> str:
    """A record in a few words."""
    if record["failed"] is not None:
        return str(record["failed"])
    if "val" not in record:
        test = record["test"]
        values = {"EV": test["ev"], "L0": test["l0"], "F1": test["features"]["f1"]}
        values |= {"MCC": test["features"]["mcc"], "edge F1": test["edges"]["forest"]["f1"]}
    else:
        metrics = record["val"]["metrics"]
        values = {name: metrics[name]["value"] for name in ("ev", "l0", "ce_recovered", "purity")}
    said = ", ".join(f"{name} {number(value, 4)}" for name, value in values.items())
    return f"{said}; " + ", ".join(f"{name} {taken} s" for name, taken in record["seconds"].items())


class Work(NamedTuple):
    """What every process knows of a sweep."""

    sweep: Sweep
    configs: Mapping[str, Config]
    identity: Mapping[str, Any]
    cache: Path
    splits: list[str]
    devices: list[str]

    def open(self, worker: int) -> Runs:
        """A worker's runs; workers share the devices evenly."""
        device = self.devices[worker % len(self.devices)]
        if self.sweep.world is not None:
            return synthetic.SyntheticRuns(self.sweep, self.configs, self.identity, device)
        return language.LanguageRuns(self.sweep, self.configs, self.identity, self.cache, self.splits, device)


def _made(
    work: Work, kept: dict[RunKey, Any], options: Options, folder: Path, say: Say
) -> Iterator[tuple[RunKey, dict[str, Any]]]:
    """Make what is due, as long as something is; adds each record to `kept` and yields it.

    A flat run that is sized by another one is started when that one's model lies in the cache, in its present form.
    """
    sweep, runs = work.sweep, work.open(0)
    begun: set[RunKey] = set()
    running: set[RunKey] = set()

    def asked() -> list[RunKey]:
        return [key for key in due(sweep, kept) if wanted(key, options.only)]

    def has_failed(key: RunKey) -> bool:
        return key in kept and kept[key]["failed"] is not None

    def is_there(key: RunKey) -> bool:
        return key in kept and runs.is_trained(key)

    def ready() -> list[tuple[RunKey, int]]:
        needed = [
            other for key in asked() for other in sweep.matched(key) if not (is_there(other) or has_failed(other))
        ]
        waiting = [key for key in dict.fromkeys([*needed, *asked()]) if key not in begun]
        free = [key for key in waiting if all(map(is_there, sweep.matched(key)))]
        room = options.workers - len(running)
        chosen = free[: room if options.limit is None else max(0, min(room, options.limit - len(begun)))]
        begun.update(chosen)
        running.update(chosen)
        return [(key, options.workers) for key in chosen]

    _state.update(runs=runs)
    with worker_pool(options.workers, _start, work, "sweep", "; records are kept") as pool:
        hooks = dict.fromkeys(key.hook for key in asked())
        for hook, future in [(hook, pool.submit(_prepare, hook)) for hook in hooks]:
            evidence = future.result()
            if evidence is not None:
                write_hook(folder, hook, {**work.identity, "evidence": evidence})
                say(f"{hook}: phase 1 is done")
        for record in results(pool, _record, ready):
            key = key_of(record)
            running.discard(key)
            kept[key] = record
            yield key, record
    for key in asked():
        for other in filter(has_failed, sweep.matched(key)):
            say(f"{key.path}: not made, because {other.arm}, which sizes it, failed")


# in the processes

_state: dict[str, Any] = {}  # of a process: its runs


def _start(worker: int, work: Work) -> None:
    """Begin a worker process."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    disable_progress_bar()
    _state.update(runs=work.open(worker))


def _prepare(hook: str) -> dict[str, Any] | None:
    evidence: dict[str, Any] | None = _state["runs"].prepare(hook)
    return evidence


def _record(key: RunKey, workers: int) -> dict[str, Any]:
    runs: Runs = _state["runs"]
    stamp = {"settings_sha256": settings_hash(runs.sweep, key), "workers": workers}
    return {**key._asdict(), **stamp, **runs.record(key)}
