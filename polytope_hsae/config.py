"""The one configuration model: every field with its meaning, unit and bounds.

`load_config("quickstart", ["run.seed=1"])` reads a packaged config by name or any YAML file by path, applies
`key.path=value` overrides and validates. Bad input raises ConfigError with one line: field, found, allowed.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .parsing import cut, misfit, parse_yaml, place, shown

PACKAGE = Path(__file__).parent
FOLDER_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
MAX_BYTES = 1_000_000  # of a config file
Fraction = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(le=2**31 - 1)]  # PyTorch breaks on sizes that no 64-bit product holds
Tie = Literal[False, True, "init"]
TensorName = Literal["E", "b_E", "D", "Down", "Up", "F", "b_F", "G", "b_dec", "log_threshold"]
TensorGroup = Literal["router", "decoders", "projectors", "children"]
GROUPS: dict[str, tuple[str, ...]] = {
    "router": ("E", "b_E"),
    "decoders": ("D", "G"),
    "projectors": ("Down", "Up"),
    "children": ("F", "b_F"),
}

BlockT = TypeVar("BlockT", bound="Block")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: field, found, allowed."""


class Block(BaseModel):
    """Base of all config blocks: unknown keys, NaN and infinities are refused; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _require(field: str, found: Any, condition: bool, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}: found {found}, allowed: {allowed}")


def _check_split(block: Any) -> Any:
    _require(
        "split",
        list(block.split),
        abs(sum(block.split) - 1) < 1e-6 and min(block.split) > 0,
        "three shares above 0 with sum 1",
    )
    return block


class RunConfig(Block):
    name: str = Field("run", description="Folder name of the run below runs/.", pattern=FOLDER_NAME)
    seed: Whole = Field(0, ge=0, description="Seed of everything random in the run.")
    device: str = Field("auto", description="auto (CUDA if there is one), cpu, cuda or cuda:N.")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads; part of what makes a CPU run repeatable.")
    deterministic: bool = Field(True, description="Ask PyTorch for deterministic algorithms.")


class ModelConfig(Block):
    name: str = Field("textbook-lm-9m", description="Hub id, folder, or the packaged textbook-lm-9m.")
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch).")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision the language model runs in.")
    hook: str = Field(
        "final_residual_pre_unembed",
        description="final_residual_pre_unembed (after the final norm), layers.N (N-th block, negative from the end), "
        "or any module name, e.g. model.layers.2.",
    )


class CorpusConfig(Block):
    source: Literal["tokens", "text", "jsonl", "parquet", "hub"] = Field("tokens", description="Kind of corpus.")
    path: str | None = Field(None, description="File or hub dataset; null = the packaged sampled tokens.")
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.80, 0.05, 0.15), description="Shares of documents for train, val and test."
    )
    max_tokens: Whole = Field(600_000, ge=256, description="Tokens read at most.")
    context_length: Whole = Field(256, ge=8, description="Tokens of one context at most.")

    @model_validator(mode="after")
    def _sums_to_one(self) -> "CorpusConfig":
        return _check_split(self)


class ConceptsConfig(Block):
    ontology: str = Field("wordnet", description="wordnet, or a YAML/JSON tree {parent: {child: [words]}}.")
    max_parents: Whole = Field(80, ge=2, description="Parents kept at most.")
    max_children_per_parent: Whole = Field(32, ge=2, description="Children kept per parent at most.")
    min_children: Whole = Field(3, ge=2, description="Parents with fewer children are dropped.")
    min_words_per_child: Whole = Field(3, ge=3, description="Children with fewer words are dropped.")
    min_test_rows: Whole = Field(20, ge=1, description="Concept metrics cover parents with this many test rows.")
    label: Literal["belief", "next_token", "current_token"] = Field(
        "belief", description="Which concept a row carries: what the model believes comes next, what comes, what is."
    )
    belief_threshold: float = Field(0.3, gt=0, lt=1, description="Probability mass from which a belief is a label.")
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.70, 0.15, 0.15), description="Shares of words for train, val and test."
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> "ConceptsConfig":
        return _check_split(self)


class DataConfig(Block):
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Stored activations.")
    shard_rows: Whole = Field(65_536, ge=256, description="Rows per shard file.")
    batch_tokens: Whole = Field(8_192, ge=64, description="Tokens per forward pass of the language model.")
    normalize: Literal["rms", "unit_row", "none"] = Field(
        "rms", description="rms: (h - mean)/scale so that E|x|^2 = d; unit_row: h/|h|; none."
    )
    bias_rows: Whole | None = Field(
        4096, ge=1, description="Train rows whose geometric median starts b_dec; null = all of them, read as a stream."
    )


class GeometryConfig(Block):
    metric: Literal["causal", "identity", "diagonal", "random"] = Field(
        "causal", description="Metric of the unembedding's rows; causal = their covariance, the rest to compare with."
    )
    shrinkage: float = Field(0.05, ge=0, lt=1, description="Relative shrinkage of the covariance to its mean.")
    estimator: Literal["mean", "lda"] = Field("mean", description="Concept vector from its tokens.")
    permutations: Whole = Field(1000, ge=100, description="Draws of every permutation null.")


class TeacherConfig(Block):
    init: Literal["dual", "literal"] = Field("dual", description="Read and write directions apart, or one for both.")
    energy: float = Field(0.85, gt=0, le=1, description="Share of the deltas' squared singular values a basis keeps.")
    anchor: Literal["none", "frozen", "pull", "slow"] = Field(
        "none", description="What holds the teacher's rows of E and D (b_E stays free), in every stage."
    )
    anchor_weight: float = Field(100.0, ge=0, description="Weight of the pull penalty, 1 - cos to the teacher.")
    anchor_lr_mult: float = Field(0.05, ge=0, le=1, description="Share of each update that slow rows take.")
    noise_deg: float = Field(0.0, ge=0, le=180, description="Rotation of every teacher vector, degrees.")
    seed_parent: bool = Field(True, description="Initialise router rows from the teacher.")
    seed_child: bool = Field(True, description="Initialise children from the teacher's differences.")
    seed_projectors: bool = Field(True, description="Initialise projectors from the teacher's subspaces.")


class HSAEConfig(Block):
    """Shape and losses of an H-SAE (docs/method.md sections 1 and 2)."""

    n_parents: Whole = Field(256, ge=1, description="P: parents (experts).")
    topk_parent: Whole = Field(16, ge=1, description="k: active parents per row.")
    n_children_per_parent: Whole = Field(8, ge=1, description="C: children per parent.")
    topk_child: Whole = Field(1, ge=1, description="k_c: active children per active parent.")
    topk_child_total: Whole | None = Field(
        None, ge=1, description="K_c: active children per row under child_budget shared or batch; null = k * k_c."
    )
    subspace_dim: Whole = Field(16, ge=1, description="s: width of a parent's subspace.")
    gate: Literal["hard", "straight_through"] = Field("straight_through", description="Gradient of the choice.")
    magnitude: Literal["relu", "binary", "leaky_offset"] = Field(
        "relu",
        description="Size of a code: relu; binary = the gate alone; leaky_offset = the logit from 1/sqrt(d) up, "
        "below that 0 for a parent and a hundredth of it for a child.",
    )
    router_noise: Literal["relative", "absolute"] = Field(
        "relative", description="Gumbel noise scaled by the row's logit deviation, or as it is."
    )
    router_balance_rate: float = Field(
        0.0,
        ge=0,
        description="Move of a parent's bias of the choice against its load, per batch, units of r.",
    )
    router_temp_start: float = Field(1.5, gt=0, description="Routing temperature at the first step.")
    router_temp_end: float = Field(0.7, gt=0, description="Routing temperature that the last step approaches.")
    recycle_every: Whole = Field(0, ge=0, description="Steps between recyclings of dead parents; 0 = never.")
    recycle_until: Whole | None = Field(None, ge=1, description="Last step that may recycle; null = any.")
    split_above: float | None = Field(
        None, gt=0, le=1, description="Recycling splits parents active in more than this share of rows; null = none."
    )
    child_input: Literal["input", "residual"] = Field(
        "residual", description="What children read: the row, or what the parents leave of it."
    )
    child_input_detach: bool = Field(False, description="Stop the residual's gradient at the parents.")
    parent_budget: Literal["per_row", "batch", "joint"] = Field(
        "per_row",
        description="k parents for each row; B k for a batch of B rows; or B (k + K_c) for parents and children, which "
        "share them so that the smallest code of both is the same.",
    )
    child_budget: Literal["per_parent", "shared", "batch"] = Field(
        "shared", description="k_c children for each active parent, K_c for all of a row's, or B K_c for a batch."
    )
    budget_slots: float = Field(
        2.0, ge=1, description="Codes that a row may have under a batch's budget, as a multiple of k, or of K_c."
    )
    k_anneal_steps: Whole = Field(0, ge=0, description="Steps in which k and K_c go linearly from their starts.")
    topk_parent_start: Whole | None = Field(None, ge=1, description="k at the first step; null = topk_parent.")
    active_children_start: Whole | None = Field(
        None, ge=1, description="K_c at the first step, under child_budget shared or batch; null = K_c."
    )
    threshold_decay: float = Field(
        0.99, ge=0, lt=1, description="Memory of a batch budget's running mean of its smallest code, per batch."
    )
    child_encoder: Literal["factored", "direct"] = Field(
        "factored", description="Children read through Down_p and F_p of rank s, or each has a row of width d for F."
    )
    child_decoder: Literal["factored", "direct"] = Field(
        "factored", description="Atoms are Up_p^T G_pj of rank s, or each is a row of width d of G."
    )
    use_tied_decoders_parent: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")
    use_tied_decoders_child: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")
    tie_projectors: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")
    use_encoder_bias: bool = Field(True, description="Learn b_E and b_F, started at 0.")
    use_decoder_bias: bool = Field(True, description="Learn b_dec, started at the geometric median.")
    initial: Literal["unit", "he_uniform"] = Field(
        "unit", description="Random start: unit rows and orthonormal subspaces, or He-uniform with D left unnormalised."
    )
    initial_router: Literal["random", "rows"] = Field(
        "random", description="Parents start at random directions, or both E and D at rows of the bias sample."
    )
    initial_children: Literal["random", "data"] = Field(
        "random",
        description="Sub-SAEs start at random, or at what their parent leaves of the rows that it is active on.",
    )
    normalize_decoder: bool = Field(True, description="Keep decoder rows and atoms at unit norm.")
    normalize_child: Literal["atom", "decoder"] = Field("atom", description="What has unit norm: the atom or G's row.")
    norm_metric: Literal["euclidean", "causal"] = Field("euclidean", description="Norm of the constraint.")
    project_gradient: bool = Field(False, description="Remove the gradient along constrained rows before a step.")
    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    top_level_beta: float = Field(0.1, ge=0, description="Weight of the parents-only reconstruction.")
    l1_parent: float = Field(0.0, ge=0, description="Weight of the parents' L1.")
    l1_child: float = Field(0.0, ge=0, description="Weight of the children's L1.")
    l1_scope: Literal["selected", "all"] = Field("selected", description="Codes that the L1 covers.")
    biorth_lambda: float = Field(0.0, ge=0, description="Weight of bi-orthogonality.")
    use_offdiag_biorth: Literal[False, True, "jax"] = Field(
        False,
        description="false: |E D^T - I|^2; true: unit rows, off-diagonal entries only; jax: as in the published code.",
    )
    gram_lambda: float = Field(0.0, ge=0, description="Weight of the overlap of decoder rows with each other.")
    causal_ortho_lambda: float = Field(0.0, ge=0, description="Weight of parent-child causal orthogonality.")
    causal_orth_form: Literal["atom", "literal"] = Field("atom", description="Atom itself, or atom minus parent.")
    aux_weight: float = Field(0.0, ge=0, description="Weight of the error that dead parents and children rebuild.")
    aux_k_parent: Whole = Field(32, ge=1, description="Dead parents used per row, at most.")
    aux_k_child: Whole = Field(8, ge=1, description="Dead children of active parents used per row, at most.")

    @classmethod
    def jax_compat(
        cls,
        n_parents: int = 16_384,
        n_children_per_parent: int = 16,
        subspace_dim: int = 4,
        topk_parent: int = 32,
        tied: Tie = "init",
    ) -> Self:
        """The published JAX H-SAE, number for number (docs/method.md section 6); use it with normalize `unit_row`.

        `tied`: `init` as its code does (equal at the start only), true as the paper describes it.
        """
        return cls(
            n_parents=n_parents,
            topk_parent=topk_parent,
            n_children_per_parent=n_children_per_parent,
            topk_child=1,
            subspace_dim=subspace_dim,
            gate="hard",
            magnitude="leaky_offset",
            child_input="input",
            child_budget="per_parent",
            use_tied_decoders_parent=tied,
            use_tied_decoders_child=tied,
            tie_projectors=tied,
            use_encoder_bias=False,
            use_decoder_bias=False,
            initial="he_uniform",
            normalize_child="decoder",
            project_gradient=True,
            top_level_beta=0.1,
            l1_parent=1e-3,
            l1_child=1e-3,
            l1_scope="all",
            biorth_lambda=0.1,
            use_offdiag_biorth="jax",
        )

    @property
    def active_children(self) -> int:
        """K_c: children kept per row."""
        return self.topk_child_total or self.topk_parent * self.topk_child

    @property
    def total_l0(self) -> int:
        """Active parents and children per row, on average where rows share them."""
        return self.topk_parent + self.active_children

    def _check_annealing(self) -> None:
        k, K = self.topk_parent_start, self.active_children_start
        started = k is not None or K is not None
        _require(
            "k_anneal_steps",
            self.k_anneal_steps,
            started == (self.k_anneal_steps > 0),
            "above 0 with topk_parent_start or active_children_start, 0 without",
        )
        if k is not None:
            _require("topk_parent_start", k, k <= self.n_parents, f"at most n_parents = {self.n_parents}")
            _require("topk_parent_start", k, self.gate == "hard", "null unless gate is hard")
        if K is not None:
            limit = self.topk_parent * self.n_children_per_parent
            _require("active_children_start", K, limit >= K, f"at most k * C = {limit}")
            shared = self.child_budget != "per_parent"
            _require("active_children_start", K, shared, "null unless child_budget is shared or batch")

    @model_validator(mode="after")
    def _consistent(self) -> "HSAEConfig":
        _require(
            "topk_parent", self.topk_parent, self.topk_parent <= self.n_parents, f"at most n_parents = {self.n_parents}"
        )
        C = self.n_children_per_parent
        _require("topk_child", self.topk_child, self.topk_child <= C, f"at most n_children_per_parent = {C}")
        if self.topk_child_total is not None:
            _require(
                "topk_child_total",
                self.topk_child_total,
                self.child_budget != "per_parent",
                "null unless child_budget is shared or batch",
            )
            limit = self.topk_parent * C
            _require(
                "topk_child_total", self.topk_child_total, self.topk_child_total <= limit, f"at most k * C = {limit}"
            )
        direct_F, direct_G = self.child_encoder == "direct", self.child_decoder == "direct"
        _require("child_decoder", "direct", direct_F or not direct_G, "factored unless child_encoder is direct")
        tied = direct_F == direct_G or self.use_tied_decoders_child is not True
        _require("use_tied_decoders_child", "true", tied, "false or init unless child_encoder and child_decoder agree")
        tied = not direct_F or self.tie_projectors is not True
        _require("tie_projectors", "true", tied, "false or init unless child_encoder is factored")
        for field, others in (("parent_budget", "per_row"), ("child_budget", "per_parent or shared")):
            found = getattr(self, field)
            relu = found not in ("batch", "joint") or self.magnitude == "relu"
            _require(field, found, relu, f"{others} unless magnitude is relu")
        hard = self.parent_budget == "per_row" or self.gate == "hard"
        _require("parent_budget", self.parent_budget, hard, "per_row unless gate is hard")
        both = self.parent_budget != "joint" or self.child_budget == "batch"
        _require("parent_budget", "joint", both, "per_row or batch unless child_budget is batch")
        alone = self.parent_budget == "per_row" or self.router_balance_rate == 0
        _require("router_balance_rate", self.router_balance_rate, alone, "0 unless parent_budget is per_row")
        for field in ("recycle_until", "split_above"):
            found = getattr(self, field)
            _require(field, found, found is None or self.recycle_every > 0, "null unless recycle_every is above 0")
        self._check_annealing()
        return self


class LossOverrides(Block):
    """Loss weights that a stage replaces; null keeps the model's."""

    l1_parent: float | None = Field(None, ge=0, description="See hsae.l1_parent.")
    l1_child: float | None = Field(None, ge=0, description="See hsae.l1_child.")
    biorth_lambda: float | None = Field(None, ge=0, description="See hsae.biorth_lambda.")
    gram_lambda: float | None = Field(None, ge=0, description="See hsae.gram_lambda.")
    causal_ortho_lambda: float | None = Field(None, ge=0, description="See hsae.causal_ortho_lambda.")
    top_level_beta: float | None = Field(None, ge=0, description="See hsae.top_level_beta.")
    aux_weight: float | None = Field(None, ge=0, description="See hsae.aux_weight.")

    def apply(self, hsae: HSAEConfig) -> HSAEConfig:
        """The model's config with this stage's weights."""
        return hsae.model_copy(update=self.model_dump(exclude_none=True))


