"""The hierarchical sparse autoencoder (docs/method.md sections 1 and 4).

One activation's way: x -> router logits E x' -> k parents -> their codes a -> what the parents leave of x -> each
routed parent's subspace Down_p -> its children F_p -> the largest child codes c ->
x_hat = b_dec + sum a D_p + sum c Up_p^T G_pj.

Shapes: B rows, d residual width, P parents, k active parents, C children per parent, K active children per row,
s subspace width, Q teacher parents.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..config import HSAEConfig, LossOverrides
from ..ops.magnitude import parent_code
from .base import UNIT_ROW_EPS, SparseAutoencoder
from .budget import Budget
from .codes import Codes, Dead, ModelOutput, load
from .constraints import atom_norms, geometric_median, gram, project_out, restore_gram, row_norms
from .losses import causal_orthogonality, loss_terms
from .routing import routing_noise, straight_through_gate, topk_lowest
from .selection import level_for_l0
from .start import ChildInit, RandomStart, SquareRoots, put_teacher, start_from_rows, tied


class HierarchicalSAE(SparseAutoencoder):
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
    sigma: Tensor | None
    sigma_inv: Tensor | None
    gram_reference: Tensor | None
    threshold: Tensor | None
    balance: Tensor | None

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
        of_batch = config.parent_budget == "batch", config.child_budget == "batch"
        self.parent_budget = Budget(config.topk_parent, of_batch[0], spare, decay, config.topk_parent_start)
        self.child_budget = Budget(config.active_children, of_batch[1], spare, decay, config.active_children_start)
        self.router_temperature = config.router_temp_start
        self.register_buffer("sigma", torch.eye(width) if self._needs_metric() else None)
        self.register_buffer("sigma_inv", torch.eye(width) if config.causal_orth_form == "literal" else None)
        self.register_buffer("gram_reference", None)
        offset = torch.tensor(width**-0.5) if config.magnitude == "leaky_offset" else None
        self.register_buffer("threshold", offset)
        self.register_buffer("balance", torch.zeros(P) if config.router_balance_rate > 0 else None)

    def _needs_metric(self) -> bool:
        return self.config.causal_ortho_lambda > 0 or self.config.norm_metric == "causal"

    # the way through the model

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows [B, d]."""
        x, rows, row_scale, origin = self._enter(h_Bd)
        parent_index, parent_value, logits, code_sum = self._route(rows, generator, origin)
        routes = ops.routing(parent_index, self.D, self.precision)
        top = None
        if self.config.child_input == "residual":
            part = ops.weighted_row_sum(self.D, parent_index, parent_value, routes)
            top = part if self.b_dec is None else part + self.b_dec
            if not self.config.child_input_detach:
                rows, origin = x - top, None
            else:
                rows = rows - part.detach() if origin is None else x - top.detach()
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
            self.parent_budget.slots(self.n_parents, self.k_progress),
            threshold=self.threshold,
            noise=partial(self._handicap, generator=generator) if self._is_handicapped() else None,
            sum_codes=config.l1_scope == "all" and self.training,
            precision=self.precision,
        )
        value = parent_code(logit, config.magnitude, self.threshold)
        if straight_through:
            slots = torch.arange(config.topk_parent, device=logit.device).expand_as(logit)
            value = value * straight_through_gate(logit, slots, self.router_temperature)
        return index, self.parent_budget.keep(value, self.k_progress), logits, code_sum

    def _is_handicapped(self) -> bool:
        return self.balance is not None or (self.config.gate == "straight_through" and self.training)

    def _handicap(self, logits_BP: Tensor, generator: torch.Generator | None) -> Tensor:
        """What is added to the logits for the choice alone: the parents' balance, and in training noise."""
        if self.config.gate == "hard" or not self.training:
            assert self.balance is not None
            return self.balance
        noise_BP = routing_noise(logits_BP, self.router_temperature, self.config.router_noise, generator)
        return noise_BP if self.balance is None else noise_BP + self.balance

    def encode_parent(self, x_Bd: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route rows (normalised, b_dec removed): indices [B, k], codes [B, k], all logits [B, P]."""
        config = self.config
        logits_BP = torch.nn.functional.linear(x_Bd, self.E, self.b_E)
        choice_BP = logits_BP.detach()
        if config.magnitude == "leaky_offset":  # the published code chooses among codes, many of which are 0
            choice_BP = parent_code(choice_BP, config.magnitude, self.threshold)
        straight_through = config.gate == "straight_through"
        if self._is_handicapped():
            choice_BP = choice_BP + self._handicap(logits_BP, generator)
        k = self.parent_budget.slots(self.n_parents, self.k_progress)
        if config.magnitude == "leaky_offset":
            index_Bk = topk_lowest(choice_BP, k)
        else:
            index_Bk = torch.topk(choice_BP, k, dim=1).indices
        value_Bk = parent_code(logits_BP.gather(1, index_Bk), config.magnitude, self.threshold)
        if straight_through:
            value_Bk = value_Bk * straight_through_gate(logits_BP, index_Bk, self.router_temperature)
        return index_Bk, self.parent_budget.keep(value_Bk, self.k_progress), logits_BP

    def encode_children(self, x_Bd: Tensor, parent_Bk: Tensor, value_Bk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of the routed parents: flat indices [B, K], codes [B, K], pre-activations [B, k, C].

        A child contributes only while its parent's code is above 0.
        """
        routes = ops.routing(parent_Bk, self.D, self.precision)
        index, children = self._open_children(x_Bd, routes, value_Bk)
        return index, children.value, children.pre

    def _open_children(
        self, x_Bd: Tensor, routes: ops.Routing, value_Bk: Tensor, origin: Tensor | None = None
    ) -> tuple[Tensor, ops.Children]:
        """The chosen children's flat indices [B, K], and the children."""
        config, parent_Bk = self.config, routes.parent_Bk
        pre_BkC = ops.encode_children(x_Bd, routes, self.Down, self.F, self.b_F, origin)
        if config.child_budget != "per_parent":
            most = self.child_budget.slots(parent_Bk.shape[1] * self.n_children, self.k_progress)
            place_BK = ops.best_children(pre_BkC, value_Bk, most)
        elif config.topk_child == 1:
            place_BK = ops.best_child(pre_BkC, value_Bk)
        else:
            place_BK = self._best_per_parent(pre_BkC, value_Bk)
        children = ops.keep_children(pre_BkC, place_BK, value_Bk, config.magnitude, self.threshold)
        kept_BK = self.child_budget.keep(children.value, self.k_progress)
        if kept_BK is not children.value:
            children = ops.with_codes(children, kept_BK)
        C = self.n_children
        return parent_Bk.gather(1, place_BK // C) * C + place_BK % C, children

    def _best_per_parent(self, pre_BkC: Tensor, value_Bk: Tensor) -> Tensor:
        """Places in [k*C] of the topk_child largest children of every parent: [B, K]."""
        k, C = pre_BkC.shape[1:]
        score_BkC = pre_BkC.detach().masked_fill(value_Bk.unsqueeze(2) <= 0, -torch.inf)
        best_Bkc = torch.topk(score_BkC, self.config.topk_child, dim=2).indices
        return (best_Bkc + torch.arange(0, k * C, C, device=pre_BkC.device).view(1, k, 1)).flatten(1)

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
        """Parents with less than the mean load of the batch rise in the choice, those with more fall."""
        if self.balance is not None:
            load_P = load(codes, self.n_parents)
            self.balance += self.config.router_balance_rate * (load_P.mean() - load_P).sign()

    def freeze(self, names: Any) -> None:
        """Freeze exactly the named tensors; a frozen G fixes the Gram matrices of Up, hence the atoms' norms."""
        super().freeze(names)
        held = not self.G.requires_grad and self.config.normalize_child == "atom"
        metric = self.norm_metric()
        self.gram_reference = gram(self.Up.detach(), metric) if held and self.Up is not None else None

    def set_metric(self, sigma_dd: Tensor) -> None:
        """Set Sigma, the residual metric of the causal penalty and norms; a model that uses neither ignores it.

        Causal norms are restored at once: a stage that freezes D or G keeps the norms it finds.
        """
        if self.sigma is not None:
            self.sigma.copy_(sigma_dd)
        if self.sigma_inv is not None:
            self.sigma_inv.copy_(torch.linalg.inv(sigma_dd.double()))
        if self.config.norm_metric == "causal":
            self.normalize_decoder_weights()

    def norm_metric(self, geometry: Any = None) -> Tensor | None:
        if geometry is not None:
            return geometry.sigma.to(self.D)
        return self.sigma if self.config.norm_metric == "causal" else None

    @torch.no_grad()
    def normalize_decoder_weights(self, geometry: Any = None) -> None:
        """Unit norm for D's rows and for the atoms (or G's rows), in the configured norm or in `geometry`'s.

        Does nothing when `normalize_decoder` is off.
        """
        if not self.config.normalize_decoder:
            return
        metric = self.norm_metric(geometry)
        if self.D.requires_grad and not (metric is None and ops.normalize_rows_(self.D)):
            self.D.div_(row_norms(self.D, metric).clamp_min(1e-12))
        if self.gram_reference is not None:
            assert self.Up is not None
            if self.Up.requires_grad:
                self.Up.copy_(restore_gram(self.Up, self.gram_reference, metric))
        elif self.G.requires_grad:
            if self.config.normalize_child == "decoder" and ops.normalize_rows_(self.G):
                return
            self.G.div_(self.child_norms(geometry).clamp_min(1e-12))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradients of D and G what would change a constrained norm at first order."""
        metric = self.norm_metric()
        if self.D.grad is not None and not (metric is None and ops.project_out_(self.D.grad, self.D.detach())):
            normal_Pd = self.D if metric is None else self.D @ metric
            self.D.grad.copy_(project_out(self.D.grad, normal_Pd))
        atoms = self.config.normalize_child == "atom"
        if self.G.grad is not None and (atoms or not ops.project_out_(self.G.grad, self.G.detach())):
            of_atoms = metric if self.Up is None else gram(self.Up, metric)
            normal_PCs = self.G @ of_atoms if atoms and of_atoms is not None else self.G
            self.G.grad.copy_(project_out(self.G.grad, normal_PCs))

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec, where there is one, at the geometric median of raw rows, given as batches [B, d].

        With `initial_router` or `initial_children` these rows start parents and children, too.
        """
        rows = self.normalized_batches(batches)
        if self.b_dec is not None:
            self.b_dec.copy_(geometric_median(rows))
        start_from_rows(self, rows)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        """Set the thresholds of batch budgets so that raw rows [B, d] have `target_l0` codes on average.

        Parents get their share k / (k + K_c) of them; children get what the parents leave.
        """
        was_training = self.training
        self.eval()

        def codes() -> Iterator[Codes]:
            return (self.encode(h_Bd.to(self.data_mean)) for h_Bd in batches)

        if self.parent_budget.of_batch:
            parents = target_l0 * self.config.topk_parent / self.config.total_l0
            self.parent_budget.threshold.zero_()  # every positive code, up to the number of slots
            level = level_for_l0(lambda: (each.parent_value for each in codes()), parents)
            self.parent_budget.threshold.fill_(max(0.0, level))
        if self.child_budget.of_batch:
            active = torch.cat([(each.parent_value > 0).sum(1) for each in codes()]).double().mean().item()
            self.child_budget.threshold.zero_()
            level = level_for_l0(lambda: (each.child_value for each in codes()), max(0.0, target_l0 - active))
            self.child_budget.threshold.fill_(max(0.0, level))
        self.train(was_training)

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead: Dead | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """Every loss term that is on, by name: (weight, value)."""
        config = overrides.apply(self.config)
        return loss_terms(output, config, self.tensors(), self._penalty_metric(), self.threshold, dead, self.precision)

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

    def child_norms(self, geometry: Any = None) -> Tensor:
        """Norms [P, C, 1] of what the constraint on G holds at 1."""
        if self.config.normalize_child == "decoder":
            return row_norms(self.G, None)
        metric = self.norm_metric(geometry)
        return row_norms(self.G, metric) if self.Up is None else atom_norms(self.Up, self.G, metric)


def freeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Freeze D and G; Up and Down stay trainable, so that the causal penalty keeps its gradient."""
    model.freeze({"D", "G"})


def unfreeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Make every tensor trainable again."""
    model.freeze(())
