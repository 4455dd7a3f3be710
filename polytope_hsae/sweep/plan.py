"""What a sweep's file says: arms x hooks x L0 x learning rates x seeds, and the config of every run.

Seeds are those of training: a model's start, the order of rows, the control teachers. Documents, folds of words and the
evidence follow run.seed of the config, so that all seeds are measured on the same documents and words.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..config import (
    FOLDER_NAME,
    ArmConfig,
    Block,
    Config,
    ConfigError,
    Whole,
    apply_override,
    find_config,
    first_line,
    load_config,
    put,
)
from ..evaluation.synthetic.world import WorldConfig
from ..fileio import sha256_json
from ..parsing import did_you_mean, parse_yaml, shown
from ..provenance import flatten

WORLD = "world"  # stands for the hook of a sweep on synthetic rows
PLACES = (  # fields that say where something lies or runs
    *("model.name", "corpus.path", "corpus.heldout_path", "concepts.ontology", "concepts.nltk_data"),
    *("data.batch_tokens", "tracking", "run.name", "run.device", "run.threads"),
)
WATCHING = (  # fields that say how training is watched
    *("training.cuda_graph", "training.log_every", "training.val_every", "training.val_rows"),
    *("training.checkpoint_every", "training.allow_unequal_budget", "eval.targets", "eval.latents"),
)


class Hook(Block):
    hook: str = Field(description="Where the language model is read.")
    teacher: str | None = Field(None, description="The arm whose targets are judged; null = none is.")
    control: str | None = Field(None, description="The arm with permuted words, which must fail.")
    set: dict[str, Any] = Field({}, description="Fields of the config that differ at this hook, key.path: value.")


class SweepArm(ArmConfig):
    against: str | None = Field(None, description="The arm that it is compared with; null = the first arm.")
    l0: dict[Whole, dict[str, Any]] = Field(
        {}, description="H-SAE: fields of hsae that give each L0; it runs at these. A flat arm's k is the L0."
    )
    chance: Literal["random", "frozen"] | None = Field(
        None, description="On synthetic rows: not trained at all, or with a frozen random decoder. null = trained."
    )


class Cell(NamedTuple):
    """What a learning rate is chosen for."""

    arm: str
    hook: str
    l0: int | None


class RunKey(NamedTuple):
    """One run. l0, lr: None where the sweep does not vary them."""

    arm: str
    hook: str
    l0: int | None
    lr: float | None
    seed: int

    @property
    def cell(self) -> Cell:
        return Cell(self.arm, self.hook, self.l0)

    @property
    def name(self) -> str:
        """Its arm's name in the run folder of its hook."""
        parts = [self.arm]
        parts += [] if self.l0 is None else [f"l0_{self.l0}"]
        parts += [] if self.lr is None else [f"lr{self.lr:g}"]
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def path(self) -> str:
        """What --only and messages call it."""
        return f"{self.hook}/{self.name}"


