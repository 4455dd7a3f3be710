"""The hierarchical sparse autoencoder (docs/method.md sections 1 and 4).

One activation's way: x -> router logits E x' -> k parents -> their codes a -> what the parents leave of x -> each
routed parent's subspace Down_p -> its children F_p -> the largest child codes c ->
x_hat = b_dec + sum a D_p + sum c Up_p^T G_pj.

Shapes: B rows, d residual width, P parents, k active parents, C children per parent, K active children per row,
s subspace width, Q teacher parents.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..config import HSAEConfig, LossOverrides
from ..ops.magnitude import parent_code
from .base import UNIT_ROW_EPS
from .budget import Budget, calibrate
from .codes import Codes, Dead, ModelOutput, load
from .constraints import geometric_median
from .losses import causal_orthogonality, loss_terms, reconstruction_error
from .norms import ConstrainedDecoders
from .routing import balanced_scores, move_balance_, routing_noise, straight_through_gate, topk_lowest
from .start import ChildInit, RandomStart, SquareRoots, put_teacher, start_from_rows, tied

SHARE_STEP = 1e-3  # by which a batch moves the parents' share of a joint budget


class HierarchicalSAE(ConstrainedDecoders):
    """A router over P parents, each of which opens a sub-SAE of C children in an s-dimensional subspace.

    Args:
        config: shape and options.
        width: d of the activations.
        normalize: rms, unit_row or none.
        seed: of the random initialisation.

    Raises ValueError when the subspace is wider than d.
    """

    config_block = HSAEConfig
    tensor_names = ("E", "b_E", "D", "Down", "Up", "F", "b_F", "G", "b_dec")
    transient_names: ClassVar[tuple[str, ...]] = ("gram_reference",)
    threshold: Tensor | None
    balance: Tensor | None
    child_balance: Tensor | None
    parent_share: Tensor | None

    def __init__(self, config: HSAEConfig, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize)
        P, C, s = config.n_parents, config.n_children_per_parent, config.subspace_dim
        factored_F, factored_G = config.child_encoder == "factored", config.child_decoder == "factored"
        if factored_G and s > width:
            raise ValueError(f"hsae.subspace_dim: found {s}, allowed: at most the residual width {width}")
        self.n_parents, self.n_children = P, C
        generator = torch.Generator().manual_seed(seed)
        start = RandomStart(config.initial, generator)
        self.D = nn.Parameter(start.router((P, width)))
        self.Up = nn.Parameter(start.projectors((P, s, width))) if factored_G else None
        self.G = nn.Parameter(start.children((P, C, s if factored_G else width)))
        self.E = tied(config.use_tied_decoders_parent, self.D, start.router((P, width)))
        self.Down = None
        if factored_F and self.Up is not None:
            self.Down = tied(config.tie_projectors, self.Up, start.projectors((P, s, width)))
        written = self.G if factored_F == factored_G else self.atoms(slice(None))
        self.F = tied(config.use_tied_decoders_child, written, start.children((P, C, s if factored_F else width)))
        self.b_E = nn.Parameter(torch.zeros(P)) if config.use_encoder_bias else None
        self.b_F = nn.Parameter(torch.zeros(P, C)) if config.use_encoder_bias else None
        self.b_dec = nn.Parameter(torch.zeros(width)) if config.use_decoder_bias else None
        spare, decay = config.budget_slots, config.threshold_decay
        of_batch = config.parent_budget != "per_row", config.child_budget == "batch"
        self.parent_budget = Budget(config.topk_parent, of_batch[0], spare, decay, config.topk_parent_start)
        self.child_budget = Budget(config.active_children, of_batch[1], spare, decay, config.active_children_start)
        self.router_temperature = config.router_temp_start
        self.register_buffer("sigma", torch.eye(width) if self._needs_metric() else None)
        self.register_buffer("sigma_inv", torch.eye(width) if config.causal_orth_form == "literal" else None)
        self.register_buffer("gram_reference", None)
        offset = torch.tensor(width**-0.5) if config.magnitude == "leaky_offset" else None
        self.register_buffer("threshold", offset)
        joint = config.parent_budget == "joint"
        share = torch.tensor(config.topk_parent / config.total_l0)
        self.register_buffer("parent_share", share if joint else None)
        self.register_buffer("balance", torch.zeros(P) if config.router_balance_rate > 0 else None)
        self.register_buffer("child_balance", torch.zeros(P, C) if config.load_min > 0 else None)

    def _needs_metric(self) -> bool:
        return self.config.causal_ortho_lambda > 0 or self.config.norm_metric == "causal"

    # the way through the model

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows [B, d]."""
        x, rows, row_scale, origin = self._enter(h_Bd)
        parent_index, parent_value, logits, code_sum = self._route(rows, generator, origin)
        routes = ops.routing(parent_index, self.D, self.precision, self._used(parent_value))
        top = None
        if self.config.child_input == "residual":
            part = ops.weighted_row_sum(self.D, parent_index, parent_value, routes)
            top = part if self.b_dec is None else part + self.b_dec
            if not self.config.child_input_detach:
                rows, origin = x - top, None
            else:
                kept = origin is None and self.b_dec is not None  # rows carry b_dec's gradient
                rows = rows - part.detach() if kept else x - top.detach()
        index, children = self._open_children(rows, routes, parent_value, origin)
        rebuilt = ops.reconstruct(
            x, top, routes, parent_value, index, children, self.D, self.Up, self.G, self.b_dec,
            compare=self.training and not x.requires_grad,
        )  # fmt: skip
        codes = Codes(parent_index, parent_value, index, children.value, row_scale)
        return ModelOutput(
            x, rebuilt.x_hat, rebuilt.x_hat_top, codes, logits, children.pre, parent_sum=code_sum, errors=rebuilt.errors
        )

    def _enter(self, h_Bd: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, x - b_dec, norms of the rows, and b_dec where the operations that follow have to give it its gradient."""
        if ops.uses_kernels(self.D) and h_Bd.is_cuda and not h_Bd.requires_grad:
            x, rows, row_scale = ops.enter(
                h_Bd, self.normalize, self.data_mean, self.data_scale, UNIT_ROW_EPS, self.b_dec, self.precision
            )
            return x, rows, row_scale, self.b_dec
        x, row_scale = self.to_normalized(h_Bd)
        return x, x if self.b_dec is None else x - self.b_dec, row_scale, None

    def _route(
        self, x_Bd: Tensor, generator: torch.Generator | None, origin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `encode_parent`, and each row's summed parent codes [B] where the kernels have them."""
        config = self.config
        straight_through = config.gate == "straight_through"
        # Dead parents need a gradient through all logits, and so does the soft mask of a single parent.
        dense = config.aux_weight > 0 or (straight_through and config.topk_parent == 1)
        if dense or not ops.uses_kernels(self.E):
            x_Bd = x_Bd.to(self.E.dtype)
            if origin is not None:
                x_Bd = x_Bd + (origin.detach() - origin)
            return *self.encode_parent(x_Bd, generator), None

        index, logit, code_sum, logits = ops.route(
            x_Bd,
            self.E,
            self.b_E,
            origin,
            self.parent_budget.slots(self.n_parents, self.k_progress is not None),
            threshold=self.threshold,
            noise=self._handicap(generator),
            sum_codes=config.l1_scope == "all" and self.training,
            precision=self.precision,
        )
        if straight_through and config.magnitude != "binary":
            return index, ops.gate(logit, self.threshold, self.router_temperature), logits, code_sum
        value = parent_code(logit, config.magnitude, self.threshold)
        if straight_through:
            slots = torch.arange(config.topk_parent, device=logit.device).expand_as(logit)
            value = value * straight_through_gate(logit, slots, self.router_temperature)
        return index, self._keep_parents(index, value), logits, code_sum

    def _handicap(self, generator: torch.Generator | None) -> Callable[[Tensor], Tensor] | None:
        """What the choice adds to the logits, as a function of them: the parents' balance, and in training noise."""
        if self.config.gate == "hard" or not self.training:
            return None if self.balance is None else self._bias

        def noise(logits_BP: Tensor) -> Tensor:
            noise_BP = routing_noise(logits_BP, self.router_temperature, self.config.router_noise, generator)
            return noise_BP if self.balance is None else noise_BP + self._bias(logits_BP)

        return noise

    def _bias(self, logits_BP: Tensor) -> Tensor:
        """The parents' balance; with limits of the load only where a parent's code would be above 0, [B, P].

        Else what is silent on a row would take a slot there and still be silent.
        """
        assert self.balance is not None
        if not self.config.has_load_limits:
            return self.balance
        return torch.where(parent_code(logits_BP, self.config.magnitude, self.threshold) > 0, self.balance, 0.0)

    def encode_parent(self, x_Bd: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route rows (normalised, b_dec removed): indices [B, k], codes [B, k], all logits [B, P]."""
        config = self.config
        logits_BP = ops.linear(x_Bd, self.E, self.b_E)
        choice_BP = logits_BP.detach()
        if config.magnitude == "leaky_offset":  # the published code chooses among codes, many of which are 0
            choice_BP = parent_code(choice_BP, config.magnitude, self.threshold)
        straight_through = config.gate == "straight_through"
        handicap = self._handicap(generator)
        if handicap is not None:
            choice_BP = choice_BP + handicap(logits_BP)
        k = self.parent_budget.slots(self.n_parents, self.k_progress is not None)
        if config.magnitude == "leaky_offset":
            index_Bk = topk_lowest(choice_BP, k)
        else:
            index_Bk = torch.topk(choice_BP, k, dim=1).indices
        value_Bk = parent_code(logits_BP.gather(1, index_Bk), config.magnitude, self.threshold)
        if straight_through:
            value_Bk = value_Bk * straight_through_gate(logits_BP, index_Bk, self.router_temperature)
        return index_Bk, self._keep_parents(index_Bk, value_Bk), logits_BP

    def _keep_parents(self, index_Bk: Tensor, value_Bk: Tensor) -> Tensor:
        """The routed parents' codes [B, k], 0 where the budget leaves them out."""
        return self.parent_budget.keep(value_Bk, self._wanted()[0], self.parent_scores(index_Bk, value_Bk))

    def parent_scores(self, index_Bk: Tensor, value_Bk: Tensor) -> Tensor:
        """What parents compete with under a batch's budget, [B, k]: their codes, or with balanced loads r + beta."""
        return balanced_scores(value_Bk, self.balance, index_Bk)

    def child_scores(self, index_BK: Tensor, value_BK: Tensor) -> Tensor:
        """What children compete with under a batch's budget, [B, K]: their codes, or with balanced loads q + beta."""
        balance = self.child_balance
        return balanced_scores(value_BK, None if balance is None else balance.flatten(), index_BK)

    def encode_children(self, x_Bd: Tensor, parent_Bk: Tensor, value_Bk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of the routed parents: flat indices [B, K], codes [B, K], pre-activations [B, k, C].

        A child contributes only while its parent's code is above 0.
        """
        routes = ops.routing(parent_Bk, self.D, self.precision, self._used(value_Bk))
        index, children = self._open_children(x_Bd, routes, value_Bk)
        return index, children.value, children.pre

    def _used(self, value_Bk: Tensor) -> Tensor | None:
        """The slots with a code, where a batch's budget leaves many without one and no L1 reads those; None: all."""
        of_all = self.config.l1_child > 0 and self.config.l1_scope == "all"
        return value_Bk.detach() > 0 if self.parent_budget.of_batch and not of_all else None

    def _open_children(
        self, x_Bd: Tensor, routes: ops.Routing, value_Bk: Tensor, origin: Tensor | None = None
    ) -> tuple[Tensor, ops.Children]:
        """The chosen children's flat indices [B, K], and the children."""
        config, parent_Bk = self.config, routes.parent_Bk
        pre_BkC = ops.encode_children(x_Bd, routes, self.Down, self.F, self.b_F, origin)
        choice_BkC = balanced_scores(pre_BkC.detach(), self.child_balance, parent_Bk)
        if config.child_budget != "per_parent":
            most = self.child_budget.slots(parent_Bk.shape[1] * self.n_children, self.k_progress is not None)
            place_BK = ops.best_children(choice_BkC, value_Bk, most)
        elif config.topk_child == 1:
            place_BK = ops.best_child(choice_BkC, value_Bk)
        else:
            place_BK = self._best_per_parent(choice_BkC, value_Bk)
        C = self.n_children
        index_BK = parent_Bk.gather(1, place_BK // C) * C + place_BK % C
        children = ops.keep_children(pre_BkC, place_BK, value_Bk, config.magnitude, self.threshold)
        kept_BK = self.child_budget.keep(children.value, self._wanted()[1], self.child_scores(index_BK, children.value))
        if kept_BK is not children.value:
            children = ops.with_codes(children, kept_BK)
        return index_BK, children

    def _best_per_parent(self, choice_BkC: Tensor, value_Bk: Tensor) -> Tensor:
        """Places in [k*C] of the topk_child largest children of every parent: [B, K]."""
        k, C = choice_BkC.shape[1:]
        open_BkC = choice_BkC.masked_fill(value_Bk.unsqueeze(2) <= 0, -torch.inf)
        best_Bkc = torch.topk(open_BkC, self.config.topk_child, dim=2).indices
        return (best_Bkc + torch.arange(0, k * C, C, device=choice_BkC.device).view(1, k, 1)).flatten(1)

    def _wanted(self) -> tuple[float | Tensor | None, float | Tensor | None]:
        """Parents and children per row at this step of training; None: k, and K_c or k_c for each parent."""
        if self.k_progress is None and self.parent_share is None:
            return None, None
        parents, children = self.parent_budget.at(self.k_progress), self.child_budget.at(self.k_progress)
        if self.config.child_budget == "per_parent":
            return parents, None
        if self.parent_share is not None:
            total = parents + children
            parents, children = self.parent_share * total, (1 - self.parent_share) * total
        return parents, children

    def decode_normalized(self, codes: Codes) -> Tensor:
        """x_hat [B, d] = b_dec + parents + children."""
        x_hat = ops.weighted_row_sum(self.D, codes.parent_index, codes.parent_value)
        x_hat = x_hat + ops.decode_children(codes.child_index, codes.child_value, self.Up, self.G)
        return x_hat if self.b_dec is None else x_hat + self.b_dec

    def atoms(self, parents: Tensor | slice | int) -> Tensor:
        """Child atoms Up_p^T G_pc of the given parents [n] (or of one): [n, C, d]."""
        return self.G[parents] if self.Up is None else self.G[parents] @ self.Up[parents]

    def child_readers(self, parents: Tensor | slice) -> Tensor:
        """What the children of the given parents [n] read with, Down_p^T F_pc: [n, C, d]."""
        return self.F[parents] if self.Down is None else self.F[parents] @ self.Down[parents]

    # training

    def update_router_temperature(self, step: int, total_steps: int) -> None:
        """tau = start + (end - start) step / total_steps, for 0 <= step < total_steps over all stages together."""
        start, end = self.config.router_temp_start, self.config.router_temp_end
        self.router_temperature = start + (end - start) * step / total_steps

    def update_k(self, step: int) -> None:
        """k goes linearly from its start to its end in the first `k_anneal_steps` steps over all stages."""
        steps = self.config.k_anneal_steps
        self.k_progress = step / steps if step < steps else None

    @torch.no_grad()
    def update_balance(self, codes: Codes) -> None:
        """Move the biases of the choice, and where they can do no more b_E and b_F, against the loads of a batch.

        See docs/method.md section 1. Under a joint budget the codes' share of parents rises while the smallest parent
        in use is larger than the smallest child in use, and falls while it is smaller.
        """
        config, rate = self.config, self.config.router_balance_rate
        if self.parent_share is not None:
            start = config.topk_parent / config.total_l0
            rise = (self.parent_budget.smallest - self.child_budget.smallest).sign()
            self.parent_share += SHARE_STEP * rise
            self.parent_share.clamp_(start / 2, (1 + start) / 2)
        if self.balance is None:
            return
        load_P = load(codes.parent_index, codes.parent_value, self.n_parents)
        if not config.has_load_limits:
            self.balance += rate * (load_P.mean() - load_P).sign()
            return
        limit = None
        if config.router_load_max is not None:
            rows = config.router_load_max * len(codes.parent_index)
            limit = (config.router_load_spread * load_P.mean()).clamp_min(rows)
        lacking_P = move_balance_(self.balance, load_P, codes.parent_value, rate, config.load_min, limit)
        _lift(self.b_E, lacking_P)
        if self.child_balance is not None:
            load_R = load(codes.child_index, codes.child_value, self.child_balance.numel())
            # Half of a mean child's part of its parent's rows: if all of a rare parent's children asked for more, they
            # would take the rows from each other, and lift each other without end.
            part = load_R.mean() / (2 * load_P.mean().clamp_min(1e-6))
            within_R = (part * load_P).repeat_interleave(self.n_children)
            balance_R = self.child_balance.view(-1)
            lacking_R = move_balance_(balance_R, load_R, codes.child_value, rate, config.load_min, within_m=within_R)
            _lift(self.b_F, lacking_R.view_as(self.child_balance))

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec, where there is one, at the geometric median of raw rows, given as batches [B, d].

        With `initial_router` or `initial_children` these rows start parents and children, too.
        """
        rows = self.normalized_batches(batches)
        if self.b_dec is not None:
            self.b_dec.copy_(geometric_median(rows))
        start_from_rows(self, rows)

    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        """Set the thresholds of batch budgets so that raw rows [B, d] have `target_l0` codes on average."""
        calibrate(self, batches, target_l0)

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead: Dead | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """Every loss term that is on, by name: (weight, value)."""
        config = overrides.apply(self.config)
        terms = loss_terms(output, config, self.tensors(), self._penalty_metric(), self.threshold, dead, self.precision)
        if config.parent_prefixes and config.top_level_beta > 0:
            terms["recon_prefixes"] = (config.top_level_beta, self._prefix_errors(output))
        return terms

    def _prefix_errors(self, output: ModelOutput) -> Tensor:
        """The summed errors of rebuilding x by the first parents alone, one for each of `parent_prefixes`."""
        index, value = output.codes.parent_index, output.codes.parent_value
        routes = ops.routing(index, self.D, self.precision)
        errors = []
        for share in self.config.parent_prefixes:
            first = max(1, round(share * self.n_parents))
            x_hat = ops.weighted_row_sum(self.D, index, torch.where(index < first, value, 0.0), routes)
            x_hat = x_hat if self.b_dec is None else x_hat + self.b_dec
            errors.append(reconstruction_error(output.x, x_hat, self.config.recon_reduction))
        return torch.stack(errors).sum()

    def _penalty_metric(self) -> Tensor | None:
        return self.sigma_inv if self.config.causal_orth_form == "literal" else self.sigma

    def compute_causal_orthogonality_penalty(self, geometry: Any) -> Tensor:
        """Mean squared causal inner product of parents and their atoms in `geometry` (a CausalGeometry)."""
        literal = self.config.causal_orth_form == "literal"
        metric = torch.linalg.inv(geometry.sigma) if literal else geometry.sigma
        return causal_orthogonality(self.D, self.Up, self.G, metric.to(self.D), self.config.causal_orth_form)

    def initialize_from_teacher(
        self,
        parent_vectors: Mapping[str, Tensor],
        child_projectors: Mapping[str, ChildInit],
        geometry: SquareRoots | None = None,
        *,
        seed_parent: bool = True,
        seed_child: bool = True,
        seed_projectors: bool = True,
    ) -> None:
        """Put a teacher into the first Q parents, in the order of `parent_vectors`; see `start.put_teacher`."""
        put_teacher(self, parent_vectors, child_projectors, geometry, seed_parent, seed_child, seed_projectors)


def _lift(bias: nn.Parameter | None, by: Tensor) -> None:
    """Raise an encoder's bias, where there is one that is not frozen."""
    if bias is not None and bias.requires_grad:
        bias.add_(by)


def freeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Freeze D and G; Up and Down stay trainable, so that the causal penalty keeps its gradient."""
    model.freeze({"D", "G"})


def unfreeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Make every tensor trainable again."""
    model.freeze(())
