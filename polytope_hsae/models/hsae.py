"""The hierarchical sparse autoencoder (docs/method.md sections 1 and 4).

The router chooses a row's parents and their codes a. The children of these parents read the residual x - x_top and have
codes c. Of each, only the largest codes of the batch are kept:

    x_hat = b_dec + sum a_p D_p + sum c_pj G_pj

Shapes: B rows, d residual width, P parents, C children per parent, Q teacher parents; k and K slots for a row's parents
and children. Slots that the batch's budget leaves empty have code 0.
"""

from collections.abc import Container, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..ops import Routing, Rows
from . import jax_compat
from .balance import LoadBalancer, NoBalance
from .base import NormalizedBatches, SparseAutoencoder
from .children import CHILDREN
from .codes import Codes, Firings, ModelOutput
from .constraints import geometric_median
from .init import put_teacher, random_start
from .losses import causal_orthogonality, loss_terms
from .router import Parents, Router
from .sparsity import Sparsity, calibrate

ROUTER, OF_CHILDREN = ("E", "b_E", "D"), ("Down", "Up", "F", "b_F", "G")


def _of(part: str, name: str) -> Any:
    """A property of the model that reads and sets this attribute of a part."""
    return property(
        lambda model: getattr(getattr(model, part), name),
        lambda model, value: setattr(getattr(model, part), name, value),
    )


