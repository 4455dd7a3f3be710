"""Evaluation, its targets, and trackers (docs/method.md section 5)."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .block import Block, Whole


class SteeringConfig(Block):
    target_nats: float = Field(3.0, gt=0, description="Dose: the rise of the target concept's log-odds, nats.")
    contexts: Whole = Field(16, ge=1, description="Held-out contexts in which each concept is steered.")
    context_length: Whole = Field(24, ge=4, description="Length of a context, tokens.")
    max_concepts: Whole = Field(20, ge=1, description="Maximum parents to steer, evenly spaced in the list.")
    max_children: Whole = Field(8, ge=1, description="Maximum of their children to steer, likewise.")
    doses: list[Annotated[float, Field(gt=0)]] = Field([], description="More doses, nats, for a dose-response curve.")
    layers: list[str] = Field([], description="More hooks of the same width at which to steer.")


class LatentsConfig(Block):
    parents: Whole = Field(96, ge=1, description="Parents described: mapped ones, then by firing rate.")
    contexts: Whole = Field(4, ge=1, description="Contexts per parent, from different documents if possible.")
    window: Whole = Field(12, ge=1, description="Tokens shown on each side of the top activation.")
    words: Whole = Field(10, ge=1, description="Words per list.")


class TargetsConfig(Block):
    angle_deg: tuple[float, float] = Field((80.0, 100.0), description="Range for the median causal angle, degrees.")
    purity_gain_pp: float = Field(10.0, description="Minimum purity gain, percentage points.")
    leakage_reduction: float = Field(0.20, description="Minimum relative reduction of leakage.")
    steering_leakage_reduction: float = Field(0.20, description="Minimum relative reduction of steering leakage.")
    reconstruction_parity: float = Field(0.05, gt=0, description="Maximum relative FVU change, either way.")


class EvalConfig(Block):
    split: Literal["val", "test"] = Field("test", description="Held-out split: val to choose options, test once.")
    bootstrap: Whole = Field(1000, ge=100, description="Bootstrap resamples per confidence interval.")
    lm_contexts: Whole = Field(64, ge=1, description="Maximum contexts for CE and KL of the language model.")
    steering: SteeringConfig = Field(default_factory=SteeringConfig, description="How models are steered.")
    latents: LatentsConfig = Field(default_factory=LatentsConfig, description="What latents.json shows.")
    targets: TargetsConfig = Field(default_factory=TargetsConfig, description="Thresholds of the five targets.")


class TrackingConfig(Block):
    wandb: Literal["off", "online", "offline"] = Field("off", description="Also log to Weights & Biases.")
    wandb_project: str = Field("polytope_hsae", description="W&B project.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events.")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value
