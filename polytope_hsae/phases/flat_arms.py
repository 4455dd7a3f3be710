"""Flat arms: their models, their sizes, and how near they come to the arm that they are matched with."""

from collections.abc import Mapping
from typing import Any

from ..config import ArmConfig, FlatConfig
from ..fileio import read_json
from ..models.batchtopk import BatchTopKSAE
from ..models.flat import FlatSAE, TopKSAE
from ..models.flops import latents_for, parameter_count, training_flops
from ..models.jumprelu import JumpReLUSAE
from ..models.matryoshka import MatryoshkaSAE
from ..records import Train
from .run import Run

MODELS: dict[str, type[FlatSAE]] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "jumprelu": JumpReLUSAE,
    "matryoshka": MatryoshkaSAE,
}
TOLERANCE = 0.02  # relative difference up to which two arms are matched
NAMES = {"l0": "L0", "params": "parameters", "flops": "FLOPs per row"}


def flat_config(run: Run, arm: ArmConfig) -> FlatConfig:
    """The arm's config, sized by the arm that `match` names. Raises ValueError where no number of latents fits."""
    if not arm.match:
        return run.config.arm_flat(arm)
    other = figures(other_record(run, arm))
    k = other["l0"] if "l0" in arm.match else None
    config = run.config.arm_flat(arm, k)
    if "params" in arm.match:
        return run.config.arm_flat(arm, k, latents_for(parameter_count, config, run.store.width, other["params"]))
    if "flops" in arm.match:
        return run.config.arm_flat(arm, k, latents_for(training_flops, config, run.store.width, other["flops"]))
    return config


def other_record(run: Run, arm: ArmConfig) -> Train:
    """train.json of the arm that `match` names."""
    record: Train = read_json(run.arm_folder(next(iter(arm.match.values()))) / "train.json", Train)
    return record


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """What arms are matched by, from a train.json: measured validation L0, parameters, training FLOPs per row."""
    return {"l0": record["validation"]["val_l0"], "params": record["parameters"], "flops": record["flops_per_row"]}


def match_record(run: Run, arm: ArmConfig, record: dict[str, Any]) -> dict[str, Any]:
    """{quantity: {this, other, asked, matched}} of a trained arm and the one that `match` names; {} without one."""
    if not arm.match:
        return {}
    mine, other = figures(record), figures(other_record(run, arm))
    return {
        quantity: {
            "this": mine[quantity],
            "other": other[quantity],
            "asked": quantity in arm.match,
            "matched": abs(mine[quantity] - other[quantity]) <= TOLERANCE * other[quantity],
        }
        for quantity in NAMES
    }


def match_line(arm: ArmConfig, match: dict[str, Any]) -> str:
    """One line with the three figures of both arms; what was asked for and missed is `not matched`."""
    parts = []
    for quantity, found in match.items():
        verdict = (", matched" if found["matched"] else ", not matched") if found["asked"] else ""
        numbers = [f"{found[side]:,.1f}" if quantity == "l0" else f"{found[side]:,}" for side in ("this", "other")]
        parts.append(f"{NAMES[quantity]} {numbers[0]} and {numbers[1]}{verdict}")
    return f"{arm.name} and {next(iter(arm.match.values()))}: {'; '.join(parts)}"
