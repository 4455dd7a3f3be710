"""Runs on a language model's rows: every hook has a run folder in the cache, with an arm for every run.

CACHE/TEXT.safetensors      a text's tokens
CACHE/<hash>/HOOK/          activations/, phase1/, phase2/RUN/, phase3/RUN/ (docs/design.md, artifacts)
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ConfigError, located
from ..data.corpus import corpus_sha256, load_documents
from ..data.feed import place
from ..evaluation.firings import count_firings
from ..fileio import read_json, sha256_file, sha256_json, write_tensors
from ..lm import LanguageModel
from ..lm.loading import load_tokenizer, tokenizer_sha256
from ..models.base import SparseAutoencoder
from ..phases.arms import train_arm
from ..phases.measure import HeldOut, measure_models
from ..phases.phase1_teacher import run_phase1
from ..phases.preflight import check_arms, check_rows, memory_of
from ..phases.run import Run
from ..phases.sources import source_files
from ..provenance import dependencies
from ..records import Train
from ..training.trainer import Diverged, discard_checkpoints
from .machine import PeakMemory, code, faster_products, synchronised
from .plan import RunKey, Sweep
from .records import pack_units, rounded, short_metric
from .workers import Options, Say, threads_each

USAGE_ROWS = 1 << 20  # train rows on which a latent that is never on is dead
RESERVED = 4 << 30  # bytes of a GPU left to models when rows are placed there


def data_identity(config: Config) -> dict[str, Any]:
    """What every record says of its text, language model and ontology; nothing in it names a place."""
    lm = LanguageModel.load(config.model.name, revision=config.model.revision, dtype=config.model.dtype)
    ontology = config.concepts.ontology
    known: dict[str, Any] = {
        "text_sha256": {
            name: _text_sha256(config, field) for name, field in (("train", "path"), ("heldout", "heldout_path"))
        },
        "model_revision": lm.revision,
        "tokenizer_sha256": lm.tokenizer_sha256,
        "ontology": ontology if ontology == "wordnet" else sha256_file(ontology),
    }
    used = ("concepts.prompts", "concepts.exclude", "concepts.wordnet")
    known |= {field: digest for field, digest in source_files(config).items() if field.startswith(used)}
    return identified(known)


def identified(known: Mapping[str, Any]) -> dict[str, Any]:
    """What data are made of, with a hash of all of it."""
    return {**known, "data_sha256": sha256_json(known)}


def _text_sha256(config: Config, field: str) -> str:
    path = getattr(config.corpus, field)
    if path is None:
        return "packaged"
    try:
        found = corpus_sha256(config.corpus.kind, path)
    except ValueError:
        found = None
    if found is None:
        raise ConfigError(f"corpus.{field}: found no file {path!r}, allowed: --set corpus.{field}=FILE")
    return found


def placed(config: Config, options: Options, cache: Path, say: Say) -> Config:
    """The config with the threads of a worker, and its text as a file of tokens, which is read in no time."""
    tree = config.model_dump(mode="json")
    tree["run"]["threads"] = threads_each(options.workers, config.run.threads)
    corpus = tree["corpus"]
    if config.corpus.kind == "text":
        for field, limit in (("path", "max_tokens"), ("heldout_path", "heldout_tokens")):
            if corpus[field] is not None:
                corpus[field] = str(_tokens(config, corpus[field], corpus[limit], cache, say))
        corpus |= {"source": "tokens", "documents": "packed"}
    return located(Config.model_validate(tree))


def _tokens(config: Config, text: str, max_tokens: int, cache: Path, say: Say) -> Path:
    options, model = config.corpus, config.model
    digest = tokenizer_sha256(model.name, revision=model.revision)
    made_from = [corpus_sha256("text", text), digest, max_tokens, options.context_length]
    path = cache / f"{sha256_json([*made_from, options.documents, options.document_start])[:16]}.safetensors"
    if not path.is_file():
        documents = load_documents(
            "text",
            text,
            load_tokenizer(model.name, revision=model.revision),
            max_tokens=max_tokens,
            context_length=options.context_length,
            documents=options.documents,
            start=options.document_start,
        )
        tensors = {"tokens": documents.tokens, "doc_start": documents.starts}
        write_tensors(path, tensors, {"tokenizer_sha256": str(digest)})
        say(f"{Path(text).name}: {documents.n_documents:,} documents, {documents.n_tokens:,} tokens")
    return path


class LanguageRuns:
    """The run folders of a sweep. Every process has its own: rows and held-out contexts are read once in each.

    configs: by hook, as `placed` gives them; identity: of the data, for every record; splits: measured on these.
    """

    def __init__(
        self,
        sweep: Sweep,
        configs: Mapping[str, Config],
        identity: Mapping[str, Any],
        cache: Path,
        splits: list[str],
        device: str,
    ) -> None:
        self.sweep, self.identity, self.splits = sweep, identity, splits
        self.configs = {
            hook: config.model_copy(update={"run": config.run.model_copy(update={"device": device})})
            for hook, config in configs.items()
        }
        made_from = {hook: [dependencies(config, 1), identity["data_sha256"]] for hook, config in configs.items()}
        self.folders = {hook: cache / sha256_json(made_from[hook])[:16] / hook for hook in configs}
        self._opened: dict[str, Run] = {}
        self._held_out: dict[tuple[str, str], HeldOut] = {}

    def prepare(self, hook: str) -> dict[str, Any]:
        """Make phase 1 of a hook, unless it is there; returns its evidence."""
        run_phase1(Run(self.configs[hook], self.folders[hook], force=True, quiet=True))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        evidence: dict[str, Any] = read_json(self.folders[hook] / "phase1" / "evidence.json", dict[str, Any])
        return evidence

    def is_trained(self, key: RunKey) -> bool:
        """Whether a run's model lies in the cache."""
        phase = self.configs[key.hook].arm(key.name).phase
        return (self.folders[key.hook] / f"phase{phase}" / key.name / "train.json").is_file()

    def record(self, key: RunKey) -> dict[str, Any]:
        """Train a model, unless it is there, and measure it. A loss that is not finite is a record, too.

        Without seconds.train and peak_bytes where the model was there.
        """
        run = self._run(key.hook)
        arm, device = run.config.arm(key.name), run.device
        record: dict[str, Any] = {
            **self.identity,
            "kind": arm.kind,
            "init": arm.init,
            "label": run.label,
            "parents": run.concepts.n_parents,
            "children": run.concepts.n_children,
            "code": code(device),
            "failed": None,
        }
        clock, peak = synchronised(device), PeakMemory(device)
        try:
            with faster_products(device, run.config.training.precision):
                trained_now = train_arm(run, arm, run.store, tracked=False)
        except Diverged as error:
            return {**record, "failed": str(error).split(";")[0]}
        seconds = {"train": round(synchronised(device) - clock, 1)} if trained_now else {}
        record |= {"peak_bytes": peak.record()} if trained_now else {}
        folder = run.arm_folder(arm.name)
        discard_checkpoints(folder)  # the model is there; its optimiser's state would take twice as much room
        trained = read_json(folder / "train.json", Train)
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # each run trains on a stream of its own, whose memory no other stream takes over
        record |= {name: trained[name] for name in ("steps", "tokens", "parameters", "flops_per_row")}
        sae = SparseAutoencoder.from_pretrained(folder / "model", device=device)
        record["atoms"] = sae.n_parents * (1 + sae.n_children)
        for split in self.splits:
            clock = synchronised(device)
            record[split] = self._measured(run, key, sae, split, trained["teacher_parents"])
            seconds[split] = round(synchronised(device) - clock, 1)
        used = count_firings(sae, run.store, "train", USAGE_ROWS)
        dead = {"dead_parents": used.dead_parents, "dead_children": used.dead_children}
        return {**record, "usage": {**dead, "rows": used.rows}, "seconds": seconds}

    def _measured(
        self, run: Run, key: RunKey, sae: SparseAutoencoder, split: str, teacher_parents: list[int]
    ) -> dict[str, Any]:
        if (key.hook, split) not in self._held_out:
            self._held_out[key.hook, split] = HeldOut(run, split)
        found = measure_models(
            run,
            {key.name: sae},
            split,
            teacher_parents={key.name: teacher_parents},
            step="",
            held_out=self._held_out[key.hook, split],
            steering=self.sweep.steering,
        )[key.name].evaluation
        firings = count_firings(sae, run.store, split)
        return {
            "rows": run.store.n_rows(split),
            "l0_parents": rounded(firings.l0_parents),
            "l0_children": rounded(firings.l0_children),
            "metrics": {name: short_metric(metric) for name, metric in sorted(found.metrics.items())},
            "units": {name: pack_units(found.units[name]) for name in self.sweep.units if name in found.units},
        }

    def _run(self, hook: str) -> Run:
        """The hook's run folder, its store on the device if it fits. Raises ConfigError where an arm does not."""
        if hook not in self._opened:
            run = Run.open(self.folders[hook], self.configs[hook].run.device, quiet=True)
            check_arms(run.config, run.store.width, memory_of(run.device))
            check_rows(run.config, run.store.n_rows("train"), run.concepts.n_parents)
            run.store = place(run.store, run.device, RESERVED)
            self._opened[hook] = run
        return self._opened[hook]
