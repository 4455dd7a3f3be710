"""Records as findings: metrics over seeds, and the five targets of every arm by hook, by seed and over seeds.

Over seeds, every unit (a concept, or a group of documents) enters with the sum of its values of all seeds, which is the
mean where all have one; intervals resample units. The deviation over seeds stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..evaluation.bootstrap import Metric, Units, paired
from ..evaluation.targets import Thresholds, assess_targets
from ..study.results import TOLERANCE, Spread, spread
from .plan import Findings, Key, load_findings, settings_hash
from .record import unpack_units
from .run import read_hooks, records_in

TOGETHER = ("purity_gain_pp", "leakage_reduction", "steering_leakage_reduction", "reconstruction_parity")
OF_CONCEPTS = TOGETHER[:3]
PASS, FAIL = "PASS", "FAIL"
_RENAMED = {"zero_sum_rows": "no_fire_rate", "zero_sum_rows_own_slots": "no_fire_rate_own_slots"}  # in older records


@dataclass(frozen=True)
class Summary:
    """All records of a study with its present settings, and the split that is shown."""

    study: Findings
    configs: Mapping[str, Config]
    records: Mapping[Key, Any]
    hooks: Mapping[str, Any]
    left_out: list[str]
    split: str
    _known: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict)  # targets that were computed

    def seeds(self, hook: str, arm: str) -> list[int]:
        """The seeds that an arm has values of."""
        return [seed for seed in self.study.seeds if self.split in self.records.get(Key(hook, seed, arm), {})]

    def arms(self, hook: str) -> list[str]:
        """The arms that have values at a hook, in the study's order."""
        return [arm.name for arm in self.study.arms if self.seeds(hook, arm.name)]

    @property
    def shown_hooks(self) -> list[str]:
        """The hooks that have values."""
        return [plan.hook for plan in self.study.hooks if self.arms(plan.hook)]

    def metrics(self, hook: str, seed: int, arm: str) -> dict[str, Any]:
        """An arm's metrics, as in results.json."""
        found: dict[str, Any] = self.records[Key(hook, seed, arm)][self.split]["metrics"]
        return {_RENAMED.get(name, name): metric for name, metric in found.items()}

    @cached_property
    def metric_names(self) -> list[str]:
        """Every metric that a record has: the main table's first, then by name."""
        names = {name for key, record in self.records.items() if self.split in record for name in self.metrics(*key)}
        first = [name for name in self.study.shown if name in names]
        return first + sorted(names - set(first))

    def over_seeds(self, hook: str, arm: str, metric: str) -> Spread | None:
        """Mean and deviation of a metric over the seeds that have a value."""
        found = [self.metrics(hook, seed, arm).get(metric, {}).get("value") for seed in self.seeds(hook, arm)]
        return spread([value for value in found if value is not None])

    def l0_gap(self, hook: str, arm: str) -> float:
        """How far an arm's L0 is from that of the arm that it is compared with, relative to the latter; means over
        seeds. 0 where it is within the tolerance of matched arms, or not known.
        """
        l0, other = (self.over_seeds(hook, name, "l0") for name in (arm, self.study.against(arm)))
        if l0 is None or other is None:
            return 0.0
        gap = l0.mean / other.mean - 1
        return gap if abs(gap) > TOLERANCE else 0.0

    def chance(self, hook: str, metric: str) -> Spread | None:
        """The mean chance level of a metric over arms and seeds."""
        found = [
            self.metrics(hook, seed, arm).get(metric, {}).get("chance")
            for arm in self.arms(hook)
            for seed in self.seeds(hook, arm)
        ]
        return spread([value for value in found if value is not None])

    def targets(self, hook: str, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The five targets of an arm against the one that it is compared with, over these seeds together."""
        asked = (hook, arm, *seeds)
        if asked not in self._known:
            self._known[asked] = self._assessed(hook, arm, seeds)
        return self._known[asked]

    def _assessed(self, hook: str, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        other = self.study.against(arm)
        seeds = [seed for seed in seeds if seed in self.seeds(hook, arm) and seed in self.seeds(hook, other)]
        first, second = self._pooled(hook, other, arm, seeds)
        options, limits = self.configs[hook].eval, self.configs[hook].eval.targets
        return assess_targets(
            self.angle(hook),
            first,
            second,
            thresholds=Thresholds(
                limits.angle_deg,
                limits.purity_gain_pp,
                limits.leakage_reduction,
                limits.steering_leakage_reduction,
                limits.reconstruction_parity,
            ),
            bootstrap=options.bootstrap,
            seed=self.configs[hook].run.seed,
        )

    def _pooled(self, hook: str, other: str, arm: str, seeds: Sequence[int]) -> tuple[dict[str, Units], ...]:
        """The units of both arms, summed over seeds; a unit without a value in one of them counts in neither."""
        pairs: dict[str, list[tuple[Units, Units]]] = {}
        for seed in seeds:
            packed = [self.records[Key(hook, seed, name)][self.split]["units"] for name in (other, arm)]
            for name in packed[0].keys() & packed[1].keys():
                pairs.setdefault(name, []).append((unpack_units(packed[0][name]), unpack_units(packed[1][name])))
        summed = {name: pooled(found) for name, found in sorted(pairs.items())}
        return tuple({name: both[side] for name, both in summed.items()} for side in (0, 1))

    def fall(self, hook: str, arm: str, metric: str) -> Metric | None:
        """Relative fall of a metric against the arm that it is compared with, over all seeds; None if not kept."""
        other, seeds = self.study.against(arm), self.seeds(hook, arm)
        first, second = self._pooled(hook, other, arm, [seed for seed in seeds if seed in self.seeds(hook, other)])
        if metric not in first:
            return None
        options, seed = self.configs[hook].eval, self.configs[hook].run.seed
        return paired(first[metric], second[metric], "relative_reduction", options.bootstrap, seed)

    def angle(self, hook: str) -> Metric | None:
        """The median angle of the evidence at a hook; None where there is none."""
        found = self.hooks.get(hook, {}).get("evidence", {}).get("main", {}).get("angles")
        if not found:
            return None
        return Metric(found["median_angle_deg"], tuple(found["median_ci95"]), 90.0, self.parents(hook))

    def parents(self, hook: str) -> int:
        """Parents of the study's concepts."""
        return next(int(record["parents"]) for key, record in self.records.items() if key.hook == hook)

    def verdicts(self, hook: str, arm: str, target: str) -> list[str]:
        """A target's verdict for every seed."""
        return [_named(self.targets(hook, arm, [seed]), target)["verdict"] for seed in self.seeds(hook, arm)]

    def passes(self, hook: str, arm: str, target: str) -> tuple[int, int]:
        """In how many seeds a target passes, and of how many."""
        found = self.verdicts(hook, arm, target)
        return found.count(PASS), len(found)

    def together(self, hook: str, arm: str) -> bool:
        """Whether the targets of method.md section 5 but the angle pass in every seed."""
        every = [self.passes(hook, arm, target) for target in TOGETHER]
        return all(passed == of and of == len(self.study.seeds) for passed, of in every)

    def together_over_seeds(self, hook: str, arm: str) -> bool:
        """Whether the same targets pass over the seeds together."""
        over = self.targets(hook, arm, self.seeds(hook, arm))
        return all(_named(over, target)["verdict"] == PASS for target in TOGETHER)


def variants(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of evidence.json: the hierarchy (main), its controls and the other metrics."""
    return {name: block for name, block in evidence.items() if isinstance(block, dict) and "median_z" in block}


def _named(targets: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(target for target in targets if target["name"] == name)


def pooled(pairs: Sequence[tuple[Units, Units]]) -> tuple[Units, Units]:
    """Units of both arms summed over seeds by key. `pairs`: (first, second) arm of every seed.

    Raises ValueError where the arms of a seed were measured on different units.
    """
    keys_U = np.unique(np.concatenate([first.keys_U for first, _ in pairs]))
    sums = np.zeros((4, len(keys_U)))
    for first, second in pairs:
        if not np.array_equal(first.keys_U, second.keys_U):
            raise ValueError("units: found different ones in two arms of one seed, allowed: the same")
        present_U = first.present_U & second.present_U
        place_U = np.searchsorted(keys_U, first.keys_U[present_U])
        columns = (first.numerator_U, first.denominator_U, second.numerator_U, second.denominator_U)
        for row, column_U in enumerate(columns):
            sums[row, place_U] += column_U[present_U]
    sums[:, (sums[1] == 0) & (sums[3] == 0)] = np.nan
    return Units.ratio(sums[0], sums[1], keys_U), Units.ratio(sums[2], sums[3], keys_U)


def read_summary(folder: Path, split: str) -> Summary:
    """Read a study's folder. Records that the study does not ask for, or of other settings, are left out and named.

    Raises ValueError when the records that are left come from different data, or none is left.
    """
    study, configs = load_findings(folder / "study.yaml")
    there, asked = records_in(folder), set(study.keys)
    kept = {
        key: record
        for key, record in there.items()
        if key in asked and record["settings_sha256"] == settings_hash(study, key)
    }
    hashes = sorted({record["data_sha256"] for record in kept.values()})
    if len(hashes) > 1:
        raise ValueError(f"{folder}: found records from different data, {hashes[0]} and {hashes[1]}, allowed: one")
    if not any(split in record for record in kept.values()):
        raise ValueError(
            f"{folder}: found no {split} values, allowed: hsae findings run{' --test' * (split == 'test')}"
        )
    left_out = [key.file for key in there if key not in kept]
    return Summary(study, configs, kept, read_hooks(folder), left_out, split)


def results(found: Summary) -> dict[str, Any]:
    """The object of results.json: the aggregate over seeds at the top, and every hook and seed under `runs`."""
    config = next(iter(found.configs.values()))
    seeds = found.study.seeds
    return {
        "model": config.model.title,
        "split": found.split,
        "seeds": list(seeds),
        "hooks": {
            hook: {
                "label": _label(found, hook),
                "arms": {
                    arm: {
                        name: None if (over := found.over_seeds(hook, arm, name)) is None else over._asdict()
                        for name in found.metric_names
                    }
                    for arm in found.arms(hook)
                },
                "targets": {arm: found.targets(hook, arm, seeds) for arm in _compared(found, hook)},
            }
            for hook in found.shown_hooks
        },
        "runs": [_run(found, hook, seed) for hook in found.shown_hooks for seed in seeds],
    }


def _run(found: Summary, hook: str, seed: int) -> dict[str, Any]:
    arms = [arm for arm in found.arms(hook) if seed in found.seeds(hook, arm)]
    plan = found.study.plan(hook)
    return {
        "model": found.configs[hook].model.title,
        "hook": hook,
        "label": _label(found, hook),
        "split": found.split,
        "seeds": [seed],
        "arms": {arm: found.metrics(hook, seed, arm) for arm in arms},
        "targets": found.targets(hook, plan.teacher, [seed]) if plan.teacher in arms else [],
    }


def _compared(found: Summary, hook: str) -> list[str]:
    return [arm for arm in found.arms(hook) if found.study.against(arm) != arm]


def _label(found: Summary, hook: str) -> str:
    return next(str(record["label"]) for key, record in found.records.items() if key.hook == hook)
