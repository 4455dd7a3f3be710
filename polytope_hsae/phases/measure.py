"""Measuring trained models on documents and words that they were not trained on: phase 4 and `hsae evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..data.corpus import Documents, context_ids, padded_contexts
from ..data.vocabulary import TokenTexts
from ..evaluation.bootstrap import Evaluation, Resampling, unavailable
from ..evaluation.concepts import ConceptData, ConceptEvaluation, IntArray, evaluate_concepts, labelled_children
from ..evaluation.edges import map_children
from ..evaluation.firings import norm_metrics
from ..evaluation.hierarchy import evaluate_structure, labelled_sample
from ..evaluation.pushing import Search, evenly_spaced
from ..evaluation.reconstruction import evaluate_language_model, evaluate_reconstruction
from ..evaluation.steering import Steered, SteeringEvaluation, evaluate_steering
from ..geometry.causal import CausalGeometry
from ..models.base import SparseAutoencoder
from .preflight import check_contexts
from .run import Run

SHOWN = (
    "ev", "ev_all_rows", "ev_row_mean", "ev_causal", "ev_logit", "ce_recovered", "kl", "l0",
    "purity", "leakage", "recall", "split", "absorb", "absorb_with_children",
    "steering_leakage", "edge_precision", "edge_recall", "child_given_parent", "probe_min",
    "dead_parents", "dead_children", "entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One model: all metrics; its concepts (`own_slots`: read at the teacher's slots, None without a teacher); its
    steering.
    """

    evaluation: Evaluation
    concepts: ConceptEvaluation
    own_slots: ConceptEvaluation | None
    steering: SteeringEvaluation


def measure_models(
    run: Run,
    models: Mapping[str, SparseAutoencoder],
    split: str,
    *,
    teacher_parents: Mapping[str, Sequence[int]] | None = None,
    step: str,
    held_out: "HeldOut | None" = None,
    steering: bool = True,
) -> dict[str, Measured]:
    """Reconstruction, language model, concept and steering metrics by model, on one run's data and language model.

    `teacher_parents`: the concepts of a model's first parents, where a teacher put them there; `step` names the work
    for the user; `held_out`: the split's contexts, if they are known; `steering`: measure that, too.
    """
    held_out = held_out or HeldOut(run, split)
    resampling = held_out.data.resampling
    sigma_dd: Tensor | None = CausalGeometry.load(run.phase(1) / "geometry.safetensors").sigma
    without_sigma = Evaluation()
    if run.store.width != run.lm.width:
        why = f"rows of {run.hook} have width {run.store.width}, the unembedding's {run.lm.width}"
        sigma_dd, without_sigma = None, Evaluation({"ev_causal": unavailable(why)})
    of_language_model = evaluate_language_model(
        models,
        run.lm,
        run.hook,
        held_out.ids,
        run.train_moments[0],
        documents=held_out.documents,
        mask_NT=held_out.mask,
        norm_limit=run.norm_limit,
        resampling=resampling,
    )
    found = {}
    with run.progress(step, "models") as ticker:
        for done, (name, sae) in enumerate(models.items()):
            ticker(done, len(models))
            own = (teacher_parents or {}).get(name, ())
            evaluation = of_language_model[name] | Evaluation(norm_metrics(sae)) | without_sigma
            evaluation |= evaluate_reconstruction(
                sae,
                run.store,
                split,
                run.train_moments[0],
                massive=run.massive,
                sigma_dd=sigma_dd,
                resampling=resampling,
            )
            found[name] = _measure(run, sae, held_out, evaluation, own, steering)
        ticker(len(models), len(models))
    return found


class HeldOut:
    """Contexts and labelled rows of a split, the same for every model.

    ids, mask [N, T] and documents [N]: whole contexts, padded on the right; steering_ids [M, T'] without padding;
    data, sample: rows that carry concepts, and the concepts' probes.
    """

    def __init__(self, run: Run, split: str):
        config = run.config
        rows, documents = check_contexts(run, split), run.documents[0]
        steering = config.eval.steering
        self.steering_ids = _steering_contexts(documents, rows, steering.contexts, steering.context_length)
        rows = of_each_document(rows, config.eval.lm_contexts)
        self.documents = rows[:, 0].numpy()
        self.ids, self.mask = padded_contexts(documents, rows)
        self.data = concept_data(run, split)
        self.sample = labelled_sample(self.data)