class Sweep(Block):
    """The content of study.yaml."""

    name: str = Field(description="Folder name below studies/.", pattern=FOLDER_NAME)
    about: str = Field("", description="What it asks and how, in a few sentences; printed above its results.")
    config: str | None = Field(
        "quickstart", description="The packaged config (or file) that everything else follows; null = defaults."
    )
    set: dict[str, Any] = Field({}, description="Its fields that are replaced: key.path: value.")
    hooks: list[Hook] = Field([], description="Where the language model is read: names, or what differs there.")
    world: WorldConfig | None = Field(None, description="Synthetic rows with known features, in place of hooks.")
    sample_rows: Whole = Field(65_536, ge=1, description="Synthetic rows for mean, scale, bias and thresholds.")
    test_rows: Whole = Field(500_000, ge=1, description="Synthetic rows that everything is measured on.")
    l0: list[Whole] = Field([], description="Active latents per row; [] = as the arms have it.")
    lr: list[float] = Field([], description="Learning rates of every arm without one; [] = the config's.")
    seeds: list[Whole] = Field([0], min_length=1, description="Seeds of training; rates are tried with the first.")
    arms: list[SweepArm] = Field(min_length=1, description="What is compared; the first one is the baseline.")
    steering: bool = Field(True, description="Measure steering, the slowest part of a run's evaluation.")
    units: list[str] = Field(
        ["purity", "leakage", "leakage_all_rows", "steering_leakage", "fvu"],
        description="Metrics whose values by concept or by document are kept, for paired intervals.",
    )
    shown: list[str] = Field(
        [
            *("ev", "l0", "ce_recovered", "purity", "leakage", "leakage_all_rows", "no_fire_rate", "recall"),
            *("steering_leakage", "steering_unreached"),
        ],
        description="Metrics of the main table of arms; all others are in a second one.",
    )

    @field_validator("hooks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        named = isinstance(value, list)
        return [{"hook": item} if isinstance(item, str) else item for item in value] if named else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        _require_unique("hooks", self.places)
        _require_unique("seeds", self.seeds)
        _require_unique("l0", self.l0)
        _require_unique("lr", [f"{lr:g}" for lr in self.lr])  # a run's name has so many digits
        _require_unique("arms", names)
        if bool(self.hooks) == (self.world is not None):
            raise ValueError("hooks, world: found both or neither, allowed: one of them")
        for arm in self.arms:
            where = f"arms.{arm.name}"
            if arm.seed is not None:
                raise ValueError(f"{where}.seed: found {arm.seed}, allowed: null, because seeds says which")
            if arm.kind != "hsae" and arm.l0:
                raise ValueError(f"{where}.l0: found {shown(arm.l0)}, allowed: nothing for a flat arm, whose k it is")
            if arm.kind == "hsae" and self.l0 and not arm.l0:
                raise ValueError(f"{where}.l0: found nothing, allowed: fields of hsae for every L0 that it runs at")
            if arm.chance is not None and self.world is None:
                raise ValueError(f"{where}.chance: found {arm.chance!r}, allowed: null without a world")
            if arm.match and self.world is not None:
                raise ValueError(f"{where}.match: found {shown(arm.match)}, allowed: nothing with a world")
        asked = {f"hooks.{plan.hook}.{of}": getattr(plan, of) for plan in self.hooks for of in ("teacher", "control")}
        asked = {f"arms.{arm.name}.against": arm.against for arm in self.arms} | asked
        asked |= {f"arms.{arm.name}.match.{of}": other for arm in self.arms for of, other in arm.match.items()}
        for field, name in asked.items():
            if name is not None and name not in names:
                raise ValueError(f"{field}: found {shown(name)}, allowed: {', '.join(names)}")
        return self

    @cached_property
    def _arms(self) -> dict[str, SweepArm]:
        return {arm.name: arm for arm in self.arms}

    def arm(self, name: str) -> SweepArm:
        """The arm of that name; KeyError if there is none."""
        return self._arms[name]

    def against(self, name: str) -> str:
        """The arm that an arm is compared with."""
        return self.arm(name).against or self.arms[0].name

    def plan(self, hook: str) -> Hook:
        """What the file says of a hook."""
        return {plan.hook: plan for plan in self.hooks}[hook]

    def rates(self, name: str) -> list[float | None]:
        """The learning rates that an arm tries; [None]: its own or the config's."""
        return [*self.lr] if self.lr and self.arm(name).lr is None else [None]

    @property
    def places(self) -> list[str]:
        """The hooks by name, or the world's stand-in."""
        return [plan.hook for plan in self.hooks] or [WORLD]

    @property
    def l0s(self) -> list[int | None]:
        """The L0s; [None] where the arms have their own."""
        return [*self.l0] or [None]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every (arm, hook, L0), hook by hook."""
        return [
            Cell(arm.name, hook, l0)
            for hook in self.places
            for l0 in self.l0s
            for arm in self.arms
            if not arm.l0 or l0 in arm.l0
        ]

    def keys(self, hook: str) -> list[RunKey]:
        """Every run that may be made at a hook, a seed at a time."""
        cells = [cell for cell in self.cells if cell.hook == hook]
        return [RunKey(*cell, lr, seed) for seed in self.seeds for cell in cells for lr in self.rates(cell.arm)]

    def matched(self, key: RunKey) -> list[RunKey]:
        """The run that a flat arm's run is sized by, in a list; [] for any other."""
        names = sorted(set(self.arm(key.arm).match.values()))
        return [key._replace(arm=name, lr=key.lr if self.rates(name) != [None] else None) for name in names]


def _require_unique(field: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{field}: found {values}, allowed: values that differ")


def load_sweep(path: Path, overrides: list[str] | None = None) -> tuple[Sweep, dict[str, Config]]:
    """Read a sweep's file and the config of every hook; `overrides` ("key.path=value") go to the file's field of that
    name, or else to the config. Raises ConfigError naming the field, what was found and what is allowed.
    """
    tree = _read(path)
    replaced: dict[str, Any] = {}
    for override in overrides or []:
        if override.split("=")[0].split(".")[0] in Sweep.model_fields:
            apply_override(tree, override)
        else:
            key, _, value = override.partition("=")
            apply_override(replaced, f"{key.replace('.', ' ')}={value}")
    replaced = {key.replace(" ", "."): value for key, value in replaced.items()}
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_line(error, Sweep)}") from error
    hooks = [
        plan.model_copy(update={"set": {key: value for key, value in plan.set.items() if key not in replaced}})
        for plan in sweep.hooks
    ]
    sweep = sweep.model_copy(update={"set": {**sweep.set, **replaced}, "hooks": hooks})
    return sweep, {hook: hook_config(sweep, hook) for hook in sweep.places}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = path.parent if path.parent.is_dir() else path.parent.parent
        files = [str(file) for pattern in ("*.yaml", "*/study.yaml") for file in sorted(near.glob(pattern))]
        raise ConfigError(f"sweep: found {str(path)!r}, allowed: a YAML file{did_you_mean(str(path), files)}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, allowed: a mapping of a sweep's fields")
    return tree


def hook_config(sweep: Sweep, hook: str) -> Config:
    """The config of a hook's run folder, which has an arm for every run. Raises ConfigError."""
    fields = {**sweep.set}
    if sweep.world is None:
        fields |= {**sweep.plan(hook).set, "model.hook": hook}
    fields |= {"run.name": hook, "arms": [_run_arm(sweep, key) for key in sweep.keys(hook)]}
    config = load_config(sweep.config, [f"{key}={json.dumps(value)}" for key, value in fields.items()])
    for key in sweep.keys(hook):
        if key.l0 is not None and sweep.arm(key.arm).kind == "hsae":
            total = config.arm_hsae(config.arm(key.name)).total_l0
            if total != key.l0:
                raise ConfigError(f"arms.{key.arm}.l0.{key.l0}: found {total} active latents, allowed: {key.l0}")
    return config


def _run_arm(sweep: Sweep, key: RunKey) -> dict[str, Any]:
    """A run as an arm of its hook's config."""
    arm = sweep.arm(key.arm)
    tree = arm.model_dump(mode="json", exclude={"against", "l0", "chance"}, exclude_defaults=True)
    matched = {other.arm: other.name for other in sweep.matched(key)}
    tree |= {"name": key.name, "seed": key.seed}
    tree |= {"match": {quantity: matched[name] for quantity, name in arm.match.items()}}
    if key.lr is not None:
        tree["lr"] = key.lr
    if key.l0 is not None and arm.kind == "hsae":
        tree["hsae"] = {**arm.hsae, **arm.l0[key.l0]}
    elif key.l0 is not None:
        tree["flat"] = {**arm.flat, "k": key.l0}
    return tree


def sweep_yaml(sweep: Sweep) -> str:
    """A sweep's file, without what is as by default."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120)


def settings_hash(sweep: Sweep, key: RunKey) -> str:
    """SHA-256 of all that the file says of a run and its measuring: records of one hash may stand in one table.

    The data are not in it (a record's `data_sha256`), nor what the file leaves to the library, whose version and commit
    every record has.
    """
    arms = []
    for name in (key.arm, *(other.arm for other in sweep.matched(key))):
        arm = sweep.arm(name)
        tree = arm.model_dump(mode="json", exclude={"against", "l0"}, exclude_defaults=True)
        arms.append([tree, arm.l0.get(key.l0) if key.l0 is not None else None])
    settings = {"run": [*key], "arms": arms, "config": stated_config(sweep, key.hook)}
    measured = sweep.model_dump(mode="json", include={"steering", "units"}, exclude_defaults=True)
    if measured:
        settings["measured"] = measured
    if sweep.world is not None:
        world = sweep.world.model_dump(mode="json", exclude_defaults=True)
        settings["world"] = [world, sweep.sample_rows, sweep.test_rows]
    return sha256_json(settings)


def stated_config(sweep: Sweep, hook: str) -> dict[str, Any]:
    """The fields of the config that the file states, key.path: value, but for those that change no result.

    A field counts alike in the packaged config and in `set`.
    """
    text = "" if sweep.config is None else find_config(sweep.config).read_text(encoding="utf-8")
    tree = parse_yaml(text) or {}
    fields: Mapping[str, Any] = sweep.set if sweep.world is not None else {**sweep.set, **sweep.plan(hook).set}
    for key, value in fields.items():
        put(tree, key, deepcopy(value))  # a later field may go into it
    stated = {key: value for key, value in flatten(tree).items() if not _within(key, (*PLACES, *WATCHING, "arms"))}
    for key in ("concepts.prompts", "concepts.exclude"):
        if stated.get(key) not in (None, "packaged"):  # a path; the data's hash has what lies there
            del stated[key]
    return stated


def _within(key: str, names: tuple[str, ...]) -> bool:
    """Whether a field is one of these, or in a block that is: training.lr is not training.lr_mult."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def lasting(overrides: list[str]) -> list[str]:
    """The overrides that change results: not those that say where something lies or runs."""
    return [override for override in overrides if not _within(override.split("=")[0], PLACES)]
