"""The hierarchical SAE's own options, part by part (docs/method.md sections 1, 2 and 6)."""

from itertools import pairwise
from math import ceil
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from .block import LAST_WITH, Block, Tie, Whole, require


class RouterOptions(Block):
    """Router: which parents a row meets, and with what codes."""

    n_parents: Whole = Field(1024, ge=1, description="P: parents (experts).")
    gate: Literal["hard", "straight_through"] = Field("hard", description="Gradient of the choice.")
    magnitude: Literal["relu", "binary", "leaky_offset"] = Field(
        "relu",
        description="Size of a code: relu; binary = the gate alone; leaky_offset = the published JAX form's, the logit "
        "from 1/sqrt(d) up, below that 0 for a parent and a hundredth of it for a child, with its L1 over all codes.",
    )
    router_noise: Literal["relative", "absolute"] = Field(
        "relative", description="Gumbel noise scaled by the row's logit deviation, or as it is."
    )
    router_temp_start: float = Field(1.5, gt=0, description="Routing temperature at the first step.")
    router_temp_end: float = Field(0.7, gt=0, description="Routing temperature that the last step approaches.")
    use_tied_decoders_parent: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")


class ChildrenOptions(Block):
    """Children: what they read and write."""

    n_children_per_parent: Whole = Field(7, ge=1, description="C: children per parent.")
    children: Literal["direct", "factored"] = Field(
        "direct", description="A child reads and writes with rows of width d, or within a subspace of its parent."
    )
    subspace_dim: Whole = Field(16, ge=1, description="s: width of a parent's subspace, of factored children.")
    child_input: Literal["input", "residual"] = Field(
        "residual", description="What children read: the row, or what the parents leave of it."
    )
    use_tied_decoders_child: Tie = Field(True, description="false, true (one tensor), init (equal at the start).")
    tie_projectors: Tie = Field("init", description="false, true (one tensor), init (equal at the start).")


class SparsityOptions(Block):
    """Sparsity: how many codes a row has."""

    topk_parent: Whole = Field(28, ge=1, description="k: active parents per row; a batch's mean where rows share them.")
    topk_child: Whole = Field(1, ge=1, description="k_c: active children per active parent.")
    topk_child_total: Whole | None = Field(
        4,
        ge=1,
        description="K_c: children of a row under child_budget shared, on average under batch; null = k * k_c.",
    )
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


class BalanceOptions(Block):
    """Balance: selection biases, which are added for the choice only, against firing rates."""

    balance_rate: float = Field(
        0.01, ge=0, description="Move of a selection bias per step, units of r; 0 = none, and no limits."
    )
    rate_cap: float | None = Field(
        0.13,
        gt=0,
        le=1,
        description="Largest firing rate: share of rows above which a parent's bias falls, from 0 down; null = none.",
    )
    rate_cap_spread: float = Field(
        1.3,
        ge=1,
        description="Times the mean firing rate that the largest one is at least, where rate_cap is below that. More "
        "rebuilds more where the mean rate is high.",
    )
    rate_floor: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Smallest firing rate: share of the mean rate of parents (children) below which the bias of a "
        "parent (a child) rises, from 0 up to the mean code, and after that the encoder's bias.",
    )


class StartOptions(Block):
    """Start: random parameters, and which of them there are."""

    initial: Literal["unit", "he_uniform"] = Field(
        "unit", description="Random start: unit rows and orthonormal subspaces, or He-uniform with D left unnormalised."
    )
    use_encoder_bias: bool = Field(True, description="Learn b_E and b_F, started at 0.")
    use_decoder_bias: bool = Field(True, description="Learn b_dec, started at the geometric median.")


class NormOptions(Block):
    """Norms of decoder rows."""

    normalize_decoder: bool = Field(True, description="Keep decoder rows and atoms at unit norm.")
    normalize_child: Literal["atom", "decoder"] = Field("atom", description="What has unit norm: the atom or G's row.")
    norm_metric: Literal["euclidean", "causal"] = Field("euclidean", description="Norm of the constraint.")
    project_gradient: bool = Field(False, description="Remove the gradient along constrained rows before a step.")


class LossOptions(Block):
    """Losses."""

    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    top_level_beta: float = Field(0.1, ge=0, description="Weight of the parents-only reconstruction.")
    parent_prefixes: tuple[float, ...] = Field(
        (),
        description="The first parents that rebuild the row by themselves, as shares of P; each like top_level_beta.",
    )
    l1_parent: float = Field(0.0, ge=0, description="Weight of the parents' L1.")
    l1_child: float = Field(0.0, ge=0, description="Weight of the children's L1.")
    biorth_lambda: float = Field(0.0, ge=0, description="Weight of bi-orthogonality.")
    use_offdiag_biorth: Literal[False, True, "jax"] = Field(
        False,
        description="false: |E D^T - I|^2; true: unit rows, off-diagonal entries only; jax: as in the published code.",
    )
    gram_lambda: float = Field(0.0, ge=0, description="Weight of the overlap of decoder rows with each other.")
    causal_ortho_lambda: float = Field(0.0, ge=0, description="Weight of parent-child causal orthogonality.")
    causal_orth_form: Literal["atom", "literal"] = Field("atom", description="Atom itself, or atom minus parent.")


