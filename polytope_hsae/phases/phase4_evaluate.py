"""Phase 4: measure every arm on held-out documents and words, and judge the targets."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ..data.corpus import Documents, context_batches, context_ids, contexts, load_documents, split_documents
from ..evaluation.bootstrap import Evaluation, Metric, Units, paired
from ..evaluation.concepts import evaluate_concepts
from ..evaluation.reconstruction import evaluate_language_model, evaluate_reconstruction
from ..evaluation.steering import SteeringEvaluation, evaluate_steering
from ..evaluation.targets import Thresholds, assess_targets, format_targets
from ..fileio import read_json, write_json
from ..models.base import SparseAutoencoder
from .run import Run

ANGLE_CONTROLS = ("shuffled_rows", "pseudo_parents")
SHOWN = ("ev", "ce_recovered", "l0", "purity", "leakage", "recall", "steering_leakage", "dead_parents", "dead_children")


def run_phase4(run: Run) -> None:
    """Make phase4/, unless it is there already, and print the comparison and the targets."""
    folder = run.phase(4)
    made = [run.activations / "manifest.json", run.phase(1) / "concepts.json", run.phase(1) / "evidence.json"]
    models = [run.arm_folder(arm.name) / "model" / "model.safetensors" for arm in run.config.arms]
    inputs = run.hashes(*made, *models)
    outputs = [folder / name for name in ("results.json", "steering.json", "ablations.json")]
    if run.provenance.is_done(4, run.config, inputs, outputs, run.force):
        run.say("phase 4: done before")
        print_results(run)
        return
    run.require_done(1, 2, 3)
    started = time.monotonic()
    seed, resamples = run.config.run.seed, run.config.eval.bootstrap
    saes = {
        arm.name: SparseAutoencoder.from_pretrained(run.arm_folder(arm.name) / "model", device=run.device)
        for arm in run.config.arms
    }
    held_out = HeldOut(run)
    arms = evaluate_language_model(
        saes,
        run.lm,
        run.hook,
        held_out.ids,
        run.train_moments[0],
        documents=held_out.documents,
        mask_NT=held_out.mask,
        bootstrap=resamples,
        seed=seed,
    )
    steering: dict[str, list[dict[str, Any]]] = {}
    with run.progress("phase 4", "arms") as ticker:
        for done, (name, sae) in enumerate(saes.items()):
            ticker(done, len(saes))
            measured, steering[name] = evaluate_arm(run, name, sae, held_out)
            arms[name] |= measured
        ticker(len(saes), len(saes))
    write_json(folder / "steering.json", {"target_nats": run.config.eval.steering.target_nats, "arms": steering})
    write_json(folder / "ablations.json", differences(arms, resamples, seed))
    write_json(folder / "results.json", results(run, arms))
    run.provenance.record(4, run.config, inputs, run.device, time.monotonic() - started)
    print_results(run)


class HeldOut:
    """Contexts of the evaluated split, the same for every arm.

    ids, mask [N, T] and documents [N]: whole contexts, padded on the right; steering_ids [M, T'] without padding.
    """

    def __init__(self, run: Run):
        config = run.config
        documents = load_documents(
            config.corpus.source,
            config.corpus.path,
            run.lm.tokenizer,
            max_tokens=config.corpus.max_tokens,
            context_length=config.corpus.context_length,
            tokenizer_sha256=run.lm.tokenizer_sha256,
        )
        split = split_documents(documents.n_documents, config.corpus.split, config.run.seed)[config.eval.split]
        rows = contexts(documents, split, config.corpus.context_length)
        rows = rows[rows[:, 2] >= 3]
        steering = config.eval.steering
        self.steering_ids = _steering_contexts(documents, rows, steering.contexts, steering.context_length)
        rows = rows[: config.eval.lm_contexts]
        self.ids = torch.zeros(len(rows), config.corpus.context_length, dtype=torch.int64)
        self.mask = torch.zeros_like(self.ids)
        self.documents = rows[:, 0].numpy()
        for members, ids, mask in context_batches(documents, rows, config.data.batch_tokens):
            self.ids[members, : ids.shape[1]] = ids
            self.mask[members, : ids.shape[1]] = mask
        longest = int(self.mask.sum(1).max())
        self.ids, self.mask = self.ids[:, :longest], self.mask[:, :longest]


def _steering_contexts(documents: Documents, rows: Tensor, count: int, length: int) -> Tensor:
    """The first `length` tokens of the first `count` contexts that have as many: [M, length], shorter if none has."""
    texts = [context_ids(documents, row) for row in rows]
    length = min(length, max(len(text) for text in texts))
    return torch.stack([text[:length] for text in texts if len(text) >= length][:count])


def evaluate_arm(
    run: Run, name: str, sae: SparseAutoencoder, held_out: HeldOut
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Reconstruction, concept and steering metrics of one arm, and the record of its steering per concept."""
    config, options = run.config, run.config.eval
    common: dict[str, Any] = {"bootstrap": options.bootstrap, "seed": config.run.seed}
    evaluation = evaluate_reconstruction(sae, run.store, options.split, run.train_moments[0], **common)
    label: dict[str, Any] = {
        "label": run.label,
        "vocab_size": run.lm.vocab_size,
        "fold": options.split,
        "belief_threshold": config.concepts.belief_threshold,
        "min_rows": config.concepts.min_test_rows,
    }
    concepts = evaluate_concepts(sae, run.store, run.concepts, **label, **common)
    evaluation |= concepts.result
    n_teacher = read_json(run.arm_folder(name) / "train.json")["teacher_parents"]
    if n_teacher:
        own = np.full(run.concepts.n_parents, -1)
        own[:n_teacher] = np.arange(n_teacher)
        slots = evaluate_concepts(sae, run.store, run.concepts, mapping=own, **label, **common).result
        metrics = {f"{key}_own_slots": metric for key, metric in slots.metrics.items()}
        evaluation |= Evaluation(metrics, {f"{key}_own_slots": units for key, units in slots.units.items()})
    steered: SteeringEvaluation = evaluate_steering(
        sae,
        run.lm,
        run.hook,
        run.concepts,
        concepts.parents_Q,
        concepts.latent_P,
        held_out.steering_ids,
        target_nats=options.steering.target_nats,
        max_concepts=options.steering.max_concepts,
        **common,
    )
    return evaluation | steered.result, steered.records


def differences(arms: Mapping[str, Evaluation], resamples: int, seed: int) -> dict[str, Any]:
    """Each arm minus the first one, metric by metric, on the same resamples of documents or concepts."""
    reference, *others = arms
    table: dict[str, dict[str, Any]] = {}
    for name in others:
        shared = [key for key in arms[reference].units if key in arms[name].units]
        table[name] = {
            key: paired(arms[reference].units[key], arms[name].units[key], "difference", resamples, seed).to_json()
            for key in shared
        }
    return {"reference": reference, "differences": table}


def results(run: Run, arms: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The object of results.json; it holds no times, paths or host names."""
    config = run.config
    limits = config.eval.targets
    thresholds = Thresholds(
        limits.angle_deg,
        limits.purity_gain_pp,
        limits.leakage_reduction,
        limits.steering_leakage_reduction,
        limits.reconstruction_parity,
    )
    evidence = read_json(run.phase(1) / "evidence.json")
    angles = evidence["main"]["angles"]
    angle = Metric(angles["median_angle_deg"], tuple(angles["median_ci95"]), 90.0, run.concepts.n_children)
    empty: dict[str, Units] = {}
    units = {name: arms[name].units if name in arms else empty for name in ("baseline", "teacher")}
    targets = assess_targets(
        angle,
        units["baseline"],
        units["teacher"],
        thresholds=thresholds,
        bootstrap=config.eval.bootstrap,
        seed=config.run.seed,
    )
    targets[0]["of"] = f"{evidence['rows_of']}, {angles['estimator']} of all words"
    measured = {name: evidence[name].get("angles") for name in ANGLE_CONTROLS}  # few parents: no pseudo-parents
    targets[0]["controls"] = {name: found and found["median_angle_deg"] for name, found in measured.items()}
    return {
        "model": run.lm.name,
        "hook": run.hook,
        "label": run.label,
        "split": config.eval.split,
        "seeds": [config.run.seed],
        "arms": {
            name: {key: metric.to_json() for key, metric in evaluation.metrics.items()}
            for name, evaluation in arms.items()
        },
        "targets": targets,
    }


def print_results(run: Run) -> None:
    """The comparison of the arms and the targets with their verdicts, from results.json."""
    found = read_json(run.phase(4) / "results.json")
    table = Table(title=f"{found['model']}, {found['hook']}, {found['label']} labels, {found['split']} split")
    table.add_column("metric")
    for name in found["arms"]:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("chance", justify="right")
    for key in SHOWN:
        cells = [metrics[key]["value"] for metrics in found["arms"].values()]
        chance = next(iter(found["arms"].values()))[key]["chance"]
        table.add_row(key, *(_cell(value) for value in cells), _cell(chance))
    run.console.print(table)
    run.console.print(format_targets(found["targets"]))
    angles = found["targets"][0]["controls"]
    controls = " and ".join(f"{angle:.1f} with {name}" for name, angle in angles.items() if angle is not None)
    run.say(f"The angle proves nothing alone: it is {controls.replace('_', ' ')}. phase1/evidence.json has what does.")
    run.say(f"everything is in {run.folder}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
