"""Where the parameters of an H-SAE start: at random, or at a teacher (docs/method.md sections 1 and 4).

Shapes: d residual width, P parents, C children per parent, s subspace width, Q teacher parents.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import HSAEConfig
from ..geometry.bases import dual_rows
from .constraints import row_norms

if TYPE_CHECKING:
    from .hsae import HierarchicalSAE


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


def unit_he_uniform_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """He-uniform rows scaled to unit norm."""
    return torch.nn.functional.normalize(he_uniform_rows(shape, generator), dim=-1)


def random_start(config: HSAEConfig, width: int, seed: int) -> dict[str, nn.Parameter]:
    """All weights by name, tied ones as one parameter; biases are not drawn, they start at 0."""
    P, C, s, d = config.n_parents, config.n_children_per_parent, config.subspace_dim, width
    he, factored = config.initial == "he_uniform", config.children == "factored"
    if factored and s > d:
        raise ValueError(f"hsae.subspace_dim: found {s}, allowed: at most the residual width {d}")
    generator = torch.Generator().manual_seed(seed)
    of_router = he_uniform_rows if he else unit_rows
    of_projector = unit_he_uniform_rows if he else orthonormal_rows
    of_child = unit_he_uniform_rows if he else unit_rows
    inner = s if factored else d
    start = {"D": nn.Parameter(of_router((P, d), generator))}
    if factored:
        start["Up"] = nn.Parameter(of_projector((P, s, d), generator))
    start["G"] = nn.Parameter(of_child((P, C, inner), generator))
    start["E"] = tied(config.use_tied_decoders_parent, start["D"], of_router((P, d), generator))
    if factored:
        start["Down"] = tied(config.tie_projectors, start["Up"], of_projector((P, s, d), generator))
    start["F"] = tied(config.use_tied_decoders_child, start["G"], of_child((P, C, inner), generator))
    return start


def tied(tie: bool | str, decoder: nn.Parameter, independent: Tensor) -> nn.Parameter:
    """The encoder's tensor: the decoder itself (true), a copy of it (init), or its own random one (false)."""
    if tie is True:
        return decoder
    return nn.Parameter(decoder.detach().clone() if tie == "init" else independent)


@torch.no_grad()
def put_teacher(
    model: "HierarchicalSAE",
    parent_vectors: Mapping[str, Tensor],
    child_projectors: Mapping[str, ChildInit],
    geometry: SquareRoots | None = None,
    *,
    seed_parent: bool = True,
    seed_child: bool = True,
    seed_projectors: bool = True,
) -> None:
    """Put a teacher into the first Q parents, in the order of `parent_vectors`; the others stay as they are.

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
    if model.n_parents < Q:
        raise ValueError(f"hsae.n_parents: found {model.n_parents}, allowed: at least the teacher's {Q} parents")
    if set(parent_vectors) != set(child_projectors):
        odd = sorted(set(parent_vectors) ^ set(child_projectors))
        raise ValueError(f"teacher: found {odd} in one of parent_vectors and child_projectors, allowed: equal names")
    if geometry is not None and seed_parent and model.E is model.D:
        raise ValueError(
            "hsae.use_tied_decoders_parent: found true, allowed: false or init (dual reads and writes apart)"
        )
    unified = torch.stack(list(parent_vectors.values())).double()
    if geometry is None:
        read = write = torch.nn.functional.normalize(unified, dim=1)
    else:
        read, write = dual_rows(unified, geometry.sigma_sqrt.to(unified), geometry.sigma_inv_sqrt.to(unified))
    if seed_parent:
        model.E[:Q], model.D[:Q] = read.to(model.E), write.to(model.D)
        if model.b_E is not None:
            model.b_E[:Q] = 0
    for row, name in enumerate(parent_vectors):
        child = child_projectors[name]
        if seed_projectors and model.Down is not None:
            model.Down[row] = child.down.to(model.Down)
        if seed_projectors and model.Up is not None:
            model.Up[row] = child.up.to(model.Up)
        if seed_child:
            n = min(len(child.G), model.n_children)
            model.F[row, :n] = (child.F[:n] @ child.down if model.Down is None else child.F[:n]).to(model.F)
            model.G[row, :n] = (child.G[:n] @ child.up if model.Up is None else child.G[:n]).to(model.G)
    _scale_readers(model, Q if seed_parent else 0, Q if seed_child or seed_projectors else 0)
    model.normalize_decoder_weights()


def _scale_readers(model: "HierarchicalSAE", n_parents: int, n_subspaces: int) -> None:
    """Scale E's and F's first rows by what normalising D and G will divide by: E_p.D_p and F_pc.G_pc stay."""
    if not model.config.normalize_decoder:
        return
    if model.E is not model.D:
        model.E[:n_parents] *= row_norms(model.D[:n_parents], model.norm_metric())
    if model.F is not model.G:
        model.F[:n_subspaces] *= model.child.norms(model.norm_metric())[:n_subspaces]
