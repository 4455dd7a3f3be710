"""`hsae synthetic run`: which runs are due, on which devices, and their files.

A run's file is written when it is done, and is not made again while its settings are the present ones.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from ...config import ConfigError
from ...fileio import read_json, update_text, write_json
from ...phases.run import keep_freed_memory, use_device
from ...report.words import number
from .measure import run_once
from .plan import SyntheticRun, SyntheticStudy, dump_synthetic, load_synthetic, settings_hash
from .table import write_table

Say = Callable[[str], None]


class Record(TypedDict):
    """What is read of a run's file before its numbers are."""

    arm: str
    seed: int
    settings_sha256: str
    failed: str | None


@dataclass(frozen=True)
class Options:
    """How a study is run; nothing of it changes a result. `device`: one, or several with commas."""

    only: str | None = None
    workers: int = 1
    device: str = "auto"


def run_synthetic(path: Path, overrides: list[str], out: Path | None, options: Options, say: Say) -> Path:
    """Make all runs of a study that are due, and its table after each; returns the study's folder."""
    study = load_synthetic(path, overrides)
    folder = path.parent if out is None else out
    if overrides and (folder / "study.yaml").is_file() and (folder / "study.yaml").samefile(path):
        raise ConfigError(f"--set: found {overrides[0]!r} for {path}, allowed: --out FOLDER, or a change of the file")
    if not (folder / "study.yaml").is_file() or not (folder / "study.yaml").samefile(path):
        update_text(folder / "study.yaml", dump_synthetic(study))
    wanted = [run for run in study.runs if options.only is None or fnmatchcase(run.arm, options.only)]
    if not wanted:
        names = ", ".join(arm.name for arm in study.arms)
        raise ConfigError(f"--only: found {options.only!r}, allowed: {names}, or a glob of them")
    devices = [use_device(name) for name in options.device.split(",")]
    missing = [run for run in wanted if not is_done(study, folder, run)]
    say(f"synthetic: {len(wanted) - len(missing)} of {len(wanted)} runs are there")
    for record in _made(study, missing, devices, options.workers):
        write_json(folder / "runs" / SyntheticRun(record["arm"], record["seed"]).file, record)
        say(f"synthetic: {_line(record)}")
        write_table(folder)
    return folder


def is_done(study: SyntheticStudy, folder: Path, run: SyntheticRun) -> bool:
    """Whether a run's record is there and has the present settings."""
    path = folder / "runs" / run.file
    return path.is_file() and read_json(path, Record)["settings_sha256"] == settings_hash(study, run)


def _line(record: dict[str, Any]) -> str:
    """A run's result in a few words."""
    if record["failed"] is not None:
        return f"{record['arm']} seed {record['seed']}: {record['failed']}"
    features, rate, edges = record["features"], record["rows_per_second"], record["edges"]["forest"]["f1"]
    speed = "not trained" if rate is None else f"{rate:,} rows/s"
    return (
        f"{record['arm']} seed {record['seed']}: EV {record['ev']:.4f}, L0 {record['l0']:.2f}, "
        f"F1 {features['f1']:.4f}, MCC {features['mcc']:.4f}, edge F1 {number(edges, 4)}; {speed}, "
        f"{record['train_seconds']:.0f} of {record['seconds']:.0f} s"
    )


def _made(
    study: SyntheticStudy, runs: list[SyntheticRun], devices: list[str], workers: int
) -> Iterator[dict[str, Any]]:
    """The records of runs, each as soon as it is there; several runs at once share the devices evenly."""
    if workers == 1:
        keep_freed_memory()
        for run in runs:
            yield run_once(study, run, devices[0], workers)
        return
    waiting = list(runs)
    free = [devices[worker % len(devices)] for worker in range(workers)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (workers,)) as pool:
        pending: dict[Future[dict[str, Any]], str] = {}
        try:
            while waiting or pending:
                while waiting and free:
                    device = free.pop(0)
                    pending[pool.submit(run_once, study, waiting.pop(0), device, workers)] = device
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    free.append(pending.pop(future))
                    yield future.result()
        except BrokenProcessPool as error:
            raise OSError("synthetic: a worker was killed (out of memory?), try fewer --workers") from error
        except BaseException:
            for process in multiprocessing.active_children():  # only this process writes, so nothing is half-written
                process.kill()
            raise


def _start(workers: int) -> None:
    """Begin a worker process."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)  # a terminal sends them to all; the parent process ends its workers
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    keep_freed_memory()