PARTS = (RouterOptions, ChildrenOptions, SparsityOptions, BalanceOptions, StartOptions, NormOptions, LossOptions)


def _name_parts(schema: dict[str, Any]) -> None:
    """Write beside every field of a JSON schema which part it belongs to."""
    for part in PARTS:
        for name in part.model_fields:
            schema["properties"][name]["part"] = (part.__doc__ or "").partition(":")[0].rstrip(".")


class HSAEConfig(  # pydantic lists the fields of the last base first
    LossOptions, NormOptions, StartOptions, BalanceOptions, SparsityOptions, ChildrenOptions, RouterOptions
):
    """Shape and losses of an H-SAE. Defaults: the form `recommended` of studies/win."""

    model_config = ConfigDict(json_schema_extra=_name_parts)
    renamed: ClassVar[dict[str, str]] = {
        "router_balance_rate": "balance_rate",
        "router_load_max": "rate_cap",
        "router_load_spread": "rate_cap_spread",
        "load_min": "rate_floor",
        "child_encoder": "children",
        "child_decoder": "children",
    }
    deleted: ClassVar[dict[str, Any]] = {
        **{"recycle_every": 0, "recycle_until": None, "split_above": None},
        **{"k_anneal_steps": 0, "topk_parent_start": None, "active_children_start": None},
        **{"child_input_detach": False, "initial_router": "random", "initial_children": "random"},
        **{"aux_weight": 0.0, "aux_k_parent": 32, "aux_k_child": 8, "threshold_decay": 0.99},
    }

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
            balance_rate=0,
            magnitude="leaky_offset",
            child_input="input",
            parent_budget="per_row",
            child_budget="per_parent",
            children="factored",
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
    def parent_slots(self) -> int:
        """Parents that a row may have."""
        spare = 1.0 if self.parent_budget == "per_row" else self.budget_slots
        return min(self.n_parents, ceil(spare * self.topk_parent))

    @property
    def child_slots(self) -> int:
        """Children that a row may have."""
        spare = self.budget_slots if self.child_budget == "batch" else 1.0
        return min(self.parent_slots * self.n_children_per_parent, ceil(spare * self.active_children))

    @classmethod
    def modern(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """As `Block.modern`; a balance rate of 0 switches the limits off."""
        both = {fields[key] for key in ("child_encoder", "child_decoder") if key in fields}
        require("child_encoder, child_decoder", sorted(both), len(both) < 2, f"one for both; {LAST_WITH}")
        scope = fields.get("l1_scope")
        if scope is not None and (fields.get("l1_parent") or fields.get("l1_child")):
            usual = "all" if fields.get("magnitude") == "leaky_offset" else "selected"
            require("l1_scope", scope, scope == usual, f"{usual}; {LAST_WITH}")
        fields = super().modern({key: value for key, value in fields.items() if key != "l1_scope"})
        return {"rate_cap": None, "rate_floor": 0.0, **fields} if fields.get("balance_rate") == 0 else fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        k, C, P = self.topk_parent, self.n_children_per_parent, self.n_parents
        require("topk_parent", k, k <= P, f"at most n_parents = {P}")
        require("topk_child", self.topk_child, self.topk_child <= C, f"at most n_children_per_parent = {C}")
        if self.topk_child_total is not None:
            found, own = self.topk_child_total, self.child_budget != "per_parent"
            require("topk_child_total", found, own, "null unless child_budget is shared or batch")
            require("topk_child_total", found, found <= k * C, f"at most k * C = {k * C}")
        prefixes = list(self.parent_prefixes)
        rising = all(a < b for a, b in pairwise((0.0, *prefixes, 1.0)))
        require("parent_prefixes", prefixes, rising, "rising shares above 0 and below 1")
        tied = self.children == "factored" or self.tie_projectors is not True
        require("tie_projectors", "true", tied, "false or init unless children is factored")
        for field, others in (("parent_budget", "per_row"), ("child_budget", "per_parent or shared")):
            found = getattr(self, field)
            relu = found not in ("batch", "joint") or self.magnitude == "relu"
            require(field, found, relu, f"{others} unless magnitude is relu")
        hard = self.parent_budget == "per_row" or self.gate == "hard"
        require("parent_budget", self.parent_budget, hard, "per_row unless gate is hard")
        hard = self.magnitude != "leaky_offset" or self.gate == "hard"
        require("gate", self.gate, hard, "hard under magnitude leaky_offset")
        both = self.parent_budget != "joint" or self.child_budget == "batch"
        require("parent_budget", "joint", both, "per_row or batch unless child_budget is batch")
        for field, off in (("rate_cap", None), ("rate_floor", 0)):
            found = getattr(self, field)
            allowed = f"{'null' if off is None else off} unless balance_rate is above 0"
            require(field, found, found == off or self.balance_rate > 0, allowed)
        limited = self.rate_cap is not None or self.rate_floor > 0
        require(
            "balance_rate", self.balance_rate, limited or self.balance_rate == 0, "0 without rate_cap or rate_floor"
        )
        usual = self.rate_cap_spread == type(self).model_fields["rate_cap_spread"].default
        require("rate_cap_spread", self.rate_cap_spread, usual or self.rate_cap is not None, "1.3 without rate_cap")
        return self
