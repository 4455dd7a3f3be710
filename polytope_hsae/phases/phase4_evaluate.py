"""Phase 4: measure every arm on held-out documents and words, describe its latents, and judge the targets."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ArmConfig
from ..evaluation.agreement import teacher_agreement
from ..evaluation.bootstrap import Evaluation, Metric, Resampling, paired
from ..evaluation.interventions import evaluate_interventions
from ..evaluation.latents import Lexicon, Names, describe_latents
from ..evaluation.pushing import Search
from ..evaluation.targets import MIN_UNITS, assess_targets, format_targets
from ..fileio import read_json, write_json
from ..geometry.causal import CausalGeometry
from ..lm import NO_HEAD
from ..models.base import SparseAutoencoder
from ..records import Evidence, Results, Train
from ..teacher import Teacher
from .cards import add_measured, child_concepts
from .measure import HeldOut, Measured, measure_models, metrics_table
from .preflight import check_contexts, check_layers
from .run import Run

ANGLE_CONTROLS = ("shuffled_rows", "pseudo_parents")
OUTPUTS = ("results.json", "steering.json", "interventions.json", "ablations.json", "latents.json")
OF_CONCEPT = ("purity", "leakage", "recall")


def run_phase4(run: Run) -> None:
    """Make phase4/, unless it is there already, and print the comparison and the targets."""
    folder = run.phase(4)
    of_phase1 = ("concepts.json", "teacher.safetensors", "evidence.json")
    made = [run.activations / "manifest.json", *(run.phase(1) / name for name in of_phase1)]
    saved = {arm.name: run.arm_folder(arm.name) / "model" for arm in run.config.arms}
    inputs = run.hashes(*made, *(model / "model.safetensors" for model in saved.values()))
    outputs = [folder / name for name in OUTPUTS]
    if run.provenance.is_done(4, run.config, inputs, outputs, run.force):
        run.say("phase 4: done before")
        add_measured(run)
        print_results(run)
        return
    run.require_done(1, 2, 3)
    check_layers(run, run.store.width)
    check_contexts(run, run.config.eval.split)
    started = time.monotonic()
    options, seed = run.config.eval, run.config.run.seed
    models = {name: SparseAutoencoder.from_pretrained(model, device=run.device) for name, model in saved.items()}
    trained = {name: read_json(run.arm_folder(name) / "train.json", Train) for name in models}
    teacher_parents = {name: record["teacher_parents"] for name, record in trained.items()}
    held_out = HeldOut(run, options.split)
    measured = measure_models(
        run, models, options.split, teacher_parents=teacher_parents, step="phase 4", held_out=held_out
    )
    arms = {name: found.evaluation for name, found in measured.items()}
    write_json(folder / "latents.json", latents(run, models, measured, teacher_parents))
    write_json(folder / "steering.json", steering_file(run, measured))
    write_json(folder / "interventions.json", interventions(run, held_out))
    concepts = {name: found.concepts.to_json() for name, found in measured.items()}
    write_json(folder / "ablations.json", {**differences(arms, options.bootstrap, seed), "concepts": concepts})
    of_labels = next(iter(measured.values())).concepts  # the same rows for every arm
    few = of_labels.lacking if len(of_labels.parents_Q) < MIN_UNITS else ""
    write_json(folder / "results.json", results(run, arms, few))
    add_measured(run)
    run.finish(4, inputs, started)
    print_results(run)


def steering_file(run: Run, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The object of steering.json."""
    parts = {"arms": "records", "children": "children", "grid": "grid"}
    found = {
        part: {name: getattr(arm.steering, field) for name, arm in measured.items()} for part, field in parts.items()
    }
    return {"target_nats": run.config.eval.steering.target_nats, **found}


def interventions(run: Run, held_out: HeldOut) -> dict[str, Any]:
    """The object of interventions.json: the teacher's own directions in the language model, on the split's contexts."""
    options, teacher = run.config.eval, Teacher.load(run.phase(1) / "teacher.safetensors")
    found = evaluate_interventions(
        run.lm,
        run.hook,
        run.concepts,
        teacher,
        held_out.steering_ids,
        search=Search(options.steering.target_nats),
        max_concepts=options.steering.max_concepts,
        max_children=options.steering.max_children,
        resampling=held_out.data.resampling,
    )
    if not (run.at_final_residual and run.lm.has_head):
        return found | {"agreement": {"why": "measured at the final residual of a model with an output head"}}
    return found | {"agreement": teacher_agreement(held_out.data, teacher, run.train_moments[0])}


