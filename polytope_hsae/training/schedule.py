"""Functions of the step: stages, learning rate, penalty warm-up. Steps count over all stages together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import GROUPS, StageConfig, TrainingConfig


class Stage(NamedTuple):
    """A stage and the first step that belongs to it."""

    config: StageConfig
    start: int


def stage_at(stages: list[StageConfig], step: int) -> Stage:
    """The stage that step 0 <= step < total belongs to."""
    start = 0
    for config in stages:
        if step < start + config.steps:
            return Stage(config, start)
        start += config.steps
    raise IndexError(f"step {step} is past the last stage, which ends at {start}")


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Linear warm-up, then constant, or a cosine that reaches lr * lr_end_fraction at `schedule_steps`.

    The warm-up goes from lr / warmup_steps at step 0 to lr at its last step; with `lr_start`, from that at step 0 to lr
    at the first step after it (optax's convention). Without `schedule_steps` the cosine ends at the last step.
    """
    if step < config.warmup_steps:
        if config.lr_start is None:
            return config.lr * (step + 1) / config.warmup_steps
        return config.lr_start + (config.lr - config.lr_start) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = total - 1 if config.schedule_steps is None else config.schedule_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    low = config.lr_end_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def rate_multiplier(names: Sequence[str], lr_mult: Mapping[Any, float]) -> float:
    """The stage's multiplier for a parameter with these names (a tied one has two): a tensor's own, else its group's.

    Raises ValueError when the names of one parameter ask for different rates.
    """
    of_groups = {name: rate for group, rate in lr_mult.items() for name in GROUPS.get(group, ())}
    for rates in ({name: lr_mult[name] for name in names if name in lr_mult}, of_groups):
        found = {rates[name] for name in names if name in rates}
        if len(found) > 1:
            raise ValueError(f"lr_mult: found {sorted(found)} for the tied {' and '.join(names)}, allowed: one rate")
        if found:
            return found.pop()
    return 1.0


def penalty_warmup(config: TrainingConfig, step: int) -> float:
    """Factor of the weights of L1, bi-orthogonality and gram: linear from 0 to 1 over penalty_warmup_steps."""
    return 1.0 if config.penalty_warmup_steps == 0 else min(1.0, step / config.penalty_warmup_steps)