class HierarchicalSAE(SparseAutoencoder):
    """A router over P parents, each of which opens C children.

    Args:
        config: shape and options.
        width: d of the activations.
        normalize: rms, unit_row or none.
        seed: of the random initialisation.

    Raises ValueError when factored children's subspace is wider than d.
    """

    config_block = HSAEConfig
    tensor_names = ("D", "Up", "G", "E", "Down", "F", "b_E", "b_F", "b_dec")
    E, b_E, D = (_of("router", name) for name in ROUTER)
    Down, Up, F, b_F, G = (_of("child", name) for name in OF_CHILDREN)
    router_temperature = _of("router", "temperature")
    file_names: ClassVar[dict[str, str]] = {
        **{f"router.{name}": name for name in (*ROUTER, "threshold")},
        **{f"child.{name}": name for name in (*OF_CHILDREN, "gram_reference")},
        **{"balance.parent_bias": "balance", "balance.child_bias": "child_balance", "sparsity.share": "parent_share"},
        **{f"sparsity.parent_budget.{name}": f"parent_budget.{name}" for name in ("threshold", "batches")},
        **{f"sparsity.child_budget.{name}": f"child_budget.{name}" for name in ("threshold", "batches")},
    }
    transient_names = ("child.gram_reference",)

    def __init__(self, config: HSAEConfig, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize)
        self.n_parents, self.n_children = config.n_parents, config.n_children_per_parent
        start, published = random_start(config, width, seed), config.magnitude == "leaky_offset"
        self.router = (jax_compat.JaxRouter if published else Router)(config, start)
        self.child = (jax_compat.JaxChildren if published else CHILDREN[config.children])(config, start)
        self.sparsity = Sparsity(config)
        self.balance = LoadBalancer(config) if config.balance_rate > 0 else NoBalance()
        self.b_dec = nn.Parameter(torch.zeros(width)) if config.use_decoder_bias else None
        metric = config.causal_ortho_lambda > 0 or config.norm_metric == "causal"
        self.register_buffer("sigma", torch.eye(width) if metric else None)
        self.register_buffer("sigma_inv", torch.eye(width) if config.causal_orth_form == "literal" else None)

    sigma: Tensor | None
    sigma_inv: Tensor | None

    # forward pass

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows [B, d]."""
        # x: normalised coordinates. rows: what the router reads, x - b_dec, and then what the children read.
        x, rows, scale = self.ops.enter(h_Bd, self.normalize, self.data_mean, self.data_scale, self.b_dec)
        # The router fills each row's slots, then the batch's budget empties some; both rank codes plus selection bias.
        parents = self.router(rows, self.balance.parent_bias, generator)
        parents = self.sparsity.keep_parents(parents, self.balance.parent_bias)
        routes = Routing(parents.indices, self.n_parents, parents.used)
        x_top = None
        if self.config.child_input == "residual":
            x_top = self.ops.decode(routes, parents.value, self.router.D)
            x_top = x_top if self.b_dec is None else x_top + self.b_dec
            rows = Rows(x - x_top)  # not detached: the children's gradient reaches the parents
        pre = self.child.encode(rows, routes)
        children = self.sparsity.keep_children(pre, parents, self.child.code, self.balance.child_bias)
        x_hat, x_top, error, error_top = self.ops.reconstruct(
            x, x_top, routes, parents.value, children, self.router.D, self.b_dec, self.child.G, self.child.Up
        )
        codes = Codes(parents.indices, parents.value, children.indices, children.value, scale)
        return ModelOutput(
            x, x_hat, x_top, codes, parents.logits, error, error_top, child_pre=pre, code_sum=parents.code_sum
        )

    def encode_parent(self, x_Bd: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route rows x - b_dec: indices [B, k], codes [B, k], all logits [B, P].

        In training mode this updates the running threshold of a batch's budget.
        """
        bias = self.balance.parent_bias
        parents = self.sparsity.keep_parents(self.router(Rows(x_Bd), bias, generator), bias)
        return parents.indices, parents.value, parents.logits

    def encode_children(self, x_Bd: Tensor, parent_Bk: Tensor, value_Bk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Children of the routed parents: numbers p*C + j [B, K], codes [B, K], pre-activations [B, k, C].

        x: what children read, x - x_top or x - b_dec. A child's code is 0 where its parent's is not above 0.
        In training mode this updates the running threshold; call `encode_parent` first.
        """
        parents = Parents(parent_Bk, value_Bk, value_Bk)
        pre = self.child.encode(Rows(x_Bd), Routing(parent_Bk, self.n_parents))
        children = self.sparsity.keep_children(pre, parents, self.child.code, self.balance.child_bias)
        return children.indices, children.value, pre

    def decode_normalized(self, codes: Codes) -> Tensor:
        """x_hat [B, d] = b_dec + parents + children."""
        routes = Routing(codes.parent_index, self.n_parents)
        x_hat = self.ops.decode(routes, codes.parent_value, self.router.D)
        x_hat = x_hat + self.child.decode(codes.child_index, codes.child_value)
        return x_hat if self.b_dec is None else x_hat + self.b_dec

    def atoms(self, parents: Tensor | slice | int) -> Tensor:
        """Decoder rows of the children of the given parents [n] (or of one): [n, C, d]."""
        return self.child.atoms(parents)

    def child_readers(self, parents: Tensor | slice) -> Tensor:
        """Encoder rows of the children of the given parents [n]: [n, C, d]."""
        return self.child.readers(parents)

    # training; the order of a step: forward, loss_terms, backward and after_batch for every micro-batch, then
    # project_gradients, before_step, the optimiser, normalize_decoder_weights

    def update_router_temperature(self, step: int, total_steps: int) -> None:
        """tau = start + (end - start) step / total_steps, for 0 <= step < total_steps over all stages together."""
        start, end = self.config.router_temp_start, self.config.router_temp_end
        self.router.temperature = start + (end - start) * step / total_steps

    loss_terms = loss_terms

    def after_batch(self, firings: Firings) -> None:
        """Count a micro-batch's firings for the selection biases."""
        self.balance.count(firings)

    def before_step(self, frozen: Container[str] = ()) -> None:
        """Move the selection biases and the share, once an optimiser step."""
        self.sparsity.before_step()
        self.balance.move(self.router, self.child, frozen)

    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        if self.b_dec is not None:
            self.b_dec.data.copy_(geometric_median(NormalizedBatches(self, batches)))

    calibrate = calibrate
    initialize_from_teacher = put_teacher

    # constraints

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
        """The metric [d, d] of the unit norms: `geometry`'s, or the configured one; None is Euclidean."""
        if geometry is not None:
            return geometry.sigma.to(self.D)
        return self.sigma if self.config.norm_metric == "causal" else None

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze exactly the named tensors; the others become trainable. Tied tensors freeze together."""
        super().freeze(names)
        self.child.hold_norms(self.norm_metric())

    @property
    def graphable(self) -> bool:  # type: ignore[override]
        """False while G is frozen: restoring norms takes Cholesky factors, whose library may not allow a capture."""
        return self.child.gram_reference is None

    def normalize_decoder_weights(self, geometry: Any = None) -> None:
        """Unit norm for D's rows and for the atoms (or G's rows), in the configured metric or in `geometry`'s.

        Does nothing when `normalize_decoder` is off.
        """
        if self.config.normalize_decoder:
            metric = self.norm_metric(geometry)
            self.router.normalize_(metric)
            self.child.normalize_(metric)

    def compute_causal_orthogonality_penalty(self, geometry: Any) -> Tensor:
        """Mean squared causal inner product of parents and their atoms in `geometry` (a CausalGeometry)."""
        literal = self.config.causal_orth_form == "literal"
        metric = torch.linalg.inv(geometry.sigma) if literal else geometry.sigma
        return causal_orthogonality(self.D, self.Up, self.G, metric.to(self.D), self.config.causal_orth_form)

    def project_gradients(self) -> None:
        """Remove from the gradients of D and G what would change a constrained norm at first order."""
        metric = self.norm_metric()
        self.router.project_(metric)
        self.child.project_(metric)


def freeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Freeze D and G; Up and Down stay trainable, so that the causal penalty keeps its gradient."""
    model.freeze({"D", "G"})


def unfreeze_decoder_weights(model: HierarchicalSAE) -> None:
    """Make every tensor trainable again."""
    model.freeze(())
