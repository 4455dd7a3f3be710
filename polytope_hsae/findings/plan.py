"""A study's file: hooks x seeds x arms, and the config of the run folder of every hook.

The seeds are those of training: a model's start, the order of rows and the control teachers. Documents, folds of words
and the evidence have the config's run.seed, so that every seed is measured on the same documents and words.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from ..config import FOLDER_NAME, ArmConfig, Block, Config, Whole, apply_override, load_config
from ..fileio import sha256_json
from ..parsing import shown
from ..study.files import read_study, validated
from ..study.plan import TEXTS, require_unique, stated_config


class HookPlan(Block):
    hook: str = Field(description="Where the language model is read.")
    teacher: str = Field("teacher", description="The arm whose targets the page judges; chosen on validation data.")
    control: str = Field("permuted_teacher", description="The same with permuted words, which must fail.")
    set: dict[str, Any] = Field({}, description="Fields of the config that differ at this hook, key.path: value.")


class FindingsArm(ArmConfig):
    against: str | None = Field(None, description="The arm that it is compared with; null = the first arm.")


class Findings(Block):
    """The content of a study.yaml."""

    name: str = Field(description="Folder name below studies/.", pattern=FOLDER_NAME)
    config: str = Field("quickstart", description="The packaged config (or file) that everything else follows.")
    set: dict[str, Any] = Field({}, description="Its fields that are replaced: key.path: value.")
    text: str | None = Field(
        None, description="Folder with train.txt.xz and heldout.txt.xz; null = the config's corpus."
    )
    seeds: list[Whole] = Field(min_length=1, description="Seeds of training.")
    hooks: list[HookPlan] = Field(min_length=1, description="Where the language model is read, and what differs there.")
    arms: list[FindingsArm] = Field(min_length=2, description="What is compared; the first one is the baseline.")
    units: list[str] = Field(
        ["purity", "leakage", "leakage_all_rows", "steering_leakage", "fvu"],
        description="Metrics whose values by concept or by document are kept, for paired intervals.",
    )
    shown: list[str] = Field(
        [
            *("ev", "l0", "ce_recovered", "purity", "leakage", "leakage_all_rows", "no_fire_rate", "recall"),
            *("steering_leakage", "steering_unreached"),
        ],
        description="Metrics of the page's main table; all others are in a second one.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        require_unique("seeds", self.seeds)
        require_unique("hooks", [plan.hook for plan in self.hooks])
        require_unique("arms", names)
        for arm in self.arms:
            if arm.seed is not None:
                raise ValueError(f"arms.{arm.name}.seed: found {arm.seed}, allowed: null, because seeds says which")
        asked = {f"hooks.{plan.hook}.{of}": getattr(plan, of) for plan in self.hooks for of in ("teacher", "control")}
        asked |= {f"arms.{arm.name}.against": self.against(arm.name) for arm in self.arms}
        for field, name in asked.items():
            if name not in names:
                raise ValueError(f"{field}: found {shown(name)}, allowed: {', '.join(names)}")
        return self

    def arm(self, name: str) -> FindingsArm:
        """The arm of that name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    def against(self, name: str) -> str:
        """The arm that an arm is compared with."""
        return self.arm(name).against or self.arms[0].name

    def plan(self, hook: str) -> HookPlan:
        """What the study says of a hook."""
        return {plan.hook: plan for plan in self.hooks}[hook]

    @property
    def keys(self) -> list["Key"]:
        """Every model, a seed at a time: a study that is cut off has all hooks and arms of its first seeds."""
        return [Key(plan.hook, seed, arm.name) for seed in self.seeds for plan in self.hooks for arm in self.arms]


class Key(NamedTuple):
    """One model of a study."""

    hook: str
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """The arm's name in the hook's run folder, which holds all seeds."""
        return f"{self.arm}-s{self.seed}"

    @property
    def file(self) -> str:
        """Its record's place below runs/."""
        return f"{self.hook}-s{self.seed}/{self.arm}.json"


def load_findings(path: Path, overrides: list[str] | None = None) -> tuple[Findings, dict[str, Config]]:
    """Read a study and the config of every hook; `overrides` ("key.path=value") go to the study's field of that name,
    or else to the config. Raises ConfigError naming the field, what was found and what is allowed.
    """
    tree = read_study(path)
    replaced: dict[str, Any] = {}
    for override in overrides or []:
        if override.split("=")[0].split(".")[0] in Findings.model_fields:
            apply_override(tree, override)
        else:
            key, _, value = override.partition("=")
            apply_override(replaced, f"{key.replace('.', ' ')}={value}")
    replaced = {key.replace(" ", "."): value for key, value in replaced.items()}
    study = validated(Findings, tree, f"{path}: ")
    study = study.model_copy(
        update={"set": {**study.set, **replaced}, "hooks": [_without(plan, set(replaced)) for plan in study.hooks]}
    )
    return study, {plan.hook: hook_config(study, plan) for plan in study.hooks}


def _without(plan: HookPlan, keys: set[str]) -> HookPlan:
    """The plan of a hook that leaves these fields of the config alone."""
    return plan.model_copy(update={"set": {key: value for key, value in plan.set.items() if key not in keys}})


def hook_config(study: Findings, plan: HookPlan) -> Config:
    """The config of a hook's run folder: every arm once for every seed. Raises ConfigError."""
    fields = {**study.set, **plan.set, "model.hook": plan.hook, "run.name": plan.hook, "arms": _arms(study)}
    if study.text is not None:
        folder = Path(study.text)
        train, heldout = (str(folder / TEXTS[name]) for name in TEXTS)
        fields |= {"corpus.source": "text", "corpus.path": train, "corpus.heldout_path": heldout}
    return load_config(study.config, [f"{key}={json.dumps(value)}" for key, value in fields.items()])


def _arms(study: Findings) -> list[dict[str, Any]]:
    made = []
    for seed in study.seeds:
        for arm in study.arms:
            tree = arm.model_dump(mode="json", exclude={"against"}, exclude_defaults=True)
            match = {quantity: f"{other}-s{seed}" for quantity, other in arm.match.items()}
            made.append({**tree, "name": f"{arm.name}-s{seed}", "seed": seed, "match": match})
    return made


def settings_hash(study: Findings, key: Key) -> str:
    """SHA-256 of all that the study's file says of a model and its measuring, but for the data (`data_identity`).

    What the file does not say follows the library, whose version and commit every record has.
    """
    names = [key.arm, *sorted(set(study.arm(key.arm).match.values()))]
    arms = [study.arm(name).model_dump(mode="json", exclude={"against"}, exclude_defaults=True) for name in names]
    fields = {**study.set, **study.plan(key.hook).set}
    return sha256_json(
        {"hook": key.hook, "seed": key.seed, "arms": arms, "config": stated_config(study.config, fields)}
    )
