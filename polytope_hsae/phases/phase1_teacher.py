"""Phase 1: concepts, activations, geometry, teacher, evidence."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError, HSAEConfig
from ..data.concepts import Concepts, build_concepts, noun_words, word_tokens
from ..data.corpus import load_documents
from ..data.harvest import harvest
from ..data.store import ActivationStore
from ..fileio import sha256_file, write_json
from ..geometry.causal import CausalGeometry
from ..geometry.estimators import ActivationClassStats
from ..geometry.evidence import collect_evidence
from ..teacher import Teacher, concept_words, extract_activation_teacher, extract_teacher
from .run import Run


def run_phase1(run: Run) -> None:
    """Make phase1/ and activations/, unless they are there already."""
    folder = run.phase(1)
    names = ("concepts.json", "geometry.safetensors", "teacher.safetensors", "evidence.json")
    outputs = [run.activations / "manifest.json", *(folder / name for name in names)]
    inputs = source_files(run.config)
    if run.provenance.is_done(1, run.config, inputs, outputs, run.force):
        run.say("phase 1: done before")
        return
    started = time.monotonic()
    check_model(run)
    concepts = make_concepts(run.config, run.lm.tokenizer)
    for arm in run.config.arms:
        if arm.init != "random":
            require_room(run.config.arm_hsae(arm), concepts.n_parents)
    run.say(f"phase 1: {concepts.n_parents} parents, {concepts.n_children} children")
    store = make_activations(run, concepts)  # before anything is written: it reads the corpus, which may be refused
    write_json(folder / "concepts.json", concepts.to_json())
    rows = ", ".join(f"{store.n_rows(split):,} {split}" for split in ("train", "val", "test"))
    run.say(f"phase 1: activations of {run.hook}: {rows} rows of width {store.width}")
    geometry = token_geometry(run)
    geometry.save(folder / "geometry.safetensors")
    make_teacher(run, concepts, store, geometry).save(folder / "teacher.safetensors")
    evidence = make_evidence(run, concepts, store, geometry)
    write_json(folder / "evidence.json", evidence)
    run.say(f"phase 1: {summary(evidence)}")
    run.finish(1, inputs, started)


def source_files(config: Config) -> dict[str, str]:
    """sha256 of the files outside the run folder that the config names: the corpus and the ontology."""
    named = {"corpus.path": config.corpus.path, "concepts.ontology": config.concepts.ontology}
    return {field: sha256_file(path) for field, path in named.items() if path is not None and Path(path).is_file()}


def check_model(run: Run) -> None:
    """Load the model; refuse a hook that it lacks and contexts that it cannot read; say which label stands in."""
    run.lm.require_context(run.config.corpus.context_length)
    run.lm.resolve_hook(run.config.model.hook)
    asked = run.config.concepts.label
    if run.label != asked:
        run.say(f"phase 1: labels are {run.label}, not {asked}: {run.lm.name} does not predict the next token")


def make_concepts(config: Config, tokenizer: Any) -> Concepts:
    """Parents and children for a tokenizer."""
    options = config.concepts
    return build_concepts(
        tokenizer,
        options.ontology,
        max_parents=options.max_parents,
        max_children_per_parent=options.max_children_per_parent,
        min_children=options.min_children,
        min_words_per_child=options.min_words_per_child,
        split=options.split,
        seed=config.run.seed,
    )


def require_room(hsae: HSAEConfig, n_parents: int) -> None:
    """Raise ConfigError when a model has fewer parents than its teacher."""
    if n_parents > hsae.n_parents:
        allowed = f"at least the teacher's {n_parents} parents"
        raise ConfigError(f"hsae.n_parents: found {hsae.n_parents}, allowed: {allowed}")


def make_activations(run: Run, concepts: Concepts) -> ActivationStore:
    """Run the language model over the corpus; continues a harvest that was interrupted."""
    config = run.config
    if run.force and (run.activations / "manifest.json").exists():
        for path in run.activations.iterdir():
            path.unlink()
    documents = load_documents(
        config.corpus.source,
        config.corpus.path,
        run.lm.tokenizer,
        max_tokens=config.corpus.max_tokens,
        context_length=config.corpus.context_length,
        tokenizer_sha256=run.lm.tokenizer_sha256,
    )
    with run.progress("harvest", "rows") as ticker:
        return harvest(
            run.lm,
            documents,
            concepts,
            run.activations,
            hook=run.hook,
            context_length=config.corpus.context_length,
            batch_tokens=config.data.batch_tokens,
            shard_rows=config.data.shard_rows,
            dtype=config.data.dtype,
            belief=run.label == "belief",
            belief_threshold=config.concepts.belief_threshold,
            seed=config.run.seed,
            split=config.corpus.split,
            progress=ticker,
        )


def token_geometry(run: Run) -> CausalGeometry:
    """The geometry of the unembedding's rows."""
    options = run.config.geometry
    return CausalGeometry(run.lm.unembedding, options.shrinkage, options.metric, seed=run.config.run.seed)


