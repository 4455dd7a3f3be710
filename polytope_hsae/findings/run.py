"""`hsae findings run`: which models are due, where they are made, and their records.

A record is written when its model is measured, and one with the present settings and data is not made again. Every hook
has a run folder in the cache: phase 1 is made there once, then every arm with every seed.

    CACHE/TEXT.safetensors            a text's tokens
    CACHE/<hash>/HOOK/                a run folder: activations/, phase1/, phase2/ARM-sSEED/, phase3/ARM-sSEED/
    FOLDER/study.yaml                 the study
    FOLDER/runs/HOOK-sSEED/ARM.json   a record
    FOLDER/runs/HOOK.json             the hook's evidence, without long columns
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar
from typing_extensions import TypedDict

from ..config import Config, located
from ..data.corpus import corpus_sha256, load_documents
from ..fileio import read_json, sha256_file, sha256_json, write_json, write_tensors
from ..lm import LanguageModel
from ..phases.phase1_teacher import run_phase1
from ..phases.run import Run, remove_leftovers, use_device
from ..phases.sources import source_files
from ..provenance import dependencies
from ..report.words import number
from ..study.data import text_hashes, text_options
from ..study.files import claim, key_of, nothing_wanted, read_records, still_valid, study_folder, study_yaml
from ..study.plan import places_removed
from ..study.workers import Options, Say, results, threads_each, worker_pool
from ..training.trainer import Interrupted
from .plan import Findings, Key, load_findings, settings_hash
from .record import Bench, make_record, short_evidence


class Record(TypedDict):
    """What is read of a record before its numbers are, which val and test hold."""

    hook: str
    seed: int
    arm: str
    settings_sha256: str
    data_sha256: str
    code: dict[str, Any]
    failed: str | None


class OfHook(TypedDict):
    """What is kept of a hook's phase 1."""

    hook: str
    data_sha256: str
    evidence: dict[str, Any]


def run_findings(path: Path, overrides: list[str], out: Path | None, options: Options, say: Say) -> Path:
    """Make all records of a study that are due; returns the study's folder."""
    study, configs = load_findings(path, overrides)
    folder = study_folder(path, study.name, out)
    cache = options.cache or folder / "cache"
    say(f"records in {folder}, activations and models in {cache}")
    remove_leftovers(folder, deep=True)
    lasting = places_removed(overrides)
    refusal = f"a study's own folder, allowed: --out FOLDER, or a change of {folder / 'study.yaml'}"
    claim(folder, path, lasting, lambda: study_yaml(load_findings(path, lasting)[0], "json"), refusal)
    if not any(wanted(key, options.only) for key in study.keys):
        raise nothing_wanted(options.only, [arm.name for arm in study.arms], "HOOK-sSEED/ARM")
    disable_progress_bar()  # of loading, on standard error, where errors are one line
    first = next(iter(configs.values()))
    lm = LanguageModel.load(first.model.name, revision=first.model.revision, dtype=first.model.dtype)
    inputs = data_identity(first, lm)
    keys = set(study.keys)
    asked = {key: record for key, record in records_in(folder).items() if key in keys}
    untested = "has no test values, is measured again" if options.test else None
    kept = still_valid(asked, partial(settings_hash, study), inputs["data_sha256"], untested, say)
    say(f"{len(kept)} of {len(study.keys)} records are there")
    due = [key for key in study.keys if key not in kept and wanted(key, options.only)][: options.limit]
    if not due:
        return folder
    placed = {hook: _placed(config, lm, options, cache, say) for hook, config in configs.items()}
    work = Work(study, {hook: _run_folder(cache, config, inputs) for hook, config in placed.items()}, inputs)
    del lm
    due = _with_matched(configs, due, work.folders)
    try:
        for made in _made(work, placed, due, options):
            if isinstance(made, str):
                write_json(folder / "runs" / f"{made}.json", _of_hook(made, work))
                say(f"{made}: phase 1 is done")
                continue
            key = key_of(Key, made)
            kept[key] = made
            write_json(folder / "runs" / key.file, made)
            say(f"{len(kept)} of {len(study.keys)}: {key.file.removesuffix('.json')}: {_line(made)}")
    except Interrupted as error:
        raise InterruptedError("the same command goes on; records that are written are kept") from error
    return folder


def wanted(key: Key, only: str | None) -> bool:
    """Whether --only asks for a model: by its arm's name or as HOOK-sSEED/ARM, globs too."""
    return only is None or any(fnmatchcase(name, only) for name in (key.arm, key.file.removesuffix(".json")))


def records_in(folder: Path) -> dict[Key, Any]:
    """All records of a study's folder. Raises ValueError for a file that is none, or has another model's name."""
    return read_records(folder, "*/*.json", Record, Key)


def read_hooks(folder: Path) -> dict[str, Any]:
    """What is kept of every hook's phase 1, by hook."""
    found = [read_json(path, OfHook) for path in sorted((folder / "runs").glob("*.json"))]
    return {content["hook"]: content for content in found}


def data_identity(config: Config, lm: LanguageModel) -> dict[str, Any]:
    """What every record says of its text, language model and ontology; nothing in it names a place."""
    ontology = config.concepts.ontology
    texts = {"train": config.corpus.path, "heldout": config.corpus.heldout_path}
    known: dict[str, Any] = {
        "text_sha256": text_hashes(config.corpus.kind, texts),
        "model_revision": lm.revision,
        "tokenizer_sha256": lm.tokenizer_sha256,
        "ontology": ontology if ontology == "wordnet" else sha256_file(ontology),
    }
    # what studies did not have from the start counts where it is used, so that older records stay valid
    used = ("concepts.prompts", "concepts.exclude", "concepts.wordnet")
    known |= {field: digest for field, digest in source_files(config).items() if field.startswith(used)}
    return {**known, "data_sha256": sha256_json(known)}