def latents(
    run: Run,
    models: Mapping[str, SparseAutoencoder],
    measured: Mapping[str, Measured],
    teacher_parents: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The object of latents.json: what every arm's latents fire on, read and write."""
    split = run.config.eval.split
    geometry = CausalGeometry.load(run.phase(1) / "geometry.safetensors")
    lexicon = Lexicon(run.lm, run.hook, geometry, run.store, split, run.train_moments[0])
    arms = {}
    with run.progress("phase 4: latents", "models") as ticker:
        for done, (name, sae) in enumerate(models.items()):
            ticker(done, len(models))
            names = names_of(run, run.config.arm(name), sae, measured[name], teacher_parents[name])
            arms[name] = describe_latents(sae, run.store, split, lexicon, names, run.config.eval.latents)
        ticker(len(models), len(models))
    return {
        "hook": run.hook,
        "label": run.label,
        "split": split,
        "n_rows": run.store.n_rows(split),
        "reads": lexicon.how_reads,
        "writes": lexicon.how_writes,
        "arms": arms,
    }


def names_of(
    run: Run, arm: ArmConfig, sae: SparseAutoencoder, measured: Measured, teacher_parents: Sequence[int]
) -> Names:
    """Concepts of an arm's latents: mapped ones, then those that the real teacher (not a control) initialised."""
    latent_P = measured.concepts.latent_P.tolist()
    of_concept = {record["parent"]: record for record in measured.concepts.to_json()}
    parents = {
        latent: _named(concept, True, of_concept.get(concept, {}))
        for concept, latent in enumerate(latent_P)
        if latent >= 0
    }
    children: dict[int, list[int | None]] = {}
    if arm.init == "teacher" and measured.own_slots is not None:
        of_slot = {record["parent"]: record for record in measured.own_slots.to_json()}
        for slot, concept in enumerate(teacher_parents):
            parents.setdefault(slot, _named(concept, False, of_slot.get(concept, {})))
        children = child_concepts(run, arm, sae.n_children)
    return Names(parents, children)


def _named(concept: int, mapped: bool, record: Mapping[str, Any]) -> dict[str, Any]:
    return {"concept": concept, "mapped": mapped, **{key: record.get(key) for key in OF_CONCEPT}}


def differences(arms: Mapping[str, Evaluation], resamples: int, seed: int) -> dict[str, Any]:
    """Paired differences of every metric, on the same resamples of documents or concepts.

    `differences`: each arm minus the first. `against_teacher`: the arm named teacher minus each other arm, or empty.
    """

    def minus(arm: str, other: str) -> dict[str, Any]:
        shared = [key for key in arms[other].units if key in arms[arm].units]
        return {
            key: paired(arms[other].units[key], arms[arm].units[key], "difference", resamples, seed).to_json()
            for key in shared
        }

    reference, *others = arms
    return {
        "reference": reference,
        "differences": {name: minus(name, reference) for name in others},
        "against_teacher": {name: minus("teacher", name) for name in arms if name != "teacher" and "teacher" in arms},
    }


def results(run: Run, arms: Mapping[str, Evaluation], few: str) -> dict[str, Any]:
    """The object of results.json; it holds no times, paths or host names. few: why there are not more concepts."""
    config = run.config
    evidence = read_json(run.phase(1) / "evidence.json", Evidence)
    angles = evidence["main"]["angles"]
    angle = Metric(angles["median_angle_deg"], tuple(angles["median_ci95"]), 90.0, run.concepts.n_parents)
    targets = assess_targets(
        angle,
        *(arms[name].units if name in arms else {} for name in ("baseline", "teacher")),
        thresholds=config.eval.targets,
        few=few,
        resampling=Resampling(config.eval.bootstrap, config.run.seed),
    )
    for target in targets:
        if target["name"] == "steering_leakage_reduction" and not run.lm.has_head:
            target["why"] = NO_HEAD
    targets[0]["of"] = f"{evidence['rows_of']}, {angles['estimator']} of all words"
    measured = {name: evidence[name].get("angles") for name in ANGLE_CONTROLS}  # few parents: no pseudo-parents
    targets[0]["controls"] = {name: found and found["median_angle_deg"] for name, found in measured.items()}
    return {
        "model": run.lm.name,
        "hook": run.hook,
        "label": run.label,
        "split": config.eval.split,
        "seeds": sorted({config.arm_seed(arm) for arm in config.arms}),
        "arms": {
            name: {key: metric.to_json() for key, metric in evaluation.metrics.items()}
            for name, evaluation in arms.items()
        },
        "targets": targets,
    }


def print_results(run: Run) -> None:
    """The comparison of the arms and the targets with their verdicts, from results.json."""
    found = read_json(run.phase(4) / "results.json", Results)
    title = f"{found['model']}, {found['hook']}, {found['label']} labels, {found['split']} split"
    run.console.print(metrics_table(title, found["arms"]))
    run.console.print(format_targets(found["targets"]))
    angles = found["targets"][0].get("controls", {})
    controls = " and ".join(f"{angle:.1f} with {name}" for name, angle in angles.items() if angle is not None)
    run.say(
        f"The angle alone proves nothing: it is {controls.replace('_', ' ')}. See phase1/evidence.json for evidence."
    )
    run.say(f"everything is in {run.folder}")