class StageConfig(Block):
    name: str = Field(description="Name of the stage in logs.")
    steps: Whole = Field(ge=1, description="Optimiser steps.")
    freeze: list[TensorName] = Field([], description="Tensors that do not change in this stage.")
    loss: LossOverrides = Field(default_factory=LossOverrides, description="Loss weights of this stage.")
    lr_mult: dict[TensorName | TensorGroup, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Rate multipliers by tensor or group (router: E, b_E; decoders: D, G; projectors: Down, Up; "
        "children: F, b_F); a tensor's own entry goes before its group's.",
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
    lr_start: float | None = Field(None, ge=0, description="Rate of step 0 of the warm-up; null = lr / warmup_steps.")
    lr_end_fraction: float = Field(0.1, ge=0, le=1, description="Cosine ends at this share of lr.")
    schedule_steps: Whole | None = Field(None, ge=1, description="Step at which the cosine ends; null = the last one.")
    warmup_steps: Whole = Field(50, ge=0, description="Linear warm-up of the learning rate, steps.")
    penalty_warmup_steps: Whole = Field(100, ge=0, description="Linear warm-up of L1 and orthogonality, steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    grad_clip: float | None = Field(1.0, gt=0, description="Global gradient norm at most; null = no clipping.")
    precision: Literal["bf16", "tf32", "float32"] | None = Field(
        None, description="Matrix products on a GPU; null = bf16. Weights, sums and a CPU are always float32."
    )
    cuda_graph: bool = Field(
        False, description="On a GPU, replay a step's work as one CUDA graph: pays where a step takes a few ms."
    )
    dead_after: Whole = Field(100_000, ge=1, description="Tokens without selection after which a parent is dead.")
    dead_after_routed: Whole = Field(
        2_000, ge=1, description="Routed tokens without firing after which a child is dead."
    )
    log_every: Whole = Field(10, ge=1, description="Steps between metric lines.")
    checkpoint_every: Whole = Field(200, ge=1, description="Steps between checkpoints.")
    val_every: Whole = Field(200, ge=1, description="Steps between validation passes.")
    val_rows: Whole = Field(16_384, ge=1, description="Validation rows at most.")
    baseline: PhaseStages = Field(default_factory=PhaseStages, description="Stages of arms with random initialisation.")
    teacher: PhaseStages = Field(default_factory=PhaseStages, description="Stages of arms initialised by a teacher.")
    allow_unequal_budget: bool = Field(False, description="Allow arms with different numbers of steps.")


class FlatConfig(Block):
    """What every flat SAE has (docs/method.md section 1)."""

    n_latents: Whole = Field(ge=1, description="P: latents.")
    k: float = Field(gt=0, description="Active latents per row, on average.")
    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    project_gradient: bool = Field(False, description="Remove the gradient along decoder rows before a step.")
    aux_weight: float = Field(0.0, ge=0, description="Weight of the error that dead latents rebuild.")
    aux_k: Whole = Field(32, ge=1, description="Dead latents used per row, at most.")

    @property
    def total_l0(self) -> float:
        """Active latents per row, on average."""
        return self.k

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require("k", self.k, self.k <= self.n_latents, f"at most n_latents = {self.n_latents}")
        return self


class TopKConfig(FlatConfig):
    k: Whole = Field(ge=1, description="Active latents per row.")


class BatchTopKConfig(FlatConfig):
    threshold_decay: float = Field(
        0.99, ge=0, lt=1, description="Memory of the running mean of the smallest kept activation, per batch."
    )


class MatryoshkaConfig(BatchTopKConfig):
    fractions: tuple[float, ...] = Field(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), description="Prefixes that rebuild the row, as shares of the latents."
    )

    @model_validator(mode="after")
    def _nested(self) -> Self:
        rising = all(a < b for a, b in pairwise((0.0, *self.fractions)))
        allowed = "rising shares above 0, the last one 1"
        _require("fractions", list(self.fractions), rising and self.fractions[-1:] == (1.0,), allowed)
        return self


class JumpReLUConfig(FlatConfig):
    bandwidth: float = Field(
        0.1, gt=0, description="Width of the rectangle around a threshold inside which it gets a gradient, units of x."
    )
    l0_weight: float = Field(
        3.0, ge=0, description="Weight of (L0/k - 1)^2, as a multiple of the error of an empty code."
    )
    initial_threshold: float | None = Field(
        None, gt=0, description="Every latent's threshold at the start; null = where the bias sample's L0 is k."
    )


FLAT_KINDS: dict[str, type[FlatConfig]] = {
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "matryoshka": MatryoshkaConfig,
}
MATCHED_BY = {"l0": "k", "params": "n_latents", "flops": "n_latents"}


class ArmConfig(Block):
    name: str = Field(description="Name of the arm.", pattern=FOLDER_NAME)
    kind: Literal["hsae", "topk", "batchtopk", "jumprelu", "matryoshka"] = Field(
        "hsae", description="Hierarchical, or one flat dictionary."
    )
    init: Literal["random", "teacher", "permuted_teacher", "random_teacher"] = Field(
        "random", description="Where the parameters start; anything but random belongs to phase 3."
    )
    stages: Literal["baseline", "teacher"] | None = Field(None, description="Which stages; null = by init.")
    hsae: dict[str, Any] = Field({}, description="Fields of hsae that this arm replaces.")
    teacher: dict[str, Any] = Field({}, description="Fields of teacher that this arm replaces.")
    flat: dict[str, Any] = Field(
        {}, description="Fields of a flat arm's config: n_latents, k, recon_reduction, ...; the rest follow hsae."
    )
    match: dict[Literal["l0", "params", "flops"], str] = Field(
        {}, description="Flat arms: the arm whose measured L0 sizes k, or whose parameters or FLOPs size n_latents."
    )

    @property
    def phase(self) -> int:
        """2 for random initialisation, 3 for a teacher's."""
        return 2 if self.init == "random" else 3


class SteeringConfig(Block):
    target_nats: float = Field(3.0, gt=0, description="Rise of the target's log-odds, nats.")
    contexts: Whole = Field(16, ge=1, description="Contexts that every concept is steered in.")
    context_length: Whole = Field(24, ge=4, description="Tokens per context.")
    max_concepts: Whole = Field(20, ge=1, description="Concepts steered at most, evenly spaced in file order.")


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


DEFAULT_ARMS: list[dict[str, Any]] = [
    {"name": "baseline"},
    {"name": "flat_topk", "kind": "topk", "match": {"l0": "baseline"}},
    {"name": "teacher", "init": "teacher"},
    {"name": "permuted_teacher", "init": "permuted_teacher"},
]


class Config(Block):
    """Everything a run depends on."""

    run: RunConfig = Field(default_factory=RunConfig, description="Name, seed, machine.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The language model and where it is read.")
    corpus: CorpusConfig = Field(default_factory=CorpusConfig, description="The text.")
    concepts: ConceptsConfig = Field(default_factory=ConceptsConfig, description="The ontology and its words.")
    data: DataConfig = Field(default_factory=DataConfig, description="Stored activations.")
    geometry: GeometryConfig = Field(default_factory=GeometryConfig, description="Concept vectors and their metric.")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="Initialisation from the teacher.")
    hsae: HSAEConfig = Field(default_factory=HSAEConfig, description="The H-SAE.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Optimisation and stages.")
    arms: list[ArmConfig] = Field(
        [ArmConfig(**arm) for arm in DEFAULT_ARMS], min_length=1, description="Models trained and compared."
    )
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Trackers.")

    def arm(self, name: str) -> ArmConfig:
        """The arm of that name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    def arm_hsae(self, arm: ArmConfig) -> HSAEConfig:
        """The H-SAE config with this arm's replacements."""
        return _merged(HSAEConfig, self.hsae, arm.hsae, f"arms.{arm.name}.hsae")

    def arm_teacher(self, arm: ArmConfig) -> TeacherConfig:
        """The teacher config with this arm's replacements."""
        return _merged(TeacherConfig, self.teacher, arm.teacher, f"arms.{arm.name}.teacher")

    def arm_flat(self, arm: ArmConfig, k: float | None = None, n_latents: int | None = None) -> FlatConfig:
        """A flat arm's config: its H-SAE's P (1 + C) latents and k + K_c active ones where its own fields are silent.

        k, n_latents: what the matched arm asks for, once it is trained; until then its own k stands for its L0.
        """
        hsae = self.arm_hsae(arm)
        if k is None:
            k = self._codes(self.arm(arm.match["l0"])) if "l0" in arm.match else hsae.total_l0
        sizes = {
            "n_latents": hsae.n_parents * (1 + hsae.n_children_per_parent) if n_latents is None else n_latents,
            "k": max(1, round(k)) if arm.kind == "topk" else k,
        }
        options = {
            "recon_reduction": hsae.recon_reduction,
            "project_gradient": hsae.project_gradient,
            "aux_weight": hsae.aux_weight,
            "aux_k": hsae.aux_k_parent,
        }
        return _validated(FLAT_KINDS[arm.kind], {**sizes, **options, **arm.flat}, f"arms.{arm.name}.flat")

    def _codes(self, arm: ArmConfig) -> float:
        """Active parents and children per row that an arm asks for."""
        return (self.arm_hsae(arm) if arm.kind == "hsae" else self.arm_flat(arm)).total_l0

    def arm_stages(self, arm: ArmConfig) -> list[StageConfig]:
        """The stages that this arm trains through."""
        key = arm.stages or ("baseline" if arm.init == "random" else "teacher")
        return self.training.teacher.stages if key == "teacher" else self.training.baseline.stages

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        names = [arm.name for arm in self.arms]
        _require("arms", names, len(set(names)) == len(names), "names that differ")
        for arm in self.arms:
            hsae, teacher = self.arm_hsae(arm), self.arm_teacher(arm)
            self._check_flat(arm, names[: names.index(arm.name)])
            if arm.init != "random" and teacher.init == "dual":
                for key, seeded in (
                    ("use_tied_decoders_parent", teacher.seed_parent),
                    ("use_tied_decoders_child", teacher.seed_child),
                    ("tie_projectors", teacher.seed_projectors),
                ):
                    tied = seeded and getattr(hsae, key) is True
                    _require(f"hsae.{key}", "true", not tied, "false or init: the dual teacher reads and writes apart")
            for stage in self.arm_stages(arm):
                weights = stage.loss.apply(hsae)
                held = {"Up", "G", "D"} <= set(stage.freeze)
                if weights.causal_ortho_lambda > 0:
                    _require(
                        "hsae.causal_ortho_lambda",
                        hsae.causal_ortho_lambda,
                        hsae.causal_ortho_lambda > 0,
                        f"above 0, because stage {stage.name} turns it on",
                    )
                    _require(
                        f"stage {stage.name}: freeze",
                        stage.freeze,
                        not held,
                        "a list without Up, D or G: causal_ortho_lambda needs a gradient",
                    )
        budgets = {arm.name: sum(stage.steps for stage in self.arm_stages(arm)) for arm in self.arms}
        if not self.training.allow_unequal_budget:
            _require(
                "training stages",
                f"steps {budgets}",
                len(set(budgets.values())) <= 1,
                "the same number of steps for every arm, or training.allow_unequal_budget: true",
            )
        return self

    def _check_flat(self, arm: ArmConfig, earlier: list[str]) -> None:
        """What only flat arms may have, and what they may not."""
        where = f"arms.{arm.name}"
        if arm.kind == "hsae":
            _require(f"{where}.flat", arm.flat, not arm.flat, "nothing unless kind is flat: topk, batchtopk, ...")
            _require(f"{where}.match", arm.match, not arm.match, "nothing unless kind is flat: topk, batchtopk, ...")
            return
        _require(f"{where}.init", arm.init, arm.init == "random", "random for a flat arm")
        both = {"params", "flops"} <= set(arm.match)
        _require(f"{where}.match", "params and flops", not both, "one of them: both set n_latents")
        one = len(set(arm.match.values())) <= 1
        _require(f"{where}.match", arm.match, one, "one arm for all quantities")
        for quantity, other in arm.match.items():
            field = f"{where}.match.{quantity}"
            _require(field, other, other in earlier, "an earlier arm")
            random = self.arm(other).phase == 2
            _require(field, other, random, "an arm with init random, which is trained before")
            size = MATCHED_BY[quantity]
            _require(f"{where}.flat.{size}", arm.flat.get(size), size not in arm.flat, f"nothing: {quantity} sets it")
        self.arm_flat(arm)


def _merged(block: type[BlockT], base: BlockT, overrides: dict[str, Any], where: str) -> BlockT:
    return _validated(block, {**base.model_dump(), **overrides}, where)


def _validated(block: type[BlockT], fields: dict[str, Any], where: str) -> BlockT:
    try:
        return block.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}.{first_line(error, block)}") from error


