"""The hierarchical sparse autoencoder (docs/method.md sections 1 and 4).

One activation's way: x -> router logits E x' -> k parents -> their codes a -> what the parents leave of x -> each
routed parent's subspace Down_p -> its children F_p -> the largest child codes c ->
x_hat = b_dec + sum a D_p + sum c Up_p^T G_pj.

Shapes: B rows, d residual width, P parents, k active parents, C children per parent, K active children per row,
s subspace width, Q teacher parents.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..config import HSAEConfig, LossOverrides
from ..geometry.bases import dual_rows
from ..ops.magnitude import parent_code
from .base import UNIT_ROW_EPS, SparseAutoencoder
from .codes import Codes, Dead, ModelOutput
from .constraints import atom_norms, geometric_median, gram, project_out, restore_gram, row_norms
from .losses import causal_orthogonality, loss_terms
from .routing import routing_noise, straight_through_gate, topk_lowest


class ChildInit(NamedTuple):
    """Teacher of one parent's sub-SAE: Down, Up [s, d]; F, G [C', s] for its first C' <= C children."""

    down: Tensor
    up: Tensor
    F: Tensor
    G: Tensor


class SquareRoots(Protocol):
    """What the dual form needs of a geometry: Sigma^(1/2) and Sigma^(-1/2), [d, d]."""

    @property
    def sigma_sqrt(self) -> Tensor: ...

    @property
    def sigma_inv_sqrt(self) -> Tensor: ...


