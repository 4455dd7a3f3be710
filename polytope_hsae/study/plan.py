"""A study's file: arms x hooks x L0 x rates x seeds, and the config of every run.

The file is YAML (docs/design.md, studies). `load_study` reads and validates it; bad input raises ConfigError with one
line: field, found, allowed.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from ..config import (
    FOLDER_NAME,
    ArmConfig,
    Block,
    Config,
    ConfigError,
    FlatConfig,
    HSAEConfig,
    Whole,
    apply_override,
    find_config,
    load_config,
    put,
)
from ..fileio import sha256_json
from ..models.flops import latents_for, parameter_count
from ..parsing import parse_yaml, shown
from ..provenance import flatten
from .files import read_study, validated

TEXTS = {"train": "train.txt.xz", "heldout": "heldout.txt.xz"}  # of a folder of texts
PLACES = (  # fields, or blocks of them, that say where something lies or runs, and change no result
    *("text", "model.name", "corpus.path", "corpus.heldout_path", "concepts.ontology", "concepts.nltk_data"),
    *("data.batch_tokens", "tracking", "run.name", "run.device", "run.threads"),
)
WATCHING = (  # other fields that change no result: how a run is watched and shown
    *("training.cuda_graph", "training.log_every", "training.val_every", "training.val_rows"),
    *("training.checkpoint_every", "training.allow_unequal_budget", "eval.targets", "eval.latents"),
)
UNUSED = (  # fields that the runs of `hsae study` do not read: a run's own stand in its study
    *("teacher", "eval", "arms", "training.lr", "training.batch_size", "training.baseline", "training.teacher"),
)


class Size(Block):
    """How large an arm is: by its number of atoms, or as many parameters as another arm has."""

    atoms: Whole | None = Field(None, ge=2, description="Latents; of an H-SAE parents and children together.")
    params: str | None = Field(None, description="Flat arms: the arm whose number of parameters sets the latents.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.atoms is None) == (self.params is None):
            raise ValueError("size: found both or neither, allowed: one of atoms and params")
        return self


class StudyArm(Block):
    name: str = Field(description="Name of the arm.", pattern=FOLDER_NAME)
    kind: Literal["hsae", "topk", "batchtopk", "jumprelu", "matryoshka"] = Field(description="Kind of model.")
    size: Size = Field(description="atoms: N, or params: ARM.")
    hsae: dict[str, Any] = Field({}, description="Fields of hsae that this arm replaces.")
    flat: dict[str, Any] = Field({}, description="Fields of a flat arm's config, but for n_latents and k.")
    training: dict[str, Any] = Field({}, description="Fields of training that this arm replaces.")
    l0: dict[Whole, dict[str, Any]] = Field(
        {},
        description="H-SAE: the L0s that it is run at, and the fields of hsae that give each. A flat arm is run at "
        "every L0, and its k is the L0.",
    )
    lr: list[float] | None = Field(None, description="Rates tried instead of the study's; as many of them.")


class Measure(Block):
    """How much is read to measure a run."""

    contexts: Whole = Field(256, ge=1, description="Contexts for CE through the language model, at most.")
    context_batch: Whole = Field(16, ge=1, description="Contexts per forward pass.")
    usage_rows: Whole = Field(1 << 20, ge=1, description="Train rows on which a latent that is never on is dead.")
    probe_rows: Whole = Field(1 << 20, ge=1, description="Train rows that the probes of concepts rest on, at most.")


class Study(Block):
    """The content of study.yaml."""

    name: str = Field(description="Folder name below studies/.", pattern=FOLDER_NAME)
    config: str = Field("quickstart", description="The packaged config (or file) that everything else follows.")
    set: dict[str, Any] = Field({}, description="Its fields that are replaced: key.path: value.")
    text: str | None = Field(
        None, description="Folder with train.txt.xz and heldout.txt.xz; null = the config's corpus, split by document."
    )
    heldout_tokens: Whole = Field(1_000_000, ge=256, description="Tokens of heldout.txt.xz at most, for val and test.")
    heldout_document_tokens: Whole | None = Field(
        None, ge=3, description="Tokens read of each held-out document at most, so that no book outweighs the rest."
    )
    hooks: list[str] = Field(min_length=1, description="Where the language model is read.")
    steps: Whole = Field(ge=1, description="Optimiser steps of every run.")
    batch_size: Whole = Field(ge=1, description="Rows per step.")
    seeds: list[Whole] = Field([0], min_length=1, description="Seeds; the rates are tried with the first one.")
    l0: list[Whole] = Field(min_length=1, description="Total active latents per row.")
    lr: list[float] = Field(min_length=1, description="Learning rates tried by every arm, hook and L0.")
    arms: list[StudyArm] = Field(min_length=1, description="What is compared.")
    measure: Measure = Field(default_factory=Measure, description="How much is read to measure a run.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("hooks", "seeds", "l0", "lr"):
            require_unique(field, getattr(self, field))
        require_unique("arms", [arm.name for arm in self.arms])
        for arm in self.arms:
            where = f"arms.{arm.name}"
            if arm.lr is not None and len(set(arm.lr)) != len(self.lr):
                raise ValueError(
                    f"{where}.lr: found {arm.lr}, allowed: {len(self.lr)} rates, as many as every arm tries"
                )
            rates = self.rates(arm)
            if len({f"{lr:g}" for lr in rates}) != len(rates):  # the name of a run's file has so much of its rate
                field = "lr" if arm.lr is None else f"{where}.lr"
                raise ValueError(f"{field}: found {rates}, allowed: rates that differ in their first six digits")
            if arm.kind == "hsae":
                if not arm.l0:
                    raise ValueError(f"{where}.l0: found nothing, allowed: fields of hsae for every L0 that it runs at")
                if arm.size.params is not None:
                    raise ValueError(f"{where}.size: found params, allowed: atoms for an H-SAE")
            elif arm.l0:
                raise ValueError(f"{where}.l0: found {shown(arm.l0)}, allowed: nothing for a flat arm, whose k it is")
            if arm.size.params is not None and self.kind_of(arm.size.params) != "hsae":
                allowed = ", ".join(other.name for other in self.arms if other.kind == "hsae") or "an arm of kind hsae"
                raise ValueError(f"{where}.size.params: found {shown(arm.size.params)}, allowed: {allowed}")
            if arm.size.params is not None:
                lacking = [l0 for l0 in self.l0 if l0 not in self.arm(arm.size.params).l0]
                if lacking:
                    found = f"found {shown(arm.size.params)}, which has no L0 of {lacking[0]}"
                    raise ValueError(f"{where}.size.params: {found}, allowed: an arm with every L0")
        return self

    def arm(self, name: str) -> StudyArm:
        """The arm of that name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    def kind_of(self, name: str) -> str | None:
        """The kind of an arm; None if there is none of that name."""
        return {arm.name: arm.kind for arm in self.arms}.get(name)

    def rates(self, arm: StudyArm) -> list[float]:
        """The learning rates that an arm tries."""
        return self.lr if arm.lr is None else arm.lr

    def asks(self, run: "RunKey") -> bool:
        """Whether a run is one of the study's."""
        asked = run.cell in self.cells and run.seed in self.seeds
        return asked and run.lr in self.rates(self.arm(run.arm))

    @property
    def cells(self) -> list["Cell"]:
        """Every (hook, L0, arm), hook by hook."""
        return [
            Cell(arm.name, hook, l0)
            for hook in self.hooks
            for l0 in self.l0
            for arm in self.arms
            if arm.kind != "hsae" or l0 in arm.l0
        ]