def _keys_beside(block: type[Block], location: tuple[int | str, ...]) -> list[str]:
    """The fields of the block that holds the last part of `location`, a path into `block`."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = block.model_fields[part].annotation
            inner = (annotation, *get_args(annotation))
            block = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, Block))
    return list(block.model_fields)


def first_line(error: ValidationError, block: type[Block]) -> str:
    """One line for the first problem of a pydantic error about `block`: field, found, allowed."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return misfit(error)
    return f"{place(problem)}: found an unknown key, allowed: {', '.join(_keys_beside(block, problem['loc']))}"


def find_config(name_or_path: str) -> Path:
    """Path of a packaged config by name, or of a YAML file. Raises ConfigError naming the packaged ones."""
    packaged = PACKAGE / "configs" / f"{name_or_path}.yaml"
    for path in (Path(name_or_path), packaged):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml")))
    raise ConfigError(f"config: found {name_or_path!r}, allowed: a YAML file or one of {names}")


def load_config(name_or_path: str, overrides: list[str] | None = None) -> Config:
    """Read, override and validate a config.

    Args:
        name_or_path: packaged name ("quickstart") or path of a YAML file.
        overrides: "key.path=value" strings; values are read as YAML; list items by number (arms.0.name=x).

    Raises:
        ConfigError: one line naming the field, what was found and what is allowed.
    """
    path = find_config(name_or_path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"found {path.stat().st_size} bytes, allowed: {MAX_BYTES}")
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    tree = {} if tree is None else tree  # an empty file
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, allowed: a mapping of config blocks")
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_line(error, Config)) from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one "key.path=value" into a tree. Raises ConfigError when it is none, or its place is not there."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set: found {shown(override)}, allowed: key.path=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {cut(key)}: found {shown(text)}, allowed: a YAML value ({error})") from error
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        _check_step(node, part, key)
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    _check_step(node, last, key)
    node[int(last) if isinstance(node, list) else last] = value


def _check_step(node: Any, part: str, key: str) -> None:
    """Raise ConfigError when `part` of an override's key cannot be an item of `node`."""
    if isinstance(node, list) and part not in map(str, range(len(node))):
        raise ConfigError(f"--set {cut(key)}: found item {shown(part)}, allowed: 0 to {len(node) - 1}")
    if not isinstance(node, dict | list):
        raise ConfigError(f"--set {cut(key)}: found a value above {shown(part)}, allowed: a block")


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML, every field present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