def of_each_document(rows_n3: Tensor, most: int) -> Tensor:
    """The first `most` contexts when each document in turn gives its next one; contexts of a document lie together."""
    document_n = rows_n3[:, 0].contiguous()
    place_n = torch.arange(len(rows_n3)) - torch.searchsorted(document_n, document_n)
    return rows_n3[torch.argsort(place_n, stable=True)[:most]]


def _steering_contexts(documents: Documents, rows: Tensor, count: int, length: int) -> Tensor:
    """The first `length` tokens of the first `count` contexts that have as many: [M, length], shorter if none has."""
    texts = [context_ids(documents, row) for row in rows]
    length = min(length, max(len(text) for text in texts))
    return torch.stack([text[:length] for text in texts if len(text) >= length][:count])


def concept_data(run: Run, fold: str) -> ConceptData:
    """The run's rows that carry concepts."""
    config = run.config
    return ConceptData(
        run.store,
        run.concepts,
        run.label,
        run.lm.vocab_size,
        fold,
        config.concepts.belief_threshold,
        config.concepts.min_test_rows,
        config.geometry.shrinkage,
        Resampling(config.eval.bootstrap, config.run.seed),
    )


def _measure(
    run: Run,
    sae: SparseAutoencoder,
    held_out: HeldOut,
    evaluation: Evaluation,
    teacher_parents: Sequence[int],
    steering: bool,
) -> Measured:
    """Add to the metrics of reconstruction all that concern concepts."""
    options, data = run.config.eval, held_out.data
    concepts = evaluate_concepts(sae, data)
    evaluation |= concepts.result | evaluate_structure(sae, data, held_out.sample, concepts)
    own_slots = None
    if teacher_parents:
        slots = np.full(run.concepts.n_parents, -1)
        slots[list(teacher_parents)] = np.arange(len(teacher_parents))
        own_slots = evaluate_concepts(sae, data, slots)
        evaluation |= _renamed(own_slots.result, "own_slots")
    if run.from_templates is not None:
        # concepts that text has too few contexts of: a map and numbers of their own, never pooled with natural rows
        templated = evaluate_concepts(sae, replace(data, store=run.from_templates)).result
        evaluation |= _renamed(templated, "templated")
    if not steering:
        return Measured(evaluation, concepts, own_slots, SteeringEvaluation(Evaluation(), [], [], []))
    steering_of = options.steering
    parents = evenly_spaced(concepts.parents_Q, steering_of.max_concepts)  # the same for every model
    steered = evaluate_steering(
        sae,
        run.lm,
        run.hook,
        run.concepts,
        Steered(parents, concepts.latent_P[parents]),
        held_out.steering_ids,
        children=_children_to_steer(sae, data, parents, concepts.latent_P, steering_of.max_children),
        search=Search(steering_of.target_nats),
        doses=steering_of.doses,
        layers=[run.lm.resolve_hook(layer) for layer in steering_of.layers],
        text=TokenTexts(run.lm.tokenizer),
        resampling=data.resampling,
    )
    return Measured(evaluation | steered.result, concepts, own_slots, steered)


def _renamed(result: Evaluation, suffix: str) -> Evaluation:
    metrics = {f"{key}_{suffix}": metric for key, metric in result.metrics.items()}
    return Evaluation(metrics, {f"{key}_{suffix}": units for key, units in result.units.items()})


def _children_to_steer(
    sae: SparseAutoencoder, data: ConceptData, parents: list[int], latent_P: IntArray, at_most: int
) -> Steered:
    """Children of the steered parents with enough train rows, the same for every model, and the model's latents."""
    train = labelled_children(data, "train")
    rows_R = np.bincount(train.child_N, minlength=data.concepts.n_children)
    enough_R = (rows_R >= data.min_rows) & np.isin(data.concepts.child_parent_R, parents)
    children = evenly_spaced(np.flatnonzero(enough_R), at_most)
    return Steered(children, map_children(sae, data, train, children, latent_P))


def metrics_table(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """The metrics that are compared first, a column for each model; `metrics` as in results.json, by model."""
    table = Table(title=escape(title))
    table.add_column("metric", no_wrap=True)
    for name in metrics:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("chance", justify="right")
    for key in SHOWN:
        if not all(key in found for found in metrics.values()):
            continue  # runs of earlier versions lack some
        cells = [found[key]["value"] for found in metrics.values()]
        if key == "ev_all_rows" and cells == [found["ev"]["value"] for found in metrics.values()]:
            continue  # no row is massive
        chance = next(iter(metrics.values()))[key]["chance"]
        table.add_row(key, *(_cell(value) for value in cells), _cell(chance))
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
