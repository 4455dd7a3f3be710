"""`hsae study run`: which runs are due, where they run, and their files.

A run's JSON file is written whole when it is done; a run whose file is there and has the present settings is not made
again. So a study that was stopped goes on, and one that was changed makes anew what the change affects.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar
from typing_extensions import TypedDict

from ..config import Config, ConfigError
from ..fileio import read_json, update_text, write_json
from ..phases.run import keep_freed_memory, remove_leftovers, use_device
from ..training.trainer import Interrupted
from .data import StudyData
from .measure import run_once
from .plan import Cell, RunKey, Study, dump_study, load_study, places_removed, settings_hash

Say = Callable[[str], None]


class Record(TypedDict):
    """What is read of a run's file before its numbers are."""

    arm: str
    hook: str
    l0: int
    seed: int
    lr: float
    settings_sha256: str
    data_sha256: str
    failed: str | None


Records = Mapping[RunKey, Any]


@dataclass(frozen=True)
class Options:
    """How a study is run; nothing of it changes a result."""

    only: str | None = None
    limit: int | None = None
    workers: int = 1
    test: bool = False
    device: str = "auto"
    cache: Path = Path("runs/study-cache")


def run_study(path: Path, overrides: list[str], out: Path | None, options: Options, say: Say) -> Path:
    """Make all runs of a study that are due; returns the study's folder."""
    study, base = load_study(path, overrides)
    folder = Path("studies") / study.name if out is None else out
    _claim(folder, path, overrides, study)
    if not any(wanted(cell, options.only) for cell in study.cells):
        names = ", ".join(arm.name for arm in study.arms)
        raise ConfigError(f"--only: found {options.only!r}, allowed: {names}, or a glob of ARM-HOOK-L0")
    device = use_device(options.device)
    disable_progress_bar()  # of loading, on standard error, where errors are one line
    torch.set_num_threads(base.run.threads)
    with_device = base.model_copy(update={"run": base.run.model_copy(update={"device": device})})
    data = StudyData(study, with_device, options.cache, device)
    data.prepare(say)
    records = _finished(study, base, data.sha256, folder, options.test, say)
    say(f"study: {len(records)} of {n_runs(study)} runs are there")
    try:
        for record in _made(study, with_device, data, records, options):
            run = key_of(record)
            write_json(folder / "runs" / run.file, record)
            say(f"study: {len(records)} of {n_runs(study)}: {run.file.removesuffix('.json')}: {_line(record)}")
    except Interrupted as error:
        raise InterruptedError("the same command goes on; runs that are done are kept") from error
    return folder


def wanted(cell: Cell, only: str | None) -> bool:
    """Whether --only asks for a cell: by its arm's name or as ARM-HOOK-L0, globs too."""
    return only is None or any(fnmatchcase(name, only) for name in (cell.arm, f"{cell.arm}-{cell.hook}-{cell.l0}"))


def _line(record: Mapping[str, Any]) -> str:
    """A run's result in a few words."""
    if record["failed"] is not None:
        return str(record["failed"])
    values = [f"{record['val'][name]['value'] or float('nan'):.4f}" for name in ("ev", "ce_recovered")]
    return f"EV {values[0]}, CE recovered {values[1]}, {record['train_seconds']:.1f} of {record['seconds']:.1f} s"


def n_runs(study: Study) -> int:
    """Runs of a study: every rate with the first seed, the best one with the others."""
    return sum(len(study.rates(study.arm(cell.arm))) + len(study.seeds) - 1 for cell in study.cells)


def key_of(record: Mapping[str, Any]) -> RunKey:
    """Which run a record is of."""
    return RunKey(*(record[field] for field in RunKey._fields))


def due(study: Study, records: Records) -> list[RunKey]:
    """The runs that can be made now: rates not tried yet, then the best rate's other seeds.

    records: of the finished ones.
    """
    return [run for cell in study.cells for run in _due_in(study, cell, records)]


def _due_in(study: Study, cell: Cell, records: Records) -> list[RunKey]:
    trials = [RunKey(*cell, study.seeds[0], lr) for lr in study.rates(study.arm(cell.arm))]
    missing = [run for run in trials if run not in records]
    if missing:
        return missing
    best = best_trial(trials, records)
    if best is None:
        return []
    return [run for seed in study.seeds[1:] if (run := best._replace(seed=seed)) not in records]