def _placed(config: Config, lm: LanguageModel, options: Options, cache: Path, say: Say) -> Config:
    """The config with the device and threads of its workers, and its text as a file of tokens in the cache."""
    tree = config.model_dump(mode="json")
    threads = threads_each(options.workers, config.run.threads)
    tree["run"] |= {"device": use_device(options.device), "threads": threads}
    corpus = tree["corpus"]
    if config.corpus.kind == "text":
        for field, limit in (("path", "max_tokens"), ("heldout_path", "heldout_tokens")):
            if corpus[field] is not None:
                corpus[field] = str(_tokens(config, corpus[field], corpus[limit], lm, cache, say))
        corpus |= {"source": "tokens", "documents": "packed"}
    return located(Config.model_validate(tree))


def _tokens(config: Config, text: str, max_tokens: int, lm: LanguageModel, cache: Path, say: Say) -> Path:
    """A text's tokens, which every process reads in no time."""
    options = config.corpus
    made_from = [corpus_sha256("text", text), lm.tokenizer_sha256, max_tokens, options.context_length]
    path = cache / f"{sha256_json([*made_from, text_options(options)])[:16]}.safetensors"
    if not path.is_file():
        documents = load_documents(
            "text",
            text,
            lm.tokenizer,
            max_tokens=max_tokens,
            context_length=options.context_length,
            documents=options.documents,
            start=options.document_start,
        )
        tensors = {"tokens": documents.tokens, "doc_start": documents.starts}
        write_tensors(path, tensors, {"tokenizer_sha256": str(lm.tokenizer_sha256)})
        say(f"{Path(text).name}: {documents.n_documents:,} documents, {documents.n_tokens:,} tokens")
    return path


def _run_folder(cache: Path, config: Config, inputs: Mapping[str, Any]) -> Path:
    identity = [dependencies(config, 1), inputs["data_sha256"]]
    return cache / sha256_json(identity)[:16] / config.model.hook


def _with_matched(configs: Mapping[str, Config], due: list[Key], folders: Mapping[str, Path]) -> list[Key]:
    """The models that are due, each after the one that it is matched with, where that one is not in the cache."""
    ordered: list[Key] = []
    for key in due:
        for other in _matched(configs[key.hook], key):
            if not (folders[key.hook] / "phase2" / other.name / "train.json").is_file() and other not in ordered:
                ordered.append(other)
        if key not in ordered:
            ordered.append(key)
    return ordered


def _matched(config: Config, key: Key) -> list[Key]:
    names = sorted(set(config.arm(key.name).match.values()))
    return [key._replace(arm=name.removesuffix(f"-s{key.seed}")) for name in names]


def _of_hook(hook: str, work: "Work") -> dict[str, Any]:
    """What is kept of a hook's phase 1."""
    evidence = read_json(work.folders[hook] / "phase1" / "evidence.json")
    return {"hook": hook, **work.inputs, "evidence": short_evidence(evidence)}


def _line(record: Mapping[str, Any]) -> str:
    """A record in a few words."""
    if record["failed"] is not None:
        return str(record["failed"])
    metrics = record["val"]["metrics"]
    values = [f"{name} {number(metrics[name]['value'])}" for name in ("ev", "purity", "leakage")]
    return f"{', '.join(values)}; " + ", ".join(f"{name} {taken} s" for name, taken in record["seconds"].items())


# the processes


@dataclass(frozen=True)
class Work:
    """What every process knows: the study, its run folders and what they are made from."""

    study: Findings
    folders: Mapping[str, Path]
    inputs: Mapping[str, Any]


def _made(work: Work, configs: Mapping[str, Config], due: list[Key], options: Options) -> Iterator[Any]:
    """Phase 1 of every hook that is due (yields its name), then every model, as it is done (yields its record)."""
    of_worker = (work, use_device(options.device))
    if options.workers == 1:
        _open(*of_worker)
    with worker_pool(options.workers, _start, of_worker, "findings", "; records are kept") as pool:
        hooks = dict.fromkeys(key.hook for key in due)
        for hook, future in [(hook, pool.submit(_phase1, hook, configs[hook])) for hook in hooks]:
            future.result()
            yield hook
        yield from _records(pool, work.study, configs, due, options)


def _records(
    pool: Executor, study: Findings, configs: Mapping[str, Config], due: list[Key], options: Options
) -> Iterator[Any]:
    """The records of the models that are due, each started after the one that it is matched with."""
    waiting, missing = list(due), set(due)
    at_once = 1 if options.workers == 1 else 2 * options.workers
    splits = ["val", "test"] if options.test else ["val"]

    def ready() -> list[tuple[Key, str, list[str]]]:
        free = [key for key in waiting if not missing.intersection(_matched(configs[key.hook], key))]
        started = len(missing) - len(waiting)
        keys = free[: at_once - started]
        for key in keys:
            waiting.remove(key)
        return [(key, settings_hash(study, key), splits) for key in keys]

    for record in results(pool, _record, ready):
        missing.discard(key_of(Key, record))
        yield record


_state: dict[str, Any] = {}  # of a process: its work and what it has opened


def _start(work: Work, device: str) -> None:
    """Begin a worker process."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    disable_progress_bar()
    _open(work, device)


def _open(work: Work, device: str) -> None:
    _state.update(work=work, bench=Bench(work.folders, device))


def _phase1(hook: str, config: Config) -> None:
    run_phase1(Run(config, _state["work"].folders[hook], force=True, quiet=True))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(key: Key, settings_sha256: str, splits: list[str]) -> Any:
    work = _state["work"]
    return make_record(work.study, _state["bench"], key, {"settings_sha256": settings_sha256, **work.inputs}, splits)
