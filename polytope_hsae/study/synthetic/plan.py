"""A synthetic study's file: one world, one stream of rows, the arms that train on it (docs/design.md, studies)."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ...config import (
    FLAT_KINDS,
    FOLDER_NAME,
    Block,
    ConfigError,
    FlatConfig,
    HSAEConfig,
    StageConfig,
    TrainingConfig,
    Whole,
    apply_override,
)
from ...evaluation.synthetic.world import WorldConfig
from ...fileio import sha256_json
from ..files import read_study, validated

SET_HERE = ("batch_size", "log_every", "val_every", "checkpoint_every")  # of training: by the study


class SyntheticArm(Block):
    name: str = Field(description="Name of the arm.", pattern=FOLDER_NAME)
    kind: Literal["hsae", "topk", "batchtopk", "jumprelu", "matryoshka"] = Field(description="Kind of model.")
    chance: Literal["random", "frozen"] | None = Field(
        None, description="A chance row: not trained at all, or with its random decoder frozen. null: trained."
    )
    hsae: dict[str, Any] = Field({}, description="Fields of hsae; n_parents follows from n_latents.")
    flat: dict[str, Any] = Field({}, description="Fields of a flat arm's config, but for n_latents and k.")
    training: dict[str, Any] = Field({}, description="Fields of training that this arm replaces.")


class SyntheticStudy(Block):
    """The content of a synthetic study.yaml."""

    name: str = Field(description="Name of the study, in the table's title.", pattern=FOLDER_NAME)
    world: WorldConfig = Field(description="What the rows are made of.")
    n_latents: Whole = Field(ge=2, description="Latents of every arm; of an H-SAE parents and children, at most.")
    l0: Whole = Field(ge=1, description="Active latents per row, to which thresholds are calibrated.")
    rows: Whole = Field(ge=1, description="Training rows of every arm.")
    batch_size: Whole = Field(ge=1, description="Rows per step.")
    seeds: list[Whole] = Field([0], min_length=1, description="Seeds of the models; all see the same rows.")
    training: dict[str, Any] = Field({}, description="Fields of training for all arms.")
    hsae: dict[str, Any] = Field({}, description="Fields of hsae for all H-SAE arms.")
    sample_rows: Whole = Field(65_536, ge=1, description="Rows for mean, scale, bias; as many others for thresholds.")
    test_rows: Whole = Field(500_000, ge=1, description="Rows that everything is measured on.")
    arms: list[SyntheticArm] = Field(min_length=1, description="What is compared.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: found {names}, allowed: names that differ")
        if self.rows < self.batch_size:
            raise ValueError(f"rows: found {self.rows}, allowed: at least batch_size = {self.batch_size}")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of every arm."""
        return self.rows // self.batch_size

    def arm(self, name: str) -> SyntheticArm:
        """The arm of that name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    @property
    def runs(self) -> list["SyntheticRun"]:
        """Every arm with every seed, seed by seed."""
        return [SyntheticRun(arm.name, seed) for seed in self.seeds for arm in self.arms]


class SyntheticRun(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its JSON file."""
        return f"{self.arm}-s{self.seed}.json"


def load_synthetic(path: Path, overrides: list[str] | None = None) -> SyntheticStudy:
    """Read a study; `overrides` are "key.path=value". Raises ConfigError with one line: field, found, allowed."""
    tree = read_study(path)
    for override in overrides or []:
        apply_override(tree, override)
    study = validated(SyntheticStudy, tree, f"{path}: ")
    for arm in study.arms:  # what is wrong shows before the first run
        model_config(study, arm)
        training_config(study, arm)
    return study


def model_config(study: SyntheticStudy, arm: SyntheticArm) -> HSAEConfig | FlatConfig:
    """The arm's model. Raises ConfigError, also for an H-SAE that is too large or has another L0 than the study."""
    where = f"arms.{arm.name}"
    if arm.kind != "hsae":
        kind = FLAT_KINDS[arm.kind]
        return validated(kind, {"n_latents": study.n_latents, "k": study.l0, **arm.flat}, f"{where}.flat.")
    fields = {**study.hsae, **arm.hsae}
    children = fields.get("n_children_per_parent", HSAEConfig.model_fields["n_children_per_parent"].default)
    fields = {"n_parents": study.n_latents // (1 + children), **fields}
    config = validated(HSAEConfig, fields, f"{where}.hsae.")
    atoms = config.n_parents * (1 + config.n_children_per_parent)
    if atoms > study.n_latents:
        raise ConfigError(f"{where}.hsae.n_parents: found {atoms} latents, allowed: {study.n_latents} at most")
    if config.total_l0 != study.l0:
        raise ConfigError(f"{where}.hsae: found {config.total_l0} active latents, allowed: l0 = {study.l0}")
    return config


def training_config(study: SyntheticStudy, arm: SyntheticArm) -> TrainingConfig:
    """How the arm is trained. Raises ConfigError."""
    fields = {**study.training, **arm.training}
    for field in SET_HERE:
        if field in fields:
            raise ConfigError(f"arms.{arm.name}.training.{field}: found {fields[field]!r}, allowed: nothing here")
    fields |= {"batch_size": study.batch_size, **dict.fromkeys(SET_HERE[1:], study.steps)}
    return validated(TrainingConfig, fields, f"arms.{arm.name}.training.")


def stages(study: SyntheticStudy, arm: SyntheticArm) -> list[StageConfig]:
    """One stage over all rows; a frozen chance row keeps its decoders."""
    return [StageConfig(name="train", steps=study.steps, freeze=["D", "G"] if arm.chance == "frozen" else [])]


def settings_hash(study: SyntheticStudy, run: SyntheticRun) -> str:
    """SHA-256 of all that the study's file says of a run: runs of one study may stand in one table.

    What the file does not say follows the library, whose version and commit every record has.
    """
    arm = study.arm(run.arm)
    training = {**study.training, **arm.training}
    training.pop("cuda_graph", None)
    return sha256_json(
        {
            "world": study.world.model_dump(mode="json", exclude_defaults=True),
            "arm": [arm.kind, arm.chance, arm.flat if arm.kind != "hsae" else {**study.hsae, **arm.hsae}],
            "training": training,
            "rows": [study.rows, study.batch_size, study.sample_rows, study.test_rows],
            "size": [study.n_latents, study.l0],
            "seed": run.seed,
        }
    )
