"""`hsae synthetic run`: which runs are due, on which devices, and their files.

A run's file is written when it is done, and is not made again while its settings are the present ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from ...fileio import read_json, write_json
from ...phases.run import use_device
from ...report.words import number
from ..files import claim, key_of, nothing_wanted, study_folder, study_yaml
from ..workers import Say, results, threads_each, worker_pool
from .measure import run_once
from .plan import SyntheticRun, SyntheticStudy, load_synthetic, settings_hash
from .table import write_table


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
    folder = study_folder(path, study.name, out)
    say(f"records in {folder}")
    refusal = f"{path}, allowed: --out FOLDER, or a change of the file"
    claim(folder, path, overrides, lambda: study_yaml(study), refusal)
    wanted = [run for run in study.runs if options.only is None or fnmatchcase(run.arm, options.only)]
    if not wanted:
        raise nothing_wanted(options.only, [arm.name for arm in study.arms], "them")
    devices = [use_device(name) for name in options.device.split(",")]
    missing = [run for run in wanted if not is_done(study, folder, run)]
    say(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there")
    for record in _made(study, missing, devices, options.workers):
        write_json(folder / "runs" / key_of(SyntheticRun, record).file, record)
        say(_line(record))
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
    waiting = list(runs)
    free = [devices[worker % len(devices)] for worker in range(workers)]

    def ready() -> list[tuple[Any, ...]]:
        calls = [(study, run, device, workers) for run, device in zip(waiting, free, strict=False)]
        del waiting[: len(calls)], free[: len(calls)]
        return calls

    threads = threads_each(workers, torch.get_num_threads())
    with worker_pool(workers, torch.set_num_threads, (threads,), "synthetic") as pool:
        for device, record in results(pool, _work, ready):
            free.append(device)
            yield record


def _work(study: SyntheticStudy, run: SyntheticRun, device: str, workers: int) -> tuple[str, dict[str, Any]]:
    return device, run_once(study, run, device, workers)