def unit_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian rows scaled to unit norm."""
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


def orthonormal_rows(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """For each of P parents s orthonormal rows of width d: [P, s, d]."""
    P, s, d = shape
    return torch.linalg.qr(torch.randn(P, d, s, generator=generator)).Q.mT.contiguous()


def he_uniform_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform within +-sqrt(6 / fan_in), fan_in the length of a row."""
    return (2 * torch.rand(shape, generator=generator) - 1) * (6 / shape[-1]) ** 0.5


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

    def __init__(self, config: HSAEConfig, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize)
        P, C, s = config.n_parents, config.n_children_per_parent, config.subspace_dim
        if s > width:
            raise ValueError(f"hsae.subspace_dim: found {s}, allowed: at most the residual width {width}")
        self.n_parents, self.n_children = P, C
        generator = torch.Generator().manual_seed(seed)
        start = _Start(config.initial, generator)
        self.D = nn.Parameter(start.router((P, width)))
        self.Up = nn.Parameter(start.projectors((P, s, width)))
        self.G = nn.Parameter(start.children((P, C, s)))
        self.E = _tie(config.use_tied_decoders_parent, self.D, start.router((P, width)))
        self.Down = _tie(config.tie_projectors, self.Up, start.projectors((P, s, width)))
        self.F = _tie(config.use_tied_decoders_child, self.G, start.children((P, C, s)))
        self.b_E = nn.Parameter(torch.zeros(P)) if config.use_encoder_bias else None
        self.b_F = nn.Parameter(torch.zeros(P, C)) if config.use_encoder_bias else None
        self.b_dec = nn.Parameter(torch.zeros(width)) if config.use_decoder_bias else None
        self.router_temperature = config.router_temp_start
        self.register_buffer("sigma", torch.eye(width) if self._needs_metric() else None)
        self.register_buffer("sigma_inv", torch.eye(width) if config.causal_orth_form == "literal" else None)
        self.register_buffer("gram_reference", None)
        offset = torch.tensor(width**-0.5) if config.magnitude == "leaky_offset" else None
        self.register_buffer("threshold", offset)

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

        def noise(logits_BP: Tensor) -> Tensor:
            return routing_noise(logits_BP, self.router_temperature, config.router_noise, generator)

        index, logit, code_sum, logits = ops.route(
            x_Bd,
            self.E,
            self.b_E,
            origin,
            config.topk_parent,
            threshold=self.threshold,
            noise=noise if straight_through and self.training else None,
            sum_codes=config.l1_scope == "all" and self.training,
            precision=self.precision,
        )
        if straight_through and config.magnitude != "binary":
            return index, ops.gate(logit, self.threshold, self.router_temperature), logits, code_sum
        value = parent_code(logit, config.magnitude, self.threshold)
        if straight_through:
            slots = torch.arange(config.topk_parent, device=logit.device).expand_as(logit)
            value = value * straight_through_gate(logit, slots, self.router_temperature)
        return index, value, logits, code_sum

    def encode_parent(self, x_Bd: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route rows (normalised, b_dec removed): indices [B, k], codes [B, k], all logits [B, P]."""
        config = self.config
        logits_BP = ops.linear(x_Bd, self.E, self.b_E)
        choice_BP = logits_BP.detach()
        if config.magnitude == "leaky_offset":  # the published code chooses among codes, many of which are 0
            choice_BP = parent_code(choice_BP, config.magnitude, self.threshold)
        straight_through = config.gate == "straight_through"
        if straight_through and self.training:
            choice_BP = choice_BP + routing_noise(logits_BP, self.router_temperature, config.router_noise, generator)
        if config.magnitude == "leaky_offset":
            index_Bk = topk_lowest(choice_BP, config.topk_parent)
        else:
            index_Bk = torch.topk(choice_BP, config.topk_parent, dim=1).indices
        value_Bk = parent_code(logits_BP.gather(1, index_Bk), config.magnitude, self.threshold)
        if straight_through:
            value_Bk = value_Bk * straight_through_gate(logits_BP, index_Bk, self.router_temperature)
        return index_Bk, value_Bk, logits_BP

    def encode_children(self, x_Bd: Tensor, parent_Bk: Tensor, value_Bk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of the routed parents: flat indices [B, K], codes [B, K], pre-activations [B, k, C].

        A child contributes only while its parent's code is above 0.
        """
        routes = ops.routing(parent_Bk, self.Down, self.precision)
        index, children = self._open_children(x_Bd, routes, value_Bk)
        return index, children.value, children.pre

    def _open_children(
        self, x_Bd: Tensor, routes: ops.Routing, value_Bk: Tensor, origin: Tensor | None = None
    ) -> tuple[Tensor, ops.Children]:
        """The chosen children's flat indices [B, K], and the children."""
        config, parent_Bk = self.config, routes.parent_Bk
        pre_BkC = ops.encode_children(x_Bd, routes, self.Down, self.F, self.b_F, origin)
        if config.child_budget == "shared":
            place_BK = ops.best_children(pre_BkC, value_Bk, config.active_children)
        elif config.topk_child == 1:
            place_BK = ops.best_child(pre_BkC, value_Bk)
        else:
            place_BK = self._best_per_parent(pre_BkC, value_Bk)
        children = ops.keep_children(pre_BkC, place_BK, value_Bk, config.magnitude, self.threshold)
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

    def atoms(self, parents: Tensor) -> Tensor:
        """Child atoms Up_p^T G_pc of the given parents [n]: [n, C, d]."""
        return self.G[parents] @ self.Up[parents]

    # training

    def update_router_temperature(self, step: int, total_steps: int) -> None:
        """tau = start + (end - start) step / total_steps, for 0 <= step < total_steps over all stages together."""
        start, end = self.config.router_temp_start, self.config.router_temp_end
        self.router_temperature = start + (end - start) * step / total_steps

    def freeze(self, names: Any) -> None:
        """Freeze exactly the named tensors; a frozen G fixes the Gram matrices of Up, hence the atoms' norms."""
        super().freeze(names)
        held = not self.G.requires_grad and self.config.normalize_child == "atom"
        self.gram_reference = gram(self.Up.detach(), self._norm_metric()) if held else None

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

    def _norm_metric(self, geometry: Any = None) -> Tensor | None:
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
        metric = self._norm_metric(geometry)
        if self.D.requires_grad and not (metric is None and ops.normalize_rows_(self.D)):
            self.D.div_(row_norms(self.D, metric).clamp_min(1e-12))
        if self.gram_reference is not None:
            if self.Up.requires_grad:
                self.Up.copy_(restore_gram(self.Up, self.gram_reference, metric))
        elif self.G.requires_grad:
            if self.config.normalize_child == "decoder" and ops.normalize_rows_(self.G):
                return
            self.G.div_(self._child_norms(geometry).clamp_min(1e-12))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradients of D and G what would change a constrained norm at first order."""
        metric = self._norm_metric()
        if self.D.grad is not None and not (metric is None and ops.project_out_(self.D.grad, self.D.detach())):
            normal_Pd = self.D if metric is None else self.D @ metric
            self.D.grad.copy_(project_out(self.D.grad, normal_Pd))
        atoms = self.config.normalize_child == "atom"
        if self.G.grad is not None and (atoms or not ops.project_out_(self.G.grad, self.G.detach())):
            normal_PCs = self.G @ gram(self.Up, metric) if atoms else self.G
            self.G.grad.copy_(project_out(self.G.grad, normal_PCs))

    @torch.no_grad()
    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec, where there is one, at the geometric median of raw rows, given as batches [B, d]."""
        if self.b_dec is not None:
            self.b_dec.copy_(geometric_median(self.normalized_batches(batches)))

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

    @torch.no_grad()
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
        """Put a teacher into the first Q parents, in the order of `parent_vectors`; the others stay random.

        Args:
            parent_vectors: l_p [d] by parent name. With `geometry`, unified coordinates: the dual form, read and write
                apart. Without, residual coordinates: the literal form, one unit vector for both.
            child_projectors: sub-SAE by parent name; matched by name, never by order.
            geometry: a CausalGeometry or a Teacher.
            seed_parent, seed_child, seed_projectors: which parts are put in.

        Raises ValueError when names differ, when there are more teacher parents than parents, or when a tied router
        would have to read and write apart.
        """
        Q = len(parent_vectors)
        if self.n_parents < Q:
            raise ValueError(f"hsae.n_parents: found {self.n_parents}, allowed: at least the teacher's {Q} parents")
        if set(parent_vectors) != set(child_projectors):
            odd = sorted(set(parent_vectors) ^ set(child_projectors))
            raise ValueError(
                f"teacher: found {odd} in one of parent_vectors and child_projectors, allowed: equal names"
            )
        if geometry is not None and seed_parent and self.E is self.D:
            raise ValueError(
                "hsae.use_tied_decoders_parent: found true, allowed: false or init (dual reads and writes apart)"
            )
        unified = torch.stack(list(parent_vectors.values())).double()
        if geometry is None:
            read = write = torch.nn.functional.normalize(unified, dim=1)
        else:
            read, write = dual_rows(unified, geometry.sigma_sqrt.to(unified), geometry.sigma_inv_sqrt.to(unified))
        if seed_parent:
            self.E[:Q], self.D[:Q] = read.to(self.E), write.to(self.D)
            if self.b_E is not None:
                self.b_E[:Q] = 0
        for row, name in enumerate(parent_vectors):
            child = child_projectors[name]
            if seed_projectors:
                self.Down[row], self.Up[row] = child.down.to(self.Down), child.up.to(self.Up)
            if seed_child:
                n = min(len(child.G), self.n_children)
                self.F[row, :n], self.G[row, :n] = child.F[:n].to(self.F), child.G[:n].to(self.G)
        self._scale_readers(Q if seed_parent else 0, Q if seed_child or seed_projectors else 0)
        self.normalize_decoder_weights()

    def _scale_readers(self, n_parents: int, n_subspaces: int) -> None:
        """Scale E's and F's first rows by what normalising D and G will divide by: E_p.D_p and F_pc.G_pc stay."""
        if not self.config.normalize_decoder:
            return
        if self.E is not self.D:
            self.E[:n_parents] *= row_norms(self.D[:n_parents], self._norm_metric())
        if self.F is not self.G:
            self.F[:n_subspaces] *= self._child_norms()[:n_subspaces]

    def _child_norms(self, geometry: Any = None) -> Tensor:
        """Norms [P, C, 1] of what the constraint on G holds at 1."""
        if self.config.normalize_child == "atom":
            return atom_norms(self.Up, self.G, self._norm_metric(geometry))
        return row_norms(self.G, None)


class _Start:
    """Random starts of the three kinds of tensors, drawn in the order they are asked for."""

    def __init__(self, kind: str, generator: torch.Generator):
        self.he, self.generator = kind == "he_uniform", generator

    def router(self, shape: tuple[int, int]) -> Tensor:
        return (he_uniform_rows if self.he else unit_rows)(shape, self.generator)

    def projectors(self, shape: tuple[int, int, int]) -> Tensor:
        return self._unit_uniform(shape) if self.he else orthonormal_rows(shape, self.generator)

    def children(self, shape: tuple[int, int, int]) -> Tensor:
        return self._unit_uniform(shape) if self.he else unit_rows(shape, self.generator)

    def _unit_uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.nn.functional.normalize(he_uniform_rows(shape, self.generator), dim=-1)


def _tie(tie: bool | str, decoder: nn.Parameter, independent: Tensor) -> nn.Parameter:
    """The encoder's tensor: the decoder itself (true), a copy of it (init), or its own random one (false)."""
    if tie is True:
        return decoder
    return nn.Parameter(decoder.detach().clone() if tie == "init" else independent)


def freeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Freeze D and G; Up and Down stay trainable, so that the causal penalty keeps its gradient."""
    model.freeze({"D", "G"})


def unfreeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Make every tensor trainable again."""
    model.freeze(())