def make_teacher(run: Run, concepts: Concepts, store: ActivationStore, geometry: CausalGeometry) -> Teacher:
    """The teacher from train words: from tokens at the final residual, from activations at an inner hook."""
    lm, options = run.lm, run.config.geometry
    metadata = {"model": lm.name, "model_revision": str(lm.revision), "hook": run.hook}
    if run.at_final_residual:
        return extract_teacher(lm.unembedding, geometry, concepts, estimator=options.estimator, metadata=metadata)
    stats = class_statistics(concepts, store, lm.vocab_size)
    return extract_activation_teacher(stats, concepts, shrinkage=options.shrinkage, metadata=metadata)


def class_statistics(concepts: Concepts, store: ActivationStore, vocab_size: int) -> ActivationClassStats:
    """Class means and covariance of train rows, labelled by the current token where it belongs to a train word."""
    child_of_token = concepts.token_to_child(vocab_size=vocab_size, folds=("train",))
    stats = ActivationClassStats(concepts.n_children, store.width)
    token = store.column("train", "token").long()
    for acts, start in store.batches("train", 8192):
        stats.update(acts, child_of_token[token[start : start + len(acts)]])
    return stats


def make_evidence(run: Run, concepts: Concepts, store: ActivationStore, geometry: CausalGeometry) -> dict[str, object]:
    """The statistics of the hierarchy with their controls, from all words."""
    words, child_parent = concept_words(concepts)
    nouns = word_tokens(run.lm.tokenizer, noun_words())
    evidence = collect_evidence(
        run.lm.unembedding,
        geometry,
        words,
        child_parent,
        [nouns[word] for word in sorted(nouns)],
        parent_names=[parent.name for parent in concepts.parents],
        child_names=[child.name for parent in concepts.parents for child in parent.children],
        estimator=run.config.geometry.estimator,
        permutations=run.config.geometry.permutations,
        seed=run.config.run.seed,
        counts=torch.bincount(store.column("train", "token").long(), minlength=run.lm.vocab_size),
        activation_covariance=final_covariance(run, store),
    )
    embedding = "unembedding" if run.lm.has_head else "input embeddings (the model has no output head)"
    return {"model": run.lm.name, "rows_of": embedding, **evidence}


def final_covariance(run: Run, store: ActivationStore) -> Tensor | None:
    """Covariance [d, d] of the train rows that the unembedding reads; None at an inner hook, whose rows it does not."""
    if not run.at_final_residual:
        return None
    scatter = ActivationClassStats(1, store.width)
    for acts, _ in store.batches("train", 8192):
        scatter.update(acts, torch.full((len(acts),), -1))
    return scatter.within_covariance()


def summary(evidence: dict[str, Any]) -> str:
    """One line on what the evidence says."""
    main, shuffled = evidence["main"], evidence["shuffled_rows"]
    strong, chance = main["fraction_z_above_3"], shuffled["fraction_z_above_3"]
    angle = main["angles"]["median_angle_deg"]
    line = f"shared-parent z > 3 for {strong:.0%} of parents ({chance:.0%} with shuffled rows)"
    beta = f"none ({main['why']})" if main["median_beta"] is None else f"{main['median_beta']:.2f}"
    interval = "" if main["median_beta"] is None else " [{:.2f}, {:.2f}]".format(*main["beta_ci95"])
    found = main["decision"]
    failed = [name for name, test in found["tests"].items() if not test["passes"]]
    decision = f"not shown ({found.get('why', ', '.join(failed))})" if failed else "shown"
    line = f"{line}, median beta {beta}{interval}, median angle {angle:.1f} degrees"
    return f"{line}; a hierarchy with orthogonal differences: {decision}"


def metric_file(run: Run) -> Path:
    """The file that holds the teacher's metric."""
    return run.phase(1) / ("geometry.safetensors" if run.at_final_residual else "teacher.safetensors")


def load_geometry(run: Run) -> CausalGeometry:
    """The metric of the teacher: of the unembedding at the final residual, of the activations at an inner hook."""
    if run.at_final_residual:
        return CausalGeometry.load(metric_file(run))
    sqrt = Teacher.load(metric_file(run)).sigma_sqrt
    return CausalGeometry.from_covariance(sqrt @ sqrt, shrinkage=0.0)
