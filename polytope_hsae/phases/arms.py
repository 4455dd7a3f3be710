"""Training one arm: phases 2 and 3 differ only in how a model starts and in its stages."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import ArmConfig, TeacherConfig
from ..data.concepts import Concepts, permuted_words
from ..data.feed import feed, place
from ..data.store import ActivationStore
from ..data.stream import RowStream
from ..fileio import read_json, sha256_file, sha256_json, write_json
from ..models.base import SparseAutoencoder
from ..models.flops import parameter_count, training_flops
from ..models.hsae import HierarchicalSAE
from ..models.init import ChildInit
from ..provenance import NOT_IN_RESULTS
from ..records import Train
from ..teacher import Teacher
from ..tracking import Trackers, open_trackers
from ..training.trainer import HSAETrainer, discard_checkpoints
from .cards import arm_card
from .flat_arms import MODELS, flat_config, match_line, match_record
from .phase1_teacher import load_geometry, make_teacher, metric_file, token_geometry
from .preflight import BYTES_PER_WEIGHT, check_arms, check_rows, memory_of, planned
from .run import Run
from .thresholds import set_thresholds

SAMPLE_BATCH = 8192
CALIBRATION_ROWS = 32_768
OUTPUTS = ("model/config.json", "model/model.safetensors", "train.json")


def train_phase(run: Run, phase: int) -> None:
    """Train every arm of a phase that is not trained yet. Raises ConfigError before that if a later one cannot be."""
    width = run.store.width
    check_arms(run.config, width, memory_of(run.device))
    check_rows(run.config, run.store.n_rows("train"), run.concepts.n_parents)
    arms = [arm for arm in run.config.arms if arm.phase == phase]
    weights = (parameter_count(planned(run.config, arm, width), width) for arm in arms)
    store = place(run.store, run.device, BYTES_PER_WEIGHT * max(weights, default=0))
    for arm in arms:
        train_arm(run, arm, store)


def trained_models(run: Run, phase: int) -> list[Path]:
    """The files that a finished phase leaves for every arm."""
    arms = [run.arm_folder(arm.name) for arm in run.config.arms if arm.phase == phase]
    return [folder / name for folder in arms for name in OUTPUTS]


def train_arm(run: Run, arm: ArmConfig, store: ActivationStore, *, tracked: bool = True) -> bool:
    """Train an arm to phase{2,3}/ARM/{model, checkpoints, train.json}; resumes, and skips what is done.

    store: the run's, on the device where that has room for it. tracked: write metrics, to files that arms share.
    Returns whether it had to be trained.
    """
    folder = run.arm_folder(arm.name)
    identity = arm_identity(run, arm)
    trained = all((folder / name).is_file() for name in OUTPUTS)
    if trained and read_json(folder / "train.json", Train)["identity"] == identity:
        run.say(f"phase {arm.phase}: {arm.name} done before")
        return False
    training, seed = run.config.arm_training(arm), run.config.arm_seed(arm)
    rows = RowStream(store, "train", training.batch_size, seed)
    model = initial_model(run, arm, store)
    teacher_parents = initialize_teacher(run, arm, model, store) if arm.init != "random" else []
    mark = folder / "checkpoints" / "identity.json"
    if not mark.exists() or read_json(mark) != identity:
        discard_checkpoints(folder)
        shutil.rmtree(folder / "model", ignore_errors=True)
        write_json(mark, identity)

    with feed(rows, run.device) as stream:
        trainer = HSAETrainer(
            model,
            stream,
            run.config.arm_stages(arm),
            training,
            folder=folder,
            evaluate=lambda sae: validation_metrics(run, sae, store),
            teacher=run.config.arm_teacher(arm),
            n_teacher=len(teacher_parents),
            seed=seed,
        )
        if trainer.resume():
            run.say(f"phase {arm.phase}: {arm.name} resumes at step {trainer.step}")
        trackers = open_trackers(run.config, run.folder, arm, trainer.step) if tracked else Trackers([])
        try:
            with run.progress(f"phase {arm.phase} {arm.name}", "steps") as ticker:
                trainer.fit(trackers, ticker)
        finally:
            trackers.close()
    # A threshold is a choice, and choices are made on val; on train rows the L0 on val would come out 2 % higher.
    model.calibrate(Sample(store, "val", CALIBRATION_ROWS, seed), model.config.total_l0)
    model.card = arm_card(run, arm, model.n_children, teacher_parents)
    model.save_pretrained(folder / "model")
    final = validation_metrics(run, model, store)
    record = {
        "arm": arm.name,
        "identity": identity,
        "steps": trainer.total,
        "tokens": trainer.total * trainer.rows_per_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_row": training_flops(model.config, model.width),
        "teacher_parents": teacher_parents,
        "config": model.config.model_dump(mode="json"),
        "validation": final,
    }
    match = match_record(run, arm, record)
    write_json(folder / "train.json", {**record, "match": match})
    run.say(f"phase {arm.phase}: {arm.name}: validation EV {final['val_ev']:.3f}, L0 {final['val_l0']:.1f}")
    if match:
        run.say(f"phase {arm.phase}: {match_line(arm, match)}")
    return True


def arm_identity(run: Run, arm: ArmConfig) -> dict[str, str]:
    """Hashes of all that an arm's training depends on."""
    config = run.config
    settings: dict[str, Any] = {
        "seed": config.arm_seed(arm),
        "normalize": config.data.normalize,
        "max_norm_multiple": config.data.max_norm_multiple,
        "hsae": config.arm_hsae(arm).model_dump(mode="json"),
        "training": config.arm_training(arm).model_dump(mode="json", exclude=set(NOT_IN_RESULTS)),
        "stages": [stage.model_dump(mode="json") for stage in config.arm_stages(arm)],
        "arm": arm.model_dump(mode="json"),
        "flat": None if arm.kind == "hsae" else config.arm_flat(arm).model_dump(mode="json"),
    }
    inputs = {"activations": sha256_file(run.activations / "manifest.json")}
    if arm.kind == "hsae":
        inputs["metric"] = sha256_file(metric_file(run))
    if arm.init != "random":
        settings["teacher"] = config.arm_teacher(arm).model_dump(mode="json")
        inputs["teacher"] = sha256_file(run.phase(1) / "teacher.safetensors")
    for other in set(arm.match.values()):
        inputs[f"match {other}"] = sha256_file(run.arm_folder(other) / "train.json")
    return {"settings": sha256_json(settings), **inputs}


