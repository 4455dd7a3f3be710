"""The hierarchical SAE's own options (docs/method.md sections 1, 2 and 6)."""

from itertools import pairwise
from math import ceil
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .block import LAST_WITH, Block, Tie, Whole, require


class HSAEConfig(Block):
    """Shape and losses of an H-SAE. Defaults: the form `recommended` of studies/win."""

    # Router
    n_parents: Whole = Field(1024, ge=1, description="P: number of parents.")
    gate: Literal["hard", "straight_through"] = Field(
        "hard",
        description="hard = no gradient through the choice of parents; straight_through = that of a softmax over the "
        "logits, with Gumbel noise in training.",
    )
    magnitude: Literal["relu", "binary", "leaky_offset"] = Field(
        "relu",
        description="Size of a code. relu; binary = 1 where on; leaky_offset = the published JAX code's: the logit "
        "from 1/sqrt(d) up, below that 0 (parents) or 0.01 of it (children), and L1 over all codes.",
    )
    router_noise: Literal["relative", "absolute"] = Field(
        "relative",
        description="Gumbel noise of the straight-through gate. relative = times the standard deviation of the row's "
        "logits; absolute = as drawn.",
    )
    router_temp_start: float = Field(1.5, gt=0, description="Straight-through temperature at the first step.")
    router_temp_end: float = Field(0.7, gt=0, description="Straight-through temperature at the end.")
    use_tied_decoders_parent: Tie = Field(
        "init", description="E and D: tied (true), equal at initialisation (init), or not (false)."
    )

    # Children
    n_children_per_parent: Whole = Field(7, ge=1, description="C: children per parent.")
    children: Literal["direct", "factored"] = Field(
        "direct",
        description="direct = a child's encoder and decoder rows have width d; factored = they lie in a subspace of "
        "its parent.",
    )
    subspace_dim: Whole = Field(16, ge=1, description="s: dimension of a parent's subspace; used by factored children.")
    child_input: Literal["input", "residual"] = Field(
        "residual", description="What children encode. input = the row; residual = the row minus what parents rebuild."
    )
    use_tied_decoders_child: Tie = Field(
        True, description="F and G: tied (true), equal at initialisation (init), or not (false)."
    )
    tie_projectors: Tie = Field("init", description="Down and Up, likewise; for factored children.")

    # Sparsity
    topk_parent: Whole = Field(28, ge=1, description="k: active parents per row; on average under batch and joint.")
    topk_child: Whole = Field(1, ge=1, description="k_c: active children per active parent.")
    topk_child_total: Whole | None = Field(
        4, ge=1, description="K_c: active children per row (child_budget batch: on average); null = k * k_c."
    )
    parent_budget: Literal["per_row", "batch", "joint"] = Field(
        "joint",
        description="Active parents. per_row = k in each row; batch = B k in a batch of B rows; joint = B (k + K_c) "
        "parents and children in a batch, chosen with one threshold for both.",
    )
    child_budget: Literal["per_parent", "shared", "batch"] = Field(
        "batch",
        description="Active children. per_parent = k_c for each active parent; shared = K_c in each row; batch = B K_c "
        "in a batch of B rows.",
    )
    budget_slots: float = Field(
        2.0,
        ge=1,
        description="Maximum active parents (children) of one row under a batch budget, as a multiple of k (K_c).",
    )

    # Balance: selection biases, which are added for the choice of latents only, against uneven firing rates
    balance_rate: float = Field(
        0.01, ge=0, description="Step size of the selection biases, in units of the logits; 0 = no cap and no floor."
    )
    rate_cap: float | None = Field(
        0.13,
        gt=0,
        le=1,
        description="Firing rate (share of rows) above which a parent's selection bias falls below 0; null = none.",
    )
    rate_cap_spread: float = Field(
        1.3,
        ge=1,
        description="The cap is at least this multiple of the mean firing rate. Raising it helps reconstruction.",
    )
    rate_floor: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the mean firing rate of parents (children) below which a latent's selection bias rises, "
        "from 0 up to the mean code; then its encoder bias does. 0 = none.",
    )

    # Initialisation
    initial: Literal["unit", "he_uniform"] = Field(
        "unit",
        description="unit = unit-norm rows and orthonormal subspaces; he_uniform = He-uniform, D not normalised.",
    )
    use_encoder_bias: bool = Field(True, description="Learn b_E and b_F, which start at 0.")
    use_decoder_bias: bool = Field(True, description="Learn b_dec, which starts at the geometric median of the rows.")

    # Norms of decoder rows
    normalize_decoder: bool = Field(True, description="Keep decoder rows and atoms at unit norm.")
    normalize_child: Literal["atom", "decoder"] = Field(
        "atom", description="What has unit norm: the atom (width d) or G's row."
    )
    norm_metric: Literal["euclidean", "causal"] = Field("euclidean", description="Metric of the unit norms.")
    project_gradient: bool = Field(False, description="Remove the gradient along unit decoder rows before each step.")

    # Losses
    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    top_level_beta: float = Field(0.1, ge=0, description="Weight of the reconstruction from parents alone.")
    parent_prefixes: tuple[float, ...] = Field(
        (),
        description="Rising shares of P. The first parents up to each also rebuild the row alone, with top_level_beta.",
    )
    l1_parent: float = Field(0.0, ge=0, description="Weight of the L1 of parents' codes.")
    l1_child: float = Field(0.0, ge=0, description="Weight of the L1 of children's codes.")
    biorth_lambda: float = Field(0.0, ge=0, description="Weight of the bi-orthogonality of encoder and decoder.")
    use_offdiag_biorth: Literal[False, True, "jax"] = Field(
        False,
        description="Form of bi-orthogonality. false = |E D^T - I|^2; true = off-diagonal entries of unit rows; jax = "
        "as in the published code.",
    )
    gram_lambda: float = Field(0.0, ge=0, description="Weight of the overlap of decoder rows with each other.")
    causal_ortho_lambda: float = Field(0.0, ge=0, description="Weight of causal orthogonality of children to parents.")
    causal_orth_form: Literal["atom", "literal"] = Field(
        "atom", description="What is orthogonal: the atom, or atom minus parent."
    )

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
        k, C, P, total = self.topk_parent, self.n_children_per_parent, self.n_parents, self.topk_child_total
        relu, hard, balanced = self.magnitude == "relu", self.gate == "hard", self.balance_rate > 0
        rising = all(a < b for a, b in pairwise((0.0, *self.parent_prefixes, 1.0)))
        limited = self.rate_cap is not None or self.rate_floor > 0
        usual = self.rate_cap_spread == type(self).model_fields["rate_cap_spread"].default
        rules = (  # field, what has to hold, what is allowed where it does not
            ("topk_parent", k <= P, f"at most n_parents = {P}"),
            ("topk_child", self.topk_child <= C, f"at most n_children_per_parent = {C}"),
            (
                "topk_child_total",
                total is None or self.child_budget != "per_parent",
                "null unless child_budget is shared or batch",
            ),
            ("topk_child_total", total is None or total <= k * C, f"at most k * C = {k * C}"),
            ("parent_prefixes", rising, "rising shares above 0 and below 1"),
            (
                "tie_projectors",
                self.children == "factored" or self.tie_projectors is not True,
                "false or init unless children is factored",
            ),
            ("parent_budget", self.parent_budget == "per_row" or relu, "per_row unless magnitude is relu"),
            ("child_budget", self.child_budget != "batch" or relu, "per_parent or shared unless magnitude is relu"),
            ("parent_budget", self.parent_budget == "per_row" or hard, "per_row unless gate is hard"),
            ("gate", self.magnitude != "leaky_offset" or hard, "hard under magnitude leaky_offset"),
            (
                "parent_budget",
                self.parent_budget != "joint" or self.child_budget == "batch",
                "per_row or batch unless child_budget is batch",
            ),
            ("rate_cap", self.rate_cap is None or balanced, "null unless balance_rate is above 0"),
            ("rate_floor", self.rate_floor == 0 or balanced, "0 unless balance_rate is above 0"),
            ("balance_rate", limited or not balanced, "0 without rate_cap or rate_floor"),
            ("rate_cap_spread", usual or self.rate_cap is not None, "1.3 without rate_cap"),
        )
        for field, holds, allowed in rules:
            found = getattr(self, field)
            shown = "true" if found is True else list(found) if isinstance(found, tuple) else found
            require(field, shown, holds, allowed)
        return self
