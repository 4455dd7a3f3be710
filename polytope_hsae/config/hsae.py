"""The hierarchical SAE's own options (docs/method.md sections 1, 2 and 6)."""

from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .block import Block, Tie, Whole, require


class HSAEConfig(Block):
    """Shape and losses of an H-SAE (docs/method.md sections 1 and 2). Defaults: `recommended` of `studies/win`."""

    n_parents: Whole = Field(1024, ge=1, description="P: parents (experts).")
    topk_parent: Whole = Field(28, ge=1, description="k: active parents per row; a batch's mean where rows share them.")
    n_children_per_parent: Whole = Field(7, ge=1, description="C: children per parent.")
    topk_child: Whole = Field(1, ge=1, description="k_c: active children per active parent.")
    topk_child_total: Whole | None = Field(
        4,
        ge=1,
        description="K_c: children of a row under child_budget shared, on average under batch; null = k * k_c.",
    )
    subspace_dim: Whole = Field(16, ge=1, description="s: width of a parent's subspace.")
    gate: Literal["hard", "straight_through"] = Field("hard", description="Gradient of the choice.")
    magnitude: Literal["relu", "binary", "leaky_offset"] = Field(
        "relu",
        description="Size of a code: relu; binary = the gate alone; leaky_offset = the logit from 1/sqrt(d) up, "
        "below that 0 for a parent and a hundredth of it for a child.",
    )
    router_noise: Literal["relative", "absolute"] = Field(
        "relative", description="Gumbel noise scaled by the row's logit deviation, or as it is."
    )
    router_balance_rate: float = Field(
        0.01,
        ge=0,
        description="Move of the biases of the choice against the loads, per batch, units of r; 0 = none, and no "
        "limits. With neither router_load_max nor load_min all parents move towards the mean load.",
    )
    router_load_max: float | None = Field(
        0.13,
        gt=0,
        le=1,
        description="Largest load: share of rows above which a parent's bias falls, from 0 down; null = none.",
    )
    router_load_spread: float = Field(
        1.3,
        ge=1,
        description="Times the mean load that the largest load is at least, where router_load_max is below that. More "
        "rebuilds more where the mean load is high.",
    )
    load_min: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Smallest load: share of the mean load of parents (children) below which the bias of a parent (a "
        "child) rises, from 0 up to the mean code, and after that the encoder's bias.",
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
        "joint",
        description="k parents for each row; B k for a batch of B rows; or B (k + K_c) for parents and children, which "
        "share them so that the smallest code of both is the same.",
    )
    child_budget: Literal["per_parent", "shared", "batch"] = Field(
        "batch", description="k_c children for each active parent, K_c for all of a row's, or B K_c for a batch."
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
        "direct", description="Children read through Down_p and F_p of rank s, or each has a row of width d for F."
    )
    child_decoder: Literal["factored", "direct"] = Field(
        "direct", description="Atoms are Up_p^T G_pj of rank s, or each is a row of width d of G."
    )
    use_tied_decoders_parent: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")
    use_tied_decoders_child: Tie = Field(True, description="false, true (one tensor), init (equal at the start).")
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
    parent_prefixes: tuple[float, ...] = Field(
        (),
        description="The first parents that rebuild the row by themselves, as shares of P; each like top_level_beta.",
    )
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
            topk_child_total=None,
            subspace_dim=subspace_dim,
            gate="hard",
            router_balance_rate=0,
            magnitude="leaky_offset",
            child_input="input",
            parent_budget="per_row",
            child_budget="per_parent",
            child_encoder="factored",
            child_decoder="factored",
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
        """K_c: active children per row, on average where rows share them."""
        return self.topk_child_total or self.topk_parent * self.topk_child

    @property
    def total_l0(self) -> int:
        """Active parents and children per row, on average where rows share them."""
        return self.topk_parent + self.active_children

    @property
    def has_load_limits(self) -> bool:
        """Whether a largest or a smallest load is kept, and not the mean load."""
        return self.router_load_max is not None or self.load_min > 0

    def _check_annealing(self) -> None:
        k, K = self.topk_parent_start, self.active_children_start
        started = k is not None or K is not None
        require(
            "k_anneal_steps",
            self.k_anneal_steps,
            started == (self.k_anneal_steps > 0),
            "above 0 with topk_parent_start or active_children_start, 0 without",
        )
        if k is not None:
            require("topk_parent_start", k, k <= self.n_parents, f"at most n_parents = {self.n_parents}")
            require("topk_parent_start", k, self.gate == "hard", "null unless gate is hard")
        if K is not None:
            limit = self.topk_parent * self.n_children_per_parent
            require("active_children_start", K, limit >= K, f"at most k * C = {limit}")
            shared = self.child_budget != "per_parent"
            require("active_children_start", K, shared, "null unless child_budget is shared or batch")

    @model_validator(mode="before")
    @classmethod
    def _no_limits_without_a_rate(cls, fields: Any) -> Any:
        """A rate of 0 switches the limits of the load off; who sets them as well is told (`_consistent`)."""
        if isinstance(fields, dict) and fields.get("router_balance_rate") == 0:
            return {"router_load_max": None, "load_min": 0.0, **fields}
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> "HSAEConfig":
        require(
            "topk_parent", self.topk_parent, self.topk_parent <= self.n_parents, f"at most n_parents = {self.n_parents}"
        )
        C = self.n_children_per_parent
        require("topk_child", self.topk_child, self.topk_child <= C, f"at most n_children_per_parent = {C}")
        if self.topk_child_total is not None:
            require(
                "topk_child_total",
                self.topk_child_total,
                self.child_budget != "per_parent",
                "null unless child_budget is shared or batch",
            )
            limit = self.topk_parent * C
            require(
                "topk_child_total", self.topk_child_total, self.topk_child_total <= limit, f"at most k * C = {limit}"
            )
        prefixes = list(self.parent_prefixes)
        rising = all(a < b for a, b in pairwise((0.0, *prefixes, 1.0)))
        require("parent_prefixes", prefixes, rising, "rising shares above 0 and below 1")
        direct_F, direct_G = self.child_encoder == "direct", self.child_decoder == "direct"
        require("child_decoder", "direct", direct_F or not direct_G, "factored unless child_encoder is direct")
        tied = direct_F == direct_G or self.use_tied_decoders_child is not True
        require("use_tied_decoders_child", "true", tied, "false or init unless child_encoder and child_decoder agree")
        tied = not direct_F or self.tie_projectors is not True
        require("tie_projectors", "true", tied, "false or init unless child_encoder is factored")
        for field, others in (("parent_budget", "per_row"), ("child_budget", "per_parent or shared")):
            found = getattr(self, field)
            relu = found not in ("batch", "joint") or self.magnitude == "relu"
            require(field, found, relu, f"{others} unless magnitude is relu")
        hard = self.parent_budget == "per_row" or self.gate == "hard"
        require("parent_budget", self.parent_budget, hard, "per_row unless gate is hard")
        both = self.parent_budget != "joint" or self.child_budget == "batch"
        require("parent_budget", "joint", both, "per_row or batch unless child_budget is batch")
        for field, off in (("router_load_max", None), ("load_min", 0)):
            found = getattr(self, field)
            allowed = f"{'null' if off is None else off} unless router_balance_rate is above 0"
            require(field, found, found == off or self.router_balance_rate > 0, allowed)
        spread = self.router_load_spread
        unused = spread == type(self).model_fields["router_load_spread"].default
        require(
            "router_load_spread",
            spread,
            unused or self.router_load_max is not None,
            "1.3 unless router_load_max is set",
        )
        require(
            "router_balance_rate",
            self.router_balance_rate,
            self.parent_budget == "per_row" or self.router_balance_rate == 0 or self.has_load_limits,
            "0 unless parent_budget is per_row, or router_load_max or load_min is set",
        )
        for field in ("recycle_until", "split_above"):
            found = getattr(self, field)
            require(field, found, found is None or self.recycle_every > 0, "null unless recycle_every is above 0")
        self._check_annealing()
        return self