def initial_model(run: Run, arm: ArmConfig, store: ActivationStore) -> SparseAutoencoder:
    """The arm's model on the run's device, with the data's normalisation and its bias at the median of a sample."""
    config, seed = run.config, run.config.arm_seed(arm)
    model: SparseAutoencoder
    if arm.kind == "hsae":
        model = HierarchicalSAE(config.arm_hsae(arm), store.width, config.data.normalize, seed=seed)
        sigma = load_geometry(run).sigma
        model.set_metric((sigma * len(sigma) / sigma.trace()).float())  # mean eigenvalue 1: lambdas compare
    else:
        model = MODELS[arm.kind](flat_config(run, arm), store.width, config.data.normalize, seed=seed)
    mean, spread = run.train_moments
    model.set_normalization(mean.float(), (spread / store.width) ** 0.5)
    model.to(run.device)
    model.initialize_bias(Sample(store, "train", config.data.bias_rows, seed))
    return model


class Sample:
    """Batches of `n_rows` random rows of a split (None: all, in order), read anew each time they are gone through."""

    def __init__(self, store: ActivationStore, split: str, n_rows: int | None, seed: int):
        rows = torch.arange(store.n_rows(split))
        if n_rows is not None:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_rows]
        self.store, self.split, self.rows = store, split, rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        for rows in self.rows.split(SAMPLE_BATCH):
            yield self.store.acts(self.split, rows)


def arm_concepts(run: Run, arm: ArmConfig) -> Concepts:
    """The concepts that an arm's teacher is made of."""
    return permuted_words(run.concepts, run.config.arm_seed(arm)) if arm.init == "permuted_teacher" else run.concepts


def arm_teacher(run: Run, arm: ArmConfig, options: TeacherConfig, store: ActivationStore) -> Teacher:
    """The teacher that an arm starts from: the real one, or a control of it."""
    seed, balanced = run.config.arm_seed(arm), options.means == "balanced"
    if arm.init == "permuted_teacher" or balanced or options.metric is not None:
        geometry = token_geometry(run, options.metric)
        teacher = make_teacher(run, arm_concepts(run, arm), store, geometry, options.metric, balanced=balanced)
    else:
        teacher = Teacher.load(run.phase(1) / "teacher.safetensors")
    if arm.init == "random_teacher":
        teacher = teacher.random_like(seed)
    if options.rotate_deg > 0:
        teacher = teacher.rotated(options.rotate_deg, seed)
    if options.noise_deg > 0:
        teacher = teacher.with_noise(options.noise_deg, seed)
    return teacher.in_form(options.init)


def initialize_teacher(run: Run, arm: ArmConfig, model: SparseAutoencoder, store: ActivationStore) -> list[int]:
    """Put the arm's teacher into an H-SAE; returns the concept (row of concepts.json) of every router row it fills."""
    assert isinstance(model, HierarchicalSAE)
    options = run.config.arm_teacher(arm)
    teacher = arm_teacher(run, arm, options, store)
    parts = teacher.projectors(model.config.subspace_dim, model.n_children, options.energy, run.config.arm_seed(arm))
    children = {
        name: ChildInit(parts.down[row], parts.up[row], parts.child_encoder[row], parts.child_decoder[row])
        for row, name in enumerate(teacher.parent_names)
    }
    rows = teacher.parent_unified if options.init == "dual" else teacher.parent_write
    model.initialize_from_teacher(
        dict(zip(teacher.parent_names, rows, strict=True)),
        children,
        geometry=teacher if options.init == "dual" else None,
        seed_parent=options.seed_parent,
        seed_child=options.seed_child,
        seed_projectors=options.seed_projectors,
    )
    if options.seed_parent and options.threshold is not None:
        set_thresholds(run, arm_concepts(run, arm), teacher.parent_names, model, store, options.threshold)
    concept_of = {parent.name: row for row, parent in enumerate(run.concepts.parents)}
    return [concept_of[name] for name in teacher.parent_names] if options.seed_parent else []


@torch.no_grad()
def validation_metrics(run: Run, sae: SparseAutoencoder, store: ActivationStore) -> dict[str, float]:
    """EV (centred on the train mean) and L0 on the first `val_rows` validation rows."""
    mean = run.train_moments[0].to(run.device, torch.float32)
    limit = min(store.n_rows("val"), run.config.training.val_rows)
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    for start in range(0, limit, 4096):
        rows = store.acts("val", torch.arange(start, min(start + 4096, limit))).to(run.device)
        codes = sae.encode(rows)
        error_nd, total_nd = (rows - sae.decode(codes)).square(), (rows - mean).square()
        sums += torch.stack([part.sum().double() for part in (error_nd, total_nd, codes.l0())])
    error, total, l0 = sums.tolist()
    return {"val_ev": 1 - error / total, "val_l0": l0 / limit}