class Cell(NamedTuple):
    """What a rate is chosen for."""

    arm: str
    hook: str
    l0: int


class RunKey(NamedTuple):
    """One run of a study."""

    arm: str
    hook: str
    l0: int
    seed: int
    lr: float

    @property
    def cell(self) -> Cell:
        """What its rate is chosen for."""
        return Cell(self.arm, self.hook, self.l0)

    @property
    def file(self) -> str:
        """The name of its JSON file."""
        return f"{self.arm}-{self.hook}-{self.l0}-s{self.seed}-lr{self.lr:g}.json"


def load_study(path: Path, overrides: list[str] | None = None) -> tuple[Study, Config]:
    """Read a study and its base config; `overrides` ("key.path=value") go to the study's field of that name, or else to
    the config. Raises ConfigError naming the field, what was found and what is allowed.
    """
    tree = read_study(path)
    for override in overrides or []:
        if override.split("=")[0].split(".")[0] in Study.model_fields:
            apply_override(tree, override)
        else:
            key, _, text = override.partition("=")
            tree.setdefault("set", {})[key] = _yaml_value(key, text)
    study = validated(Study, tree, f"{path}: ")
    base = load_config(study.config, [f"{key}={json.dumps(value)}" for key, value in study.set.items()])
    for cell in study.cells:
        run_config(study, base, RunKey(*cell, study.seeds[0], study.lr[0]))  # what is wrong shows before the first run
    return study, base


def _yaml_value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {key}: found {shown(text)}, allowed: a YAML value ({error})") from error


