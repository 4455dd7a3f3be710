"""Functions of the step: stages, learning rate, penalty warm-up. Steps count over all stages together."""

import math
from typing import NamedTuple

from ..config import StageConfig, TrainingConfig


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
    """Linear warm-up from 1/warmup_steps, then constant, or a cosine to lr * lr_end_fraction at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps)
    low = config.lr_end_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def penalty_warmup(config: TrainingConfig, step: int) -> float:
    """Factor of the L1 and orthogonality weights: linear from 0 to 1 over penalty_warmup_steps."""
    return 1.0 if config.penalty_warmup_steps == 0 else min(1.0, step / config.penalty_warmup_steps)
