"""A run folder: its files, its config, and what is loaded from it once and shared by the phases."""

import ctypes
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ..config import Config, ConfigError, dump_yaml, load_config
from ..data.concepts import Concepts
from ..data.corpus import Documents, load_documents, shortened, split_documents, with_held_out
from ..data.store import ActivationStore
from ..evaluation.concepts import Label
from ..evaluation.massive import norm_limit
from ..fileio import read_json, sha256_file, write_text
from ..lm import FINAL_HOOK, LanguageModel
from ..progress import Ticker
from ..provenance import Provenance, dependencies
from ..records import Checks
from ..units import duration
from .sources import source_files

PHASES = (1, 2, 3, 4)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
PIPED_WIDTH = 120  # columns of tables where there is no terminal to ask
LEFTOVER = ".*.????????.tmp"  # what fileio.atomic and save_pretrained call a file or folder that is not whole yet


class Run:
    """The folder runs/NAME (or --out) and everything that phases read from it.

    `stderr` sends what is said there, for a caller that writes a document to standard output; `read_only` leaves the
    folder as it is. Raises ConfigError naming the first field that differs when the folder belongs to another config
    and `force` is off.
    """

    def __init__(
        self,
        config: Config,
        out: Path | None = None,
        *,
        force: bool = False,
        quiet: bool = False,
        stderr: bool = False,
        read_only: bool = False,
    ):
        self.config = config
        self.folder = out if out is not None else Path("runs") / config.run.name
        self.force = force
        piped = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
        self.console = Console(quiet=quiet, stderr=stderr, width=PIPED_WIDTH if piped else None)
        self.device = use_device(config.run.device)
        torch.set_num_threads(config.run.threads)
        keep_freed_memory()
        torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
        # Nothing here reads what nothing has written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        random.seed(config.run.seed)
        if not read_only:
            self._require_folder()
        self.provenance = Provenance(self.folder)
        if not read_only:
            self._claim_folder()
            for part in (self.folder, self.activations, self.templates, *map(self.phase, PHASES)):
                remove_leftovers(part, deep=part != self.folder)

    @classmethod
    def open(cls, folder: Path, device: str | None = None, *, quiet: bool = False, stderr: bool = False) -> "Run":
        """An existing run folder with its own config, to read and not to change. Raises ConfigError if it is none."""
        path = folder / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"run folder: found {str(folder)!r} without config.yaml, allowed: what hsae run made")
        config = load_config(str(path), [f"run.device={device}"] if device is not None else None)
        return cls(config, folder, quiet=quiet, stderr=stderr, read_only=True)

    def _require_folder(self) -> None:
        """Raise ConfigError where no folder of this name can be, or something else is."""
        try:
            str(self.folder).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"--out: found {str(self.folder)!r}, allowed: a name in UTF-8, to be printed") from error
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ConfigError(f"--out: found {str(self.folder)!r}, not a folder; allowed: a folder or a new name")

    def _claim_folder(self) -> None:
        """Write config.yaml, or check that the one there asks for the same results of all phases that have begun."""
        path = self.folder / "config.yaml"
        text = dump_yaml(self.config)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        if path.exists() and not self.force:
            recorded = load_config(str(path))
            for phase in filter(self._has_begun, PHASES):
                before, now = dependencies(recorded, phase), dependencies(self.config, phase)
                if phase == 1:
                    before |= self.provenance.inputs(1) or source_files(recorded)
                    now |= self.sources
                for key in sorted(set(before) | set(now)):
                    if before.get(key) != now.get(key):
                        raise ConfigError(
                            f"{key}: found {now.get(key)!r}, but {self.folder} was made with {before.get(key)!r}; "
                            "use --force to make what depends on it again, or --out for another folder"
                        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    def _has_begun(self, phase: int) -> bool:
        return self.phase(phase).exists() or (phase == 1 and self.activations.exists())

    def require_done(self, *phases: int) -> None:
        """Raise ConfigError unless these phases, as far as they have arms, were finished with the present config.

        Phase 1's inputs have to be the same, too, as far as they are still there.
        """
        for phase in phases:
            if phase == 1 or any(arm.phase == phase for arm in self.config.arms):
                self.provenance.require(phase, self.config, self.sources if phase == 1 else {})

    def finish(self, phase: int, inputs: dict[str, str], started: float) -> None:
        """Record a phase that began at `started` (time.monotonic) as done, and say how long it took."""
        seconds = time.monotonic() - started
        self.provenance.record(phase, self.config, inputs, self.device, seconds)
        self.say(f"phase {phase}: done in {duration(seconds)}")

    # files

    @property
    def activations(self) -> Path:
        return self.folder / "activations"

    @property
    def templates(self) -> Path:
        """Folder of the store of rows from templates; there only where `concepts.prompts` made some."""
        return self.folder / "templates"

    def phase(self, number: int) -> Path:
        return self.folder / f"phase{number}"

    def arm_folder(self, name: str) -> Path:
        """phase2/ARM or phase3/ARM."""
        return self.phase(self.config.arm(name).phase) / name

    def hashes(self, *paths: Path) -> dict[str, str]:
        """sha256 of files by their path in the run folder. Raises ConfigError when one has not been made."""
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{path}: missing; run the earlier phases first (hsae run does them in order)")
        return {path.relative_to(self.folder).as_posix(): sha256_file(path) for path in paths}

    # contents, loaded once

    @cached_property
    def sources(self) -> dict[str, str]:
        """sha256 of what the config names outside the run folder, by field."""
        return source_files(self.config)

    @cached_property
    def lm(self) -> LanguageModel:
        model = self.config.model
        if self.console.quiet or not self.console.is_terminal:
            disable_progress_bar()  # of loading, on standard error, where errors are one line
        return LanguageModel.load(model.name, revision=model.revision, dtype=model.dtype, device=self.device)

    @cached_property
    def concepts(self) -> Concepts:
        return Concepts.from_json(read_json(self.phase(1) / "concepts.json"))

    @cached_property
    def documents(self) -> tuple[Documents, dict[str, Tensor]]:
        """All documents, and the numbers of those of train, val and test."""
        return load_corpus(self.config, self.lm.tokenizer, self.lm.tokenizer_sha256)

    @cached_property
    def all_rows(self) -> ActivationStore:
        """Every row of the harvest, those of massive norm too."""
        return ActivationStore.open(self.activations, verify=True)

    @cached_property
    def norm_limit(self) -> float | None:
        """The norm above which a row is massive and left out; None where none is (data.max_norm_multiple)."""
        multiple = self.config.data.max_norm_multiple
        return None if multiple is None else norm_limit(self.all_rows, multiple)

    @cached_property
    def _parted(self) -> tuple[ActivationStore, ActivationStore | None]:
        return (self.all_rows, None) if self.norm_limit is None else self.all_rows.parted(self.norm_limit)

    @cached_property
    def store(self) -> ActivationStore:
        """The rows that models are trained and measured on."""
        return self._parted[0]

    @property
    def massive(self) -> ActivationStore | None:
        """The rows that are left out of `store`; None where none can be."""
        return self._parted[1]

    @cached_property
    def from_templates(self) -> ActivationStore | None:
        """The rows from templates; None where none were asked for or needed."""
        if self.config.concepts.prompts is None:
            return None
        checks = read_json(self.phase(1) / "checks.json", Checks)
        made = any(parent["templated"] is not None for parent in checks["parents"])
        if not made:
            return None
        store = ActivationStore.open(self.templates, verify=True)
        return store if self.norm_limit is None else store.parted(self.norm_limit)[0]

    @cached_property
    def train_moments(self) -> tuple[Tensor, float]:
        """Mean [d] (float64) of the train rows and their mean squared distance from it."""
        return self.store.moments("train")

    @cached_property
    def row_norm(self) -> float:
        """Median norm of the train rows, the unit of a steering dose."""
        return float(self.store.column("train", "norm").median())

    @property
    def hook(self) -> str:
        """The module that is read, by its own name (`layers.-2` of the config is a different one in every model)."""
        return self.lm.resolve_hook(self.config.model.hook)

    @property
    def label(self) -> Label:
        """Which concept a row carries; always `current_token` for a model that predicts nothing."""
        return self.config.concepts.label if self.lm.has_head else "current_token"

    @property
    def at_final_residual(self) -> bool:
        return self.config.model.hook == FINAL_HOOK

    # talking to the user

    def say(self, message: str) -> None:
        """One line for the user."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Ticker]:
        """A progress bar on a terminal, a line every tenth of the way elsewhere."""
        ticker = Ticker(self.console, what, unit)
        with ticker.bar:
            yield ticker


def load_corpus(config: Config, tokenizer: Any, tokenizer_sha256: str | None) -> tuple[Documents, dict[str, Tensor]]:
    """All documents of a config's corpus, and the numbers of those of train, val and test."""
    options, seed = config.corpus, config.run.seed

    def load(path: str | None, max_tokens: int) -> Documents:
        return load_documents(
            options.kind,
            path,
            tokenizer,
            max_tokens=max_tokens,
            context_length=options.context_length,
            tokenizer_sha256=tokenizer_sha256,
            documents=options.documents,
            text_field=options.text_field,
            start=options.document_start,
        )

    documents, most = load(options.path, options.max_tokens), options.heldout_document_tokens
    if options.heldout_path is None:
        splits = split_documents(documents.n_documents, options.split, seed)
        if most is not None:
            documents = shortened(documents, most, torch.cat([splits["val"], splits["test"]]))
        return documents, splits
    held_out = load(options.heldout_path, options.heldout_tokens)
    return with_held_out(documents, held_out if most is None else shortened(held_out, most), seed)


def run_folder_of(path: Path) -> Path:
    """The run folder that a file or folder lies in. Raises ConfigError when there is none above it."""
    for folder in path.resolve().parents:
        if (folder / "config.yaml").is_file() and (folder / "activations").is_dir():
            return folder
    raise ConfigError(f"--on: found no run folder above {str(path)!r}, allowed: --on RUN")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: mapping every large tensor anew costs a fifth of a training step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def remove_leftovers(folder: Path, *, deep: bool) -> None:
    """Delete temporary files and folders that a killed process left in `folder` and, if `deep`, below it."""
    for path in sorted(folder.rglob(LEFTOVER) if deep else folder.glob(LEFTOVER)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have lain in a folder that is gone by now


def use_device(name: str) -> str:
    """A device that is there, for run.device; a GPU becomes the process's current one. Raises ConfigError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"run.device: found {name!r}, allowed: auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ConfigError(f"run.device: found {name!r}, allowed: one of {count} CUDA devices, or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return name
