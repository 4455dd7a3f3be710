"""Optimisation in stages, and what the teacher puts in and holds (docs/method.md sections 2 and 4)."""

from typing import Annotated, Literal

from pydantic import Field

from .block import Block, TensorGroup, TensorName, Whole
from .hsae import HSAEConfig


class TeacherConfig(Block):
    init: Literal["dual", "literal"] = Field(
        "literal", description="Separate read and write directions, or one for both."
    )
    energy: float = Field(0.85, gt=0, le=1, description="Share of the children's variance that a subspace keeps.")
    anchor: Literal["none", "frozen", "pull", "slow"] = Field(
        "none",
        description="How E and D stay near the teacher: not, frozen, by a penalty (pull), by small updates (slow).",
    )
    anchor_weight: float = Field(100.0, ge=0, description="Weight of anchor pull's penalty, 1 - cos to the teacher.")
    anchor_lr_mult: float = Field(0.05, ge=0, le=1, description="Fraction of each update that anchor slow applies.")
    means: Literal["rows", "balanced"] = Field(
        "rows",
        description="rows = concept means over rows, minus the mean of all rows; balanced = every train token counts "
        "alike, minus the mean of all parents.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sets and freezes b_E of the teacher's parents: they turn on this far from the mean logit of other "
        "concepts' train tokens (0) to that of their own (1); null = b_E is learned from 0.",
    )
    metric: Literal["causal", "identity", "diagonal", "random"] | None = Field(
        None,
        description="Metric of the teacher (identity = Euclidean); null = phase 1's teacher. At an inner hook causal "
        "is the inverse within-class covariance; diagonal and random derive from it.",
    )
    rotate_deg: float = Field(
        0.0, ge=0, le=180, description="Ablation: rotate the whole teacher, degrees. Needs an even width."
    )
    noise_deg: float = Field(
        0.0, ge=0, le=180, description="Ablation: rotate every teacher vector in its own random direction, degrees."
    )
    seed_parent: bool = Field(True, description="Initialise parents from the teacher.")
    seed_child: bool = Field(True, description="Initialise children from the teacher's differences.")
    seed_projectors: bool = Field(True, description="Initialise projectors from the teacher's subspaces.")


class LossOverrides(Block):
    """Loss weights that a stage replaces; null keeps the model's."""

    l1_parent: float | None = Field(None, ge=0, description="See hsae.l1_parent.")
    l1_child: float | None = Field(None, ge=0, description="See hsae.l1_child.")
    biorth_lambda: float | None = Field(None, ge=0, description="See hsae.biorth_lambda.")
    gram_lambda: float | None = Field(None, ge=0, description="See hsae.gram_lambda.")
    causal_ortho_lambda: float | None = Field(None, ge=0, description="See hsae.causal_ortho_lambda.")
    top_level_beta: float | None = Field(None, ge=0, description="See hsae.top_level_beta.")
    aux_weight: float | None = Field(None, ge=0, description="Flat arms: see FlatConfig.aux_weight.")

    def apply(self, hsae: HSAEConfig) -> HSAEConfig:
        """The model's config with this stage's weights."""
        return hsae.model_copy(update=self.model_dump(exclude_none=True, exclude={"aux_weight"}))


class StageConfig(Block):
    name: str = Field(description="Name of the stage in logs.")
    steps: Whole = Field(ge=1, description="Optimiser steps.")
    freeze: list[TensorName] = Field([], description="Tensors that this stage does not train.")
    loss: LossOverrides = Field(default_factory=LossOverrides, description="Loss weights of this stage.")
    lr_mult: dict[TensorName | TensorGroup, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Learning rate multipliers by tensor, or by group (router: E, b_E; decoders: D, G; projectors: "
        "Down, Up; children: F, b_F). A tensor's own entry wins.",
    )


class PhaseStages(Block):
    stages: list[StageConfig] = Field([StageConfig(name="train", steps=1000)], min_length=1, description="In order.")

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)


class TrainingConfig(Block):
    batch_size: Whole = Field(2048, ge=1, description="Rows per micro-batch.")
    accumulate: Whole = Field(1, ge=1, description="Micro-batches per optimiser step.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="Learning rate after the warm-up.")
    lr_start: float | None = Field(None, ge=0, description="Learning rate of step 0; null = lr / warmup_steps.")
    lr_end_fraction: float = Field(0.1, ge=0, le=1, description="Where the cosine ends, as a share of lr.")
    schedule_steps: Whole | None = Field(None, ge=1, description="Step at which the cosine ends; null = the last step.")
    warmup_steps: Whole = Field(50, ge=0, description="Linear warm-up of the learning rate, steps.")
    penalty_warmup_steps: Whole = Field(
        100,
        ge=0,
        description="Linear warm-up of L1, biorth_lambda and gram_lambda (not causal_ortho_lambda), steps.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm; null = no clipping.")
    precision: Literal["bf16", "tf32", "float32"] | None = Field(
        None, description="Precision of matrix products on a GPU; null = bf16. Weights, sums and the CPU use float32."
    )
    cuda_graph: bool = Field(
        False,
        description="Replay each training step as one CUDA graph: faster where a step takes a few ms. No effect on a "
        "CPU, batchtopk, matryoshka and jumprelu.",
    )
    dead_after: Whole = Field(100_000, ge=1, description="Tokens without firing after which a parent is dead.")
    dead_after_routed: Whole = Field(
        2_000, ge=1, description="Tokens of its parent without firing after which a child is dead."
    )
    log_every: Whole = Field(10, ge=1, description="Steps between metric lines.")
    checkpoint_every: Whole = Field(200, ge=1, description="Steps between checkpoints.")
    val_every: Whole = Field(200, ge=1, description="Steps between validation passes.")
    val_rows: Whole = Field(16_384, ge=1, description="Maximum rows of a validation pass.")
    baseline: PhaseStages = Field(default_factory=PhaseStages, description="Stages of arms with random initialisation.")
    teacher: PhaseStages = Field(default_factory=PhaseStages, description="Stages of arms initialised by a teacher.")
    allow_unequal_budget: bool = Field(False, description="Allow arms that train for different numbers of steps.")
