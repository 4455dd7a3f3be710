"""`hsae study run`: which runs are due, where they run, and their files.

A run's JSON file is written whole when it is done; a run whose file is there and has the present settings is not made
again. So a study that was stopped goes on, and one that was changed makes anew what the change affects.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar
from typing_extensions import TypedDict

from ..config import Config
from ..fileio import write_json
from ..phases.run import remove_leftovers, use_device
from ..training.trainer import Interrupted
from .data import StudyData
from .files import claim, key_of, nothing_wanted, read_records, still_valid, study_folder, study_yaml
from .measure import run_once
from .plan import Cell, RunKey, Study, load_study, places_removed, settings_hash
from .workers import Options, Say, results, threads_each, worker_pool


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


def run_study(path: Path, overrides: list[str], out: Path | None, options: Options, say: Say) -> Path:
    """Make all runs of a study that are due; returns the study's folder."""
    study, base = load_study(path, overrides)
    folder = study_folder(path, study.name, out)
    cache = options.cache or folder / "cache"
    say(f"records in {folder}, activations in {cache}")
    remove_leftovers(folder, deep=True)
    lasting = places_removed(overrides)
    refusal = f"{folder / 'study.yaml'}, allowed: --out FOLDER, or a change of the file"
    claim(folder, path, lasting, lambda: study_yaml(load_study(path, lasting)[0]), refusal)
    if not any(wanted(cell, options.only) for cell in study.cells):
        raise nothing_wanted(options.only, [arm.name for arm in study.arms], "ARM-HOOK-L0")
    device = use_device(options.device)
    disable_progress_bar()  # of loading, on standard error, where errors are one line
    torch.set_num_threads(base.run.threads)
    with_device = base.model_copy(update={"run": base.run.model_copy(update={"device": device})})
    data = StudyData(study, with_device, cache, device)
    data.prepare(say)
    asked = {run: record for run, record in records_in(folder).items() if study.asks(run)}
    untested = "has no test values, is made again" if options.test else None
    records = still_valid(asked, partial(settings_hash, study), data.sha256, untested, say)
    say(f"{len(records)} of {n_runs(study)} runs are there")
    try:
        for record in _made(study, with_device, data, records, options):
            run = key_of(RunKey, record)
            write_json(folder / "runs" / run.file, record)
            say(f"{len(records)} of {n_runs(study)}: {run.file.removesuffix('.json')}: {_line(record)}")
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


def records_in(folder: Path) -> dict[RunKey, Any]:
    """All records in a study's folder. Raises ValueError for a file that is none, or has another run's name."""
    return read_records(folder, "*.json", Record, RunKey)


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


def _made(
    study: Study, config: Config, data: StudyData, records: dict[RunKey, Any], options: Options
) -> Iterator[dict[str, Any]]:
    """Makes what is due, as long as something is; adds each record to `records` and yields it."""
    started: set[RunKey] = set()

    def ready() -> list[tuple[RunKey]]:
        runs = [run for run in due(study, records) if run not in started and wanted(run.cell, options.only)]
        left = len(runs) if options.limit is None else options.limit - len(started)
        runs = runs[: min(left, 1) if options.workers == 1 else left]
        started.update(runs)
        return [(run,) for run in runs]

    if options.workers == 1:
        _worker[:] = [study, config, data, options]
    else:
        data.__dict__.pop("lm", None)  # every worker loads its own
        torch.cuda.empty_cache()
    of_worker = (study, config, options, data.cache, data.device)
    with worker_pool(options.workers, _start, of_worker, "study", "; finished runs are kept") as pool:
        for record in results(pool, _work, ready):
            records[key_of(RunKey, record)] = record
            yield record


_worker: list[Any] = []  # of a process that makes runs: the study, its config, its data and the options


def _start(study: Study, config: Config, options: Options, cache: Path, device: str) -> None:
    """Begin a worker process: it loads what its runs share once."""
    use_device(device)
    torch.set_num_threads(threads_each(options.workers, config.run.threads))
    disable_progress_bar()
    _worker[:] = [study, config, StudyData(study, config, cache, device), options]


def _work(run: RunKey) -> dict[str, Any]:
    study, config, data, options = _worker
    return run_once(study, config, data, run, test=options.test, workers=options.workers)
