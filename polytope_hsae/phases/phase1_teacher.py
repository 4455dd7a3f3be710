"""Phase 1: concepts, activations, geometry, teacher, evidence."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.checks import check_concepts, count_contexts, require_apart, short_parents
from ..data.concepts import Concepts, build_concepts
from ..data.corpus import SPLITS, Documents
from ..data.harvest import harvest
from ..data.ontology import read_ontology
from ..data.prompts import TemplateDocuments, read_templates, template_documents
from ..data.store import ActivationStore
from ..data.vocabulary import TokenTexts
from ..data.words import graph_tokens, load_graphs
from ..evaluation.massive import describe_norms, massive_warnings
from ..fileio import write_json
from ..geometry.causal import CausalGeometry
from ..geometry.estimators import ActivationClassStats
from ..geometry.evidence import collect_evidence
from ..teacher import Teacher, concept_words, extract_activation_teacher, extract_teacher
from .preflight import check_model, check_text
from .run import Run

OUTPUTS = (
    "concepts.json", "checks.json", "norms.json", "geometry.safetensors", "teacher.safetensors", "evidence.json",
)  # fmt: skip


def run_phase1(run: Run) -> None:
    """Make phase1/ and activations/, unless they are there already."""
    folder, inputs = run.phase(1), run.sources
    outputs = [run.activations / "manifest.json", *(folder / name for name in OUTPUTS)]
    if run.provenance.is_done(1, run.config, inputs, outputs, run.force):
        run.say("phase 1: done before")
        return
    started = time.monotonic()
    width = check_model(run)
    say_what_stands_in(run)
    concepts = make_concepts(run.config, run.lm.tokenizer)
    run.say(f"phase 1: {concepts.n_parents} parents, {concepts.n_children} children")
    documents, members = run.documents
    if documents.skipped:
        run.say(f"phase 1: {documents.skipped:,} rows of the corpus have no text and are skipped")
    checks, templates = make_checks(run.config, run.lm.tokenizer, concepts, documents, members)
    check_text(run, width, concepts, documents, members, templates)
    if checks["warnings"]:
        run.say(f"phase 1: {len(checks['warnings'])} warnings on the concepts in checks.json; hsae concepts shows them")
    held_out = members if run.config.corpus.heldout_path is not None else None
    # before anything is written: the model may refuse the corpus
    make_activations(run, concepts, documents, run.activations, held_out)
    if templates is not None:
        harvest_templates(run, concepts, templates)
    write_json(folder / "concepts.json", concepts.to_json())
    write_json(folder / "checks.json", checks)
    rows = ", ".join(f"{run.all_rows.n_rows(split):,} {split}" for split in SPLITS)
    run.say(f"phase 1: activations of {run.hook}: {rows} rows of width {run.all_rows.width}")
    norms = describe_norms(run.all_rows, run.config.data.max_norm_multiple, TokenTexts(run.lm.tokenizer))
    write_json(folder / "norms.json", norms)
    for line in massive_warnings(norms):
        run.say(f"phase 1: warning: {line}")
    store = run.store
    geometry = token_geometry(run)
    geometry.save(folder / "geometry.safetensors")
    make_teacher(run, concepts, store, geometry).save(folder / "teacher.safetensors")
    evidence = make_evidence(run, concepts, store, geometry)
    write_json(folder / "evidence.json", evidence)
    run.say(f"phase 1: {summary(evidence)}")
    run.finish(1, inputs, started)


def say_what_stands_in(run: Run) -> None:
    """Say which label replaces the one asked for, and how many rows of the unembedding no token names."""
    asked, lm = run.config.concepts.label, run.lm
    if run.label != asked:
        run.say(f"phase 1: labels are {run.label}, not {asked}: {lm.name} does not predict the next token")
    if lm.n_named < lm.vocab_size:
        unnamed = f"{lm.vocab_size - lm.n_named:,} of {lm.vocab_size:,} rows of the unembedding"
        run.say(f"phase 1: no token names {unnamed}: they are left out of its metric and of the evidence")


def make_concepts(config: Config, tokenizer: Any) -> Concepts:
    """Parents and children for a tokenizer. Raises ValueError when two folds share a word."""
    concepts = build_concepts(tokenizer, config.concepts, config.run.seed)
    require_apart(concepts)
    return concepts


def make_checks(
    config: Config, tokenizer: Any, concepts: Concepts, documents: Documents, members: dict[str, Tensor]
) -> tuple[dict[str, Any], TemplateDocuments | None]:
    """checks.json, and documents from templates for the parents that are short of natural ones, if they are asked for.

    Raises ValueError where train, val and test are not apart.
    """
    options, seed = config.concepts, config.run.seed
    short = short_parents(count_contexts(concepts, documents, members), options.min_test_rows)
    templates = None
    if options.prompts is not None and short:
        sentences = read_templates(options.prompts)
        part = options.parts_of_speech[0]
        templates = template_documents(
            concepts, short, sentences, tokenizer, start_id=documents.start_id, default_part=part, seed=seed
        )
    checks = check_concepts(
        concepts,
        documents,
        members,
        tokenizer=tokenizer,
        parts=options.parts_of_speech,
        min_rows=options.min_test_rows,
        templated=None if templates is None else templates.counts(concepts.n_parents),
        listed=None if options.ontology == "wordnet" else read_ontology(Path(options.ontology)),
    )
    return checks, templates


def harvest_templates(run: Run, concepts: Concepts, templates: TemplateDocuments) -> None:
    """Run the language model over documents from templates, into a store of their own."""
    make_activations(run, concepts, templates.documents, run.templates, templates.members)
    parents = len(set(templates.parent_D))
    run.say(
        f"phase 1: {templates.documents.n_documents:,} sentences from templates for {parents} parents, kept apart in "
        f"{run.templates.name}/ ({templates.left_out:,} left out: their word is not one token)"
    )


def make_activations(
    run: Run, concepts: Concepts, documents: Documents, folder: Path, members: dict[str, Tensor] | None
) -> None:
    """Run the language model over documents, into a store in `folder`; continues a harvest that was interrupted.

    members: the documents of each split; None = by corpus.split.
    """
    config = run.config
    if run.force and (folder / "manifest.json").exists():
        for path in folder.iterdir():
            path.unlink()
    with run.progress("harvest", "rows") as ticker:
        harvest(
            run.lm,
            documents,
            concepts,
            folder,
            hook=run.hook,
            context_length=config.corpus.context_length,
            batch_tokens=config.data.batch_tokens,
            shard_rows=config.data.shard_rows,
            dtype=config.data.dtype,
            belief=run.label == "belief",
            belief_threshold=config.concepts.belief_threshold,
            seed=config.run.seed,
            split=config.corpus.split,
            members=members,
            progress=ticker,
        )


def token_geometry(run: Run, metric: str | None = None) -> CausalGeometry:
    """The geometry of the unembedding's rows that a token names, in the config's metric or in another."""
    options = run.config.geometry
    rows_Nd = run.lm.unembedding[run.lm.named]
    return CausalGeometry(rows_Nd, options.shrinkage, metric or options.metric, seed=run.config.run.seed)


def make_teacher(
    run: Run,
    concepts: Concepts,
    store: ActivationStore,
    geometry: CausalGeometry,
    metric: str | None = None,
    *,
    balanced: bool = False,
) -> Teacher:
    """The teacher from train words: from tokens at the final residual, from activations at an inner hook.

    At an inner hook the parents that are short of natural contexts also get the rows of their template documents.
    geometry: of the unembedding's rows; metric: of the activations, None = causal; balanced: `teacher.means`.
    """
    lm, options = run.lm, run.config.geometry
    metadata = {"model": lm.name, "model_revision": str(lm.revision), "hook": run.hook}
    if run.at_final_residual:
        return extract_teacher(
            lm.unembedding,
            geometry,
            concepts,
            estimator=options.estimator,
            balanced=balanced,
            named=lm.named,
            metadata=metadata,
        )
    child_V = concepts.token_to_child(vocab_size=lm.vocab_size, folds=("train",))
    labelled_V = child_V >= 0
    # balanced: every token of a concept is a class of its own, in the order of the ids
    class_V = torch.where(labelled_V, labelled_V.cumsum(0) - 1, -1) if balanced else child_V
    class_child = child_V[labelled_V].tolist() if balanced else None
    stats = ActivationClassStats(concepts.n_children if class_child is None else len(class_child), store.width)
    class_statistics(class_V, store, stats)
    if run.from_templates is not None:
        natural = int(stats.counts.sum())
        class_statistics(class_V, run.from_templates, stats, only_labelled=True)
        metadata["rows_from_templates"] = str(int(stats.counts.sum()) - natural)
    return extract_activation_teacher(
        stats,
        concepts,
        shrinkage=options.shrinkage,
        metric=metric or "causal",
        seed=run.config.run.seed,
        class_child=class_child,
        metadata=metadata,
    )


def class_statistics(
    class_V: Tensor, store: ActivationStore, stats: ActivationClassStats, *, only_labelled: bool = False
) -> None:
    """Add the train rows of a store to `stats`, labelled with the class of the current token, class_V [V] (-1: none).

    `only_labelled`, for templates: their other words were not chosen by anyone.
    """
    token = store.column("train", "token").long()
    for acts, start in store.batches("train", 8192):
        label = class_V[token[start : start + len(acts)]]
        kept = label >= 0 if only_labelled else torch.ones_like(label, dtype=torch.bool)
        stats.update(acts[kept], label[kept])


def make_evidence(run: Run, concepts: Concepts, store: ActivationStore, geometry: CausalGeometry) -> dict[str, object]:
    """The statistics of the hierarchy with their controls, from all words."""
    words, child_parent = concept_words(concepts)
    options = run.config.concepts
    graphs = load_graphs(options.parts_of_speech, options.wordnet, options.nltk_data)
    parts = graph_tokens(run.lm.tokenizer, graphs).values()
    evidence = collect_evidence(
        run.lm.unembedding,
        geometry,
        words,
        child_parent,
        [tokens[word] for tokens in parts for word in sorted(tokens)],
        parent_names=[parent.name for parent in concepts.parents],
        child_names=[child.name for parent in concepts.parents for child in parent.children],
        estimator=run.config.geometry.estimator,
        permutations=run.config.geometry.permutations,
        seed=run.config.run.seed,
        counts=torch.bincount(store.column("train", "token").long(), minlength=run.lm.vocab_size),
        activation_covariance=final_covariance(run, store),
        named=run.lm.named,
    )
    embedding = "unembedding" if run.lm.has_head else "input embeddings (the model has no output head)"
    unnamed = run.lm.vocab_size - run.lm.n_named
    return {"model": run.lm.name, "rows_of": embedding, "unnamed_rows": unnamed, **evidence}


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
