"""Evaluation, its targets, and trackers (docs/method.md section 5)."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .block import Block, Whole


class SteeringConfig(Block):
    target_nats: float = Field(3.0, gt=0, description="Rise of the target's log-odds, nats.")
    contexts: Whole = Field(16, ge=1, description="Contexts that every concept is steered in.")
    context_length: Whole = Field(24, ge=4, description="Tokens per context.")
    max_concepts: Whole = Field(20, ge=1, description="Parents steered at most, evenly spaced in file order.")
    max_children: Whole = Field(8, ge=1, description="Children of these steered at most, likewise.")
    doses: list[Annotated[float, Field(gt=0)]] = Field([], description="Further rises, nats, for the dose-response.")
    layers: list[str] = Field([], description="Further hooks of the same width that directions are added at.")


class LatentsConfig(Block):
    parents: Whole = Field(
        96, ge=1, description="Parents described: all with a concept, then the most used, up to this."
    )
    contexts: Whole = Field(4, ge=1, description="Contexts shown of a parent, from different documents where possible.")
    window: Whole = Field(12, ge=1, description="Tokens of a context before and after its strongest one.")
    words: Whole = Field(10, ge=1, description="Words shown in every list.")


class TargetsConfig(Block):
    angle_deg: tuple[float, float] = Field((80.0, 100.0), description="Band of the median causal angle.")
    purity_gain_pp: float = Field(10.0, description="Gain of purity, percentage points.")
    leakage_reduction: float = Field(0.20, description="Relative fall of leakage.")
    steering_leakage_reduction: float = Field(0.20, description="Relative fall of steering leakage.")
    reconstruction_parity: float = Field(0.05, gt=0, description="Relative change of FVU, two-sided.")


class EvalConfig(Block):
    split: Literal["val", "test"] = Field("test", description="Split that is read: val to choose, test once.")
    bootstrap: Whole = Field(1000, ge=100, description="Bootstrap resamples of every interval.")
    lm_contexts: Whole = Field(64, ge=1, description="Contexts for CE and KL through the language model, at most.")
    steering: SteeringConfig = Field(default_factory=SteeringConfig, description="Steering.")
    latents: LatentsConfig = Field(default_factory=LatentsConfig, description="What latents.json describes.")
    targets: TargetsConfig = Field(default_factory=TargetsConfig, description="Thresholds of the targets.")


class TrackingConfig(Block):
    wandb: Literal["off", "online", "offline"] = Field("off", description="Weights & Biases beside metrics.jsonl.")
    wandb_project: str = Field("polytope_hsae", description="W&B project.")
    tensorboard: bool = Field(False, description="TensorBoard events beside metrics.jsonl.")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value