def best_trial(trials: list[RunKey], records: Records) -> RunKey | None:
    """The trial with the largest validation EV, the first of equal ones; None where all have failed."""
    done = [run for run in trials if records[run]["failed"] is None]
    return max(done, key=lambda run: records[run]["val"]["ev"]["value"], default=None)


def read_records(folder: Path) -> dict[RunKey, Any]:
    """All records in a study's folder. Raises ValueError for a file that is none, or has another run's name."""
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = read_json(path, Record)
        run = key_of(record)
        if run.file != path.name:
            raise ValueError(f"{path}: found the record of {run.file}, allowed: a file of its own name")
        found[run] = record
    return found


def _finished(
    study: Study, base: Config, data_sha256: str, folder: Path, test: bool, say: Say
) -> dict[RunKey, dict[str, Any]]:
    """Records with the present settings and data; says which of the study's runs have others and are made again."""
    kept = {}
    seeds, rates = set(study.seeds), {arm.name: study.rates(arm) for arm in study.arms}
    for run, record in read_records(folder).items():
        if not (Cell(*run[:3]) in study.cells and run.seed in seeds and run.lr in rates[run.arm]):
            continue
        if record["settings_sha256"] != settings_hash(study, run):
            say(f"study: {run.file}: made with other settings, is made again")
        elif record["data_sha256"] != data_sha256:
            say(f"study: {run.file}: made from other data, is made again")
        elif test and record["failed"] is None and "test" not in record:
            say(f"study: {run.file}: has no test values, is made again")
        else:
            kept[run] = record
    return kept


def _claim(folder: Path, path: Path, overrides: list[str], study: Study) -> None:
    """Write the study's file into its folder, unless it is the one that was read. Raises ConfigError."""
    remove_leftovers(folder, deep=True)
    lasting = places_removed(overrides)
    target = folder / "study.yaml"
    if target.is_file() and target.samefile(path):
        if lasting:
            raise ConfigError(
                f"--set: found {lasting[0]!r} for {target}, allowed: --out FOLDER, or a change of the file"
            )
        return
    update_text(target, dump_study(load_study(path, lasting)[0]))


def _made(
    study: Study, config: Config, data: StudyData, records: dict[RunKey, Any], options: Options
) -> Iterator[dict[str, Any]]:
    """Makes what is due, as long as something is; adds each record to `records` and yields it."""
    started: set[RunKey] = set()

    def startable() -> list[RunKey]:
        runs = [run for run in due(study, records) if run not in started]
        runs = [run for run in runs if wanted(Cell(*run[:3]), options.only)]
        return runs if options.limit is None else runs[: max(0, options.limit - len(started))]

    if options.workers == 1:
        keep_freed_memory()
        while runs := startable():
            started.add(runs[0])
            record = run_once(study, config, data, runs[0], test=options.test, workers=1)
            records[runs[0]] = record
            yield record
        return
    worker = (study, config, options, data.device)
    data.__dict__.pop("lm", None)  # every worker loads its own
    torch.cuda.empty_cache()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _start, worker) as pool:
        pending: dict[Future[dict[str, Any]], RunKey] = {}
        try:
            while True:
                for run in startable():
                    started.add(run)
                    pending[pool.submit(_work, run)] = run
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    records[pending.pop(future)] = future.result()
                    yield future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "study: a worker was killed (out of memory?), try fewer --workers; finished runs are kept"
            ) from error
        except BaseException:
            # Only this process writes records, so nothing is half-written; unfinished runs are made another time.
            for process in multiprocessing.active_children():
                process.kill()
            raise


_worker: list[Any] = []  # of a worker process: the study, its config and its data


def _start(study: Study, config: Config, options: Options, device: str) -> None:
    """Begin a worker process: it loads what its runs share once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all; the parent process ends its workers
    use_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    keep_freed_memory()
    disable_progress_bar()
    _worker[:] = [study, config, StudyData(study, config, options.cache, device), options]


def _work(run: RunKey) -> dict[str, Any]:
    study, config, data, options = _worker
    return run_once(study, config, data, run, test=options.test, workers=options.workers)