def run_config(study: Study, base: Config, run: RunKey) -> Config:
    """The whole config of one run: its arm is the only one. Raises ConfigError."""
    arm = study.arm(run.arm)
    tree = base.model_dump(mode="json")
    tree["run"] |= {"seed": run.seed}
    tree["model"] |= {"hook": run.hook}
    quiet = {"log_every": study.steps, "val_every": study.steps, "checkpoint_every": study.steps}
    tree["training"] |= {"batch_size": study.batch_size, "lr": run.lr, **quiet, **arm.training}
    tree["training"]["baseline"] = {"stages": [{"name": "train", "steps": study.steps}]}
    made: dict[str, Any] = {"name": arm.name, "kind": arm.kind}
    if arm.kind == "hsae":
        children = {**tree["hsae"], **arm.hsae}["n_children_per_parent"]
        made["hsae"] = {**arm.hsae, "n_parents": _parents(arm, children), **arm.l0[run.l0]}
    else:
        made["hsae"] = arm.hsae
        made["flat"] = {**arm.flat, "k": run.l0, "n_latents": study.arm(arm.name).size.atoms or 1 << 20}
    tree["arms"] = [made]
    config = validated(Config, tree, f"arms.{arm.name}: ")
    if arm.kind == "hsae":
        total = config.arm_hsae(config.arms[0]).total_l0
        if total != run.l0:
            raise ConfigError(f"arms.{arm.name}.l0.{run.l0}: found {total} active latents, allowed: {run.l0}")
    return config


def _parents(arm: StudyArm, children: Any) -> int:
    """P of an H-SAE of so many atoms."""
    assert arm.size.atoms is not None
    if not isinstance(children, int) or children < 1 or arm.size.atoms % (1 + children):
        allowed = f"a multiple of 1 + n_children_per_parent ({children})"
        raise ConfigError(f"arms.{arm.name}.size.atoms: found {arm.size.atoms}, allowed: {allowed}")
    return arm.size.atoms // (1 + children)


def model_config(study: Study, base: Config, run: RunKey, width: int) -> HSAEConfig | FlatConfig:
    """The run's model; a flat arm with `size: {params: ARM}` gets the latents that match ARM at the same L0."""
    config = run_config(study, base, run)
    arm: ArmConfig = config.arms[0]
    if arm.kind == "hsae":
        return config.arm_hsae(arm)
    flat = config.arm_flat(arm)
    other = study.arm(run.arm).size.params
    if other is None:
        return flat
    hsae = model_config(study, base, run._replace(arm=other), width)
    assert isinstance(hsae, HSAEConfig)
    n_latents = latents_for(parameter_count, flat, width, parameter_count(hsae, width))
    return type(flat).model_validate({**flat.model_dump(), "n_latents": n_latents})


def settings_hash(study: Study, run: RunKey) -> str:
    """SHA-256 of all that the study's file says of a run, but for the data: runs of one hash may stand in one table.

    What the file does not say follows the library, whose version and commit every record has.
    """
    arm = study.arm(run.arm)
    matched = None
    if arm.size.params is not None:
        other = study.arm(arm.size.params)
        stated = {**other.hsae, **other.l0[run.l0]}
        matched = [other.size.atoms, {field: stated[field] for field in SHAPE if field in stated}]
    return sha256_json(
        {
            "run": [run.hook, run.l0, run.seed, run.lr],
            "arm": [arm.kind, arm.size.atoms, arm.hsae, arm.flat, arm.training, arm.l0.get(run.l0)],
            "params": matched,
            "steps": [study.steps, study.batch_size],
            "config": stated_config(study.config, study.set, UNUSED),
            "measure": study.measure.model_dump(mode="json", exclude={"context_batch"}, exclude_defaults=True),
        }
    )


def stated_config(name: str, fields: Mapping[str, Any], unused: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a study's config says, key.path: value: its file's fields and those that the study replaces, but for those
    that change no result, ever or (`unused`) in this kind of study. A field that moves from the file to the study's
    `set` leaves it as it was.
    """
    tree = parse_yaml(find_config(name).read_text(encoding="utf-8")) or {}
    for key, value in fields.items():
        put(tree, key, deepcopy(value))  # a later field may go into it
    without = (*PLACES, *WATCHING, *unused)
    stated = {key: value for key, value in flatten(tree).items() if not _of(key, without)}
    for key in ("concepts.prompts", "concepts.exclude"):
        if stated.get(key) not in (None, "packaged"):  # a path; the data's hash has what lies there
            del stated[key]
    return stated


SHAPE = (  # fields of hsae that, with its atoms, decide its number of parameters
    "n_children_per_parent",
    "subspace_dim",
    "children",
    "use_encoder_bias",
    "use_decoder_bias",
    "use_tied_decoders_parent",
    "use_tied_decoders_child",
    "tie_projectors",
)


def _of(key: str, names: tuple[str, ...]) -> bool:
    """Whether a field is one of these, or in a block that is: training.lr is not training.lr_mult."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def places_removed(overrides: list[str]) -> list[str]:
    """The overrides that change results: not those that say where something lies or runs."""
    return [override for override in overrides if not _of(override.split("=")[0], PLACES)]


def require_unique(field: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{field}: found {values}, allowed: values that differ")
