"""What a study's runs read: per hook a store of activations, contexts of held-out text, and the probes of concepts.

It lies in a cache folder, is made once, and is known by the hash of what it was made from.

    CACHE/<hash>/contexts.safetensors, concepts.json, <hook>/ (a store), <hook>.safetensors (moments and probes)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError, CorpusConfig
from ..data.concepts import Concepts
from ..data.corpus import (
    Documents,
    contexts,
    corpus_sha256,
    load_documents,
    padded_contexts,
    shortened,
    split_documents,
    with_held_out,
)
from ..data.exclude import read_exclusions
from ..data.harvest import harvest, planned_rows
from ..data.store import ActivationStore, ResidentStore, read_manifest
from ..evaluation.concepts import Label
from ..evaluation.hierarchy import Probes, make_probes, probes_to_tensors
from ..evaluation.massive import norm_limit
from ..fileio import read_tensors, sha256_file, sha256_json, write_json, write_tensors
from ..geometry.causal import CausalGeometry
from ..lm import FINAL_HOOK, LanguageModel
from ..phases.phase1_teacher import make_concepts
from ..phases.preflight import hook_width, memory_of, require_batch, require_disk, require_trainable
from .plan import TEXTS, RunKey, Study, model_config, run_config

SPLITS = ("train", "val", "test")


def load_lm(config: Config, device: str) -> LanguageModel:
    """The language model of a study."""
    model = config.model
    return LanguageModel.load(model.name, revision=model.revision, dtype=model.dtype, device=device)


def text_hashes(source: str, paths: Mapping[str, str | None]) -> dict[str, str]:
    """sha256 of texts, by what they are; None: the packaged one. Raises ConfigError naming one that is missing."""
    hashes = {}
    for name, path in paths.items():
        try:
            found = "packaged" if path is None else corpus_sha256(source, path)
        except ValueError:
            found = None
        if found is None:
            raise ConfigError(
                f"text: found no file {path!r}, allowed: --set text=FOLDER with {', '.join(TEXTS.values())}"
            )
        hashes[name] = found
    return hashes


def text_options(corpus: CorpusConfig) -> dict[str, str]:
    """What of a config decides how its text becomes tokens, as far as it is not as by default."""
    fields = {"documents", "text_field", "document_start"}
    options: dict[str, str] = corpus.model_dump(include=fields, exclude_defaults=True)
    return options


def data_identity(study: Study, config: Config, lm: LanguageModel) -> dict[str, Any]:
    """All that the stores depend on, but for the hook; nothing in it names a place."""
    options = config.concepts
    if options.prompts is not None:
        raise ConfigError(f"concepts.prompts: found {options.prompts!r}, allowed in a study: null")
    # what studies did not have from the start counts where it is used, so that older records stay valid
    left_out = {"label", "belief_threshold", "ontology", "prompts", "nltk_data", "exclude"}
    left_out |= {name for name in ("parts_of_speech", "wordnet") if name not in options.model_fields_set}
    excluded = read_exclusions(options.exclude) if "exclude" in options.model_fields_set else None
    source, paths = config.corpus.kind, {"corpus": config.corpus.path}
    if study.text is not None:
        source, paths = "text", {name: str(Path(study.text) / file) for name, file in TEXTS.items()}
    return {
        "text_sha256": text_hashes(source, paths),
        **text_options(config.corpus),
        **({} if excluded is None else {"exclude": sorted(excluded.words | excluded.synsets)}),
        "model_revision": lm.revision,
        "tokenizer_sha256": lm.tokenizer_sha256,
        "max_tokens": config.corpus.max_tokens,
        "heldout_tokens": study.heldout_tokens if study.text is not None else None,
        "heldout_document_tokens": study.heldout_document_tokens,
        "split": None if study.text is not None else list(config.corpus.split),
        "context_length": config.corpus.context_length,
        "dtype": [config.model.dtype, config.data.dtype],
        "seed": config.run.seed,
        "shard_rows": config.data.shard_rows,
        "concepts": options.model_dump(mode="json", exclude=left_out),
        "ontology": "wordnet" if options.ontology == "wordnet" else sha256_file(options.ontology),
        "shrinkage": config.geometry.shrinkage,
        **({} if config.data.max_norm_multiple == 10 else {"max_norm_multiple": config.data.max_norm_multiple}),
        "contexts": {"number": study.measure.contexts, "order": "of each document in turn"},
        "probe_rows": study.measure.probe_rows,
    }


def of_each_document(rows_n3: Tensor, most: int) -> Tensor:
    """The first `most` contexts when each document in turn gives its next one; contexts of a document lie together."""
    document_n = rows_n3[:, 0].contiguous()
    place_n = torch.arange(len(rows_n3)) - torch.searchsorted(document_n, document_n)
    return rows_n3[torch.argsort(place_n, stable=True)[:most]]


@dataclass(frozen=True)
class HookData:
    """What the runs at one hook share: the store on the device, train moments, probes, the metric of the vectors."""

    store: ResidentStore
    moments: tuple[Tensor, float]
    probes: Probes
    sigma: Tensor


class StudyData:
    """The cache of one study. `prepare` makes what is missing; `hook` opens it on a device."""

    def __init__(self, study: Study, config: Config, cache: Path, device: str) -> None:
        self.study, self.config, self.cache, self.device = study, config, cache, device
        self.identity = data_identity(study, config, self.lm)
        self.sha256 = sha256_json(self.identity)
        self.folder = cache / self.sha256[:16]
        self._opened: dict[str, HookData] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        return load_lm(self.config, self.device)

    def prepare(self, say: Any) -> None:
        """Make the contexts, concepts, stores and probes that are not there yet. Raises ConfigError before that where
        no run could be made of them.
        """
        files = [self.folder / "contexts.safetensors", self.folder / "concepts.json"]
        files += [self._probe_file(hook) for hook in self.study.hooks]
        if all(path.is_file() for path in files):
            self._check_models({hook: read_manifest(self.folder / hook)["width"] for hook in self.study.hooks})
            return
        dtype = self.config.data.dtype
        widths = {hook: hook_width(self.lm, hook, dtype) for hook in self.study.hooks}
        self._check_models(widths)
        documents, members = self._documents()
        n_rows = planned_rows(documents, members, self.config.corpus.context_length)
        require_batch("batch_size", self.study.batch_size, n_rows["train"])
        for hook, width in widths.items():
            require_disk(self.folder / hook, sum(n_rows.values()), width, dtype)
        say(f"{documents.n_documents:,} documents, {documents.n_tokens:,} tokens")
        tensors = {}
        for split in ("val", "test"):
            rows = contexts(documents, members[split], self.config.corpus.context_length)
            rows = of_each_document(rows[rows[:, 2] >= 3], self.study.measure.contexts)
            tensors[f"{split}.ids"], tensors[f"{split}.mask"] = padded_contexts(documents, rows)
            tensors[f"{split}.documents"] = rows[:, 0]
        write_tensors(self.folder / "contexts.safetensors", tensors)
        concepts = make_concepts(self.config, self.lm.tokenizer)
        write_json(self.folder / "concepts.json", concepts.to_json())
        for hook in self.study.hooks:
            opened = self._harvest(hook, documents, members)
            store = ResidentStore(self._ordinary(opened), self.device)
            say(f"{hook}: {', '.join(f'{store.n_rows(split):,} {split}' for split in SPLITS)} rows")
            self._write_probes(hook, store, concepts)
        write_json(self.folder / "identity.json", self.identity)

    def _check_models(self, widths: Mapping[str, int]) -> None:
        """Raise ConfigError for a model that cannot have rows of its hook's width or does not fit into memory."""
        study, memory = self.study, memory_of(self.device)
        for cell in study.cells:
            run, width = RunKey(*cell, study.seeds[0], study.lr[0]), widths[cell.hook]
            arm = run_config(study, self.config, run).arms[0]
            require_trainable(arm, model_config(study, self.config, run, width), width, memory)

    def _documents(self) -> tuple[Documents, dict[str, Tensor]]:
        """All documents, and which of them belong to train, val and test."""
        options, tokenizer = self.config.corpus, self.lm.tokenizer

        def load(source: str, path: Any, max_tokens: int) -> Documents:
            return load_documents(
                source,
                path,
                tokenizer,
                max_tokens=max_tokens,
                context_length=options.context_length,
                tokenizer_sha256=self.lm.tokenizer_sha256,
                documents=options.documents,
                text_field=options.text_field,
                start=options.document_start,
            )

        if self.study.text is None:
            documents = load(options.kind, options.path, options.max_tokens)
            return documents, split_documents(documents.n_documents, options.split, self.config.run.seed)
        folder = Path(self.study.text)
        train = load("text", folder / TEXTS["train"], options.max_tokens)
        held_out = load("text", folder / TEXTS["heldout"], self.study.heldout_tokens)
        if self.study.heldout_document_tokens is not None:
            held_out = shortened(held_out, self.study.heldout_document_tokens)
        if held_out.n_documents < 2:
            raise ConfigError(
                f"text: found {held_out.n_documents} held-out document, allowed: 2 or more, for val and test"
            )
        return with_held_out(train, held_out, self.config.run.seed)

    def _harvest(self, hook: str, documents: Documents, members: dict[str, Tensor]) -> ActivationStore:
        options = self.config.data
        return harvest(
            self.lm,
            documents,
            None,
            self.folder / hook,
            hook=self.lm.resolve_hook(hook),
            context_length=self.config.corpus.context_length,
            batch_tokens=options.batch_tokens,
            shard_rows=options.shard_rows,
            dtype=options.dtype,
            belief=False,
            seed=self.config.run.seed,
            members=members,
        )

    def _ordinary(self, store: ActivationStore) -> ActivationStore:
        """The store without rows of massive norm (data.max_norm_multiple)."""
        multiple = self.config.data.max_norm_multiple
        return store if multiple is None else store.parted(norm_limit(store, multiple))[0]

    def label(self, hook: str) -> Label:
        """Which concept a row carries: the next token's at the final residual, the present one's elsewhere."""
        return "next_token" if hook == FINAL_HOOK and self.lm.has_head else "current_token"

    def _probe_file(self, hook: str) -> Path:
        return self.folder / f"{hook}.safetensors"

    def _write_probes(self, hook: str, store: ActivationStore, concepts: Concepts) -> None:
        mean_d, spread = store.moments("train")
        probes = make_probes(
            store,
            concepts,
            label=self.label(hook),
            vocab_size=self.lm.vocab_size,
            max_rows=self.study.measure.probe_rows,
            min_rows=self.config.concepts.min_test_rows,
            shrinkage=self.config.geometry.shrinkage,
            seed=self.config.run.seed,
        )
        sigma_dd = probes.vector_root_dd @ probes.vector_root_dd
        if hook == FINAL_HOOK:  # the metric of penalties and causal norms there (docs/method.md section 3)
            sigma_dd = CausalGeometry(self.lm.unembedding[self.lm.named].cpu(), self.config.geometry.shrinkage).sigma
        spread_t = torch.tensor(spread, dtype=torch.float64)
        tensors = {**probes_to_tensors(probes), "mean": mean_d, "spread": spread_t, "sigma": sigma_dd}
        write_tensors(self._probe_file(hook), tensors)

    def hook(self, hook: str) -> HookData:
        """What is read at a hook, on the device; the hook before it is let go."""
        if hook not in self._opened:
            self._opened.clear()
            opened = ActivationStore.open(self.folder / hook)
            tensors, _ = read_tensors(self._probe_file(hook))
            moments = (tensors.pop("mean"), float(tensors.pop("spread")))
            sigma = tensors.pop("sigma")
            store = ResidentStore(self._ordinary(opened), self.device)
            for split in ("train", "val"):
                store.acts(split, torch.zeros(1, dtype=torch.int64))  # they are loaded now, and not in a run's time
            self._opened[hook] = HookData(store, moments, Probes(**tensors), sigma)
        return self._opened[hook]

    def contexts(self, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [N, T], mask [N, T], documents [N]) of held-out contexts."""
        tensors, _ = read_tensors(self.folder / "contexts.safetensors")
        return tensors[f"{split}.ids"], tensors[f"{split}.mask"], tensors[f"{split}.documents"]
