"""A whole run: every block, and the arms that are compared."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..parsing import did_you_mean
from .block import FOLDER_NAME, Block, BlockT, Whole, first_line, require
from .evaluation import EvalConfig, TrackingConfig
from .flat import FLAT_KINDS, FlatConfig
from .hsae import HSAEConfig
from .sources import ConceptsConfig, CorpusConfig, DataConfig, GeometryConfig, ModelConfig, RunConfig
from .training import StageConfig, TeacherConfig, TrainingConfig

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
    seed: Whole | None = Field(
        None, ge=0, description="Seed of the start, the order of rows and the control teacher; null = run.seed."
    )
    lr: float | None = Field(None, gt=0, description="Learning rate; null = training.lr.")
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

    def arm_seed(self, arm: ArmConfig) -> int:
        """The seed of an arm's training; splits, folds and evidence have run.seed."""
        return self.run.seed if arm.seed is None else arm.seed

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
        options = {"recon_reduction": hsae.recon_reduction, "project_gradient": hsae.project_gradient}
        return _validated(FLAT_KINDS[arm.kind], {**sizes, **options, **arm.flat}, f"arms.{arm.name}.flat")

    def _codes(self, arm: ArmConfig) -> float:
        """Active parents and children per row that an arm asks for."""
        return (self.arm_hsae(arm) if arm.kind == "hsae" else self.arm_flat(arm)).total_l0

    def arm_training(self, arm: ArmConfig) -> TrainingConfig:
        """The training config with this arm's learning rate."""
        return self.training if arm.lr is None else self.training.model_copy(update={"lr": arm.lr})

    def arm_stages(self, arm: ArmConfig) -> list[StageConfig]:
        """The stages that this arm trains through."""
        key = arm.stages or ("baseline" if arm.init == "random" else "teacher")
        return self.training.teacher.stages if key == "teacher" else self.training.baseline.stages

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        names = [arm.name for arm in self.arms]
        require("arms", names, len(set(names)) == len(names), "names that differ")
        for arm in self.arms:
            hsae, teacher = self.arm_hsae(arm), self.arm_teacher(arm)
            self._check_flat(arm, names[: names.index(arm.name)])
            if arm.init != "random" and teacher.threshold is not None:
                where = f"arms.{arm.name}.teacher.threshold"
                require(where, teacher.threshold, hsae.use_encoder_bias, "null unless hsae.use_encoder_bias is true")
            if arm.init != "random" and teacher.init == "dual":
                for key, seeded in (
                    ("use_tied_decoders_parent", teacher.seed_parent),
                    ("use_tied_decoders_child", teacher.seed_child),
                    ("tie_projectors", teacher.seed_projectors),
                ):
                    tied = seeded and getattr(hsae, key) is True
                    require(f"hsae.{key}", "true", not tied, "false or init: the dual teacher reads and writes apart")
            for stage in self.arm_stages(arm):
                weights = stage.loss.apply(hsae)
                held = {"Up", "G", "D"} <= set(stage.freeze)
                if weights.causal_ortho_lambda > 0:
                    require(
                        "hsae.causal_ortho_lambda",
                        hsae.causal_ortho_lambda,
                        hsae.causal_ortho_lambda > 0,
                        f"above 0, because stage {stage.name} turns it on",
                    )
                    require(
                        f"stage {stage.name}: freeze",
                        stage.freeze,
                        not held,
                        "a list without Up, D or G: causal_ortho_lambda needs a gradient",
                    )
        budgets = {arm.name: sum(stage.steps for stage in self.arm_stages(arm)) for arm in self.arms}
        if not self.training.allow_unequal_budget:
            require(
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
            require(f"{where}.flat", arm.flat, not arm.flat, "nothing unless kind is flat: topk, batchtopk, ...")
            require(f"{where}.match", arm.match, not arm.match, "nothing unless kind is flat: topk, batchtopk, ...")
            return
        require(f"{where}.init", arm.init, arm.init == "random", "random for a flat arm")
        both = {"params", "flops"} <= set(arm.match)
        require(f"{where}.match", "params and flops", not both, "one of them: both set n_latents")
        one = len(set(arm.match.values())) <= 1
        require(f"{where}.match", arm.match, one, "one arm for all quantities")
        for quantity, other in arm.match.items():
            field = f"{where}.match.{quantity}"
            require(field, other, other in earlier, f"an earlier arm{did_you_mean(other, earlier)}")
            random = self.arm(other).phase == 2
            require(field, other, random, "an arm with init random, which is trained before")
            size = MATCHED_BY[quantity]
            require(f"{where}.flat.{size}", arm.flat.get(size), size not in arm.flat, f"nothing: {quantity} sets it")
        self.arm_flat(arm)


def _merged(block: type[BlockT], base: BlockT, overrides: dict[str, Any], where: str) -> BlockT:
    return _validated(block, {**base.model_dump(), **overrides}, where)


def _validated(block: type[BlockT], fields: dict[str, Any], where: str) -> BlockT:
    try:
        return block.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}.{first_line(error, block)}") from error
