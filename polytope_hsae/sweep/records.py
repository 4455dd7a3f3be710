"""The files of a sweep: study.yaml, runs.jsonl (a record a line) and hooks.json (the evidence of phase 1 by hook)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from ..evaluation.bootstrap import FloatArray, Metric, Units
from ..fileio import read_json, write_json, write_text
from ..parsing import checked, parse_json
from .plan import RunKey

DIGITS = 5  # significant ones that a record keeps
MAX_UNITS = 100
KEPT_COLUMNS = ("z", "ci95", "median_ci95", "beta_ci95", "omega_ci95", "kappa_ci95")


class Record(TypedDict):
    """What is read of every record before its numbers are."""

    arm: str
    hook: str
    l0: int | None
    lr: float | None
    seed: int
    settings_sha256: str
    data_sha256: str
    code: dict[str, Any]
    failed: str | None


def key_of(record: Mapping[str, Any]) -> RunKey:
    """Which run a record is of."""
    return RunKey(*(record[field] for field in RunKey._fields))


def read_runs(folder: Path) -> dict[RunKey, Any]:
    """All records of a sweep's folder, of equal runs the last. Raises ValueError naming the line that is none."""
    path = folder / "runs.jsonl"
    if not path.is_file():
        return {}
    found: dict[RunKey, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = checked(parse_json(line), Record, "not a record")
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
        found[key_of(record)] = record
    return found


def write_runs(folder: Path, records: Mapping[RunKey, Any]) -> None:
    """Write all records anew, whole or not at all."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records.values())
    write_text(folder / "runs.jsonl", "".join(f"{line}\n" for line in lines))


def read_hooks(folder: Path) -> dict[str, Any]:
    """The evidence of phase 1 by hook; {} where there is none."""
    path = folder / "hooks.json"
    found: dict[str, Any] = read_json(path, dict[str, Any]) if path.is_file() else {}
    return found


def write_hook(folder: Path, hook: str, evidence: Mapping[str, Any]) -> None:
    """Add a hook's evidence, without long columns."""
    write_json(folder / "hooks.json", {**read_hooks(folder), hook: short_evidence(evidence)})


def short_metric(metric: Metric) -> dict[str, Any]:
    """A metric with as many digits as a record keeps."""
    tree = metric.to_json()
    ci95 = None if tree["ci95"] is None else [rounded(value) for value in tree["ci95"]]
    return {**tree, "value": rounded(tree["value"]), "ci95": ci95, "chance": rounded(tree["chance"])}


def rounded(value: float | None) -> float | None:
    """Five significant digits; None for what is not finite."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.{DIGITS}g}")


def pack_units(units: Units) -> dict[str, list[Any]]:
    """Units as lists: at most 100, else sums over 100 groups of units that follow each other.

    `keys` names the units or groups; without `denominator` all are 1; null stands for a unit without a value.
    """
    numerator_U, denominator_U, keys_U = units.numerator_U, units.denominator_U, units.keys_U
    if len(keys_U) > MAX_UNITS:
        sums = np.zeros((MAX_UNITS, 2))
        np.add.at(sums, np.arange(len(keys_U)) * MAX_UNITS // len(keys_U), _present(units).T)
        numerator_U, denominator_U = sums.T
        keys_U = np.arange(MAX_UNITS)
    packed = {"keys": keys_U.tolist(), "numerator": [rounded(value) for value in numerator_U.tolist()]}
    if (denominator_U != 1).any():
        packed["denominator"] = [rounded(value) for value in denominator_U.tolist()]
    return packed


def _present(units: Units) -> FloatArray:
    """Numerators and denominators [2, U], 0 for a unit without a value."""
    return np.where(units.present_U, np.stack([units.numerator_U, units.denominator_U]), 0.0)


def unpack_units(packed: Mapping[str, list[Any]]) -> Units:
    """What `pack_units` packed."""
    numerator = np.array([np.nan if value is None else value for value in packed["numerator"]])
    denominator = packed.get("denominator")
    if denominator is None:
        return Units.mean(numerator, packed["keys"])
    return Units.ratio(numerator, [np.nan if value is None else value for value in denominator], packed["keys"])


def short_evidence(tree: Any) -> Any:
    """evidence.json with fewer digits and without its columns, but for z of the parents."""
    if isinstance(tree, dict):
        kept = {name: short_evidence(value) for name, value in tree.items() if name != "children"}
        return {name: value for name, value in kept.items() if not isinstance(value, list) or name in KEPT_COLUMNS}
    if isinstance(tree, list):
        return [short_evidence(value) for value in tree]
    return rounded(tree) if isinstance(tree, float) else tree
