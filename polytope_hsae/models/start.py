"""Where the parameters of an H-SAE start: at random, in the data or at a teacher (docs/method.md sections 1 and 4).

Shapes: N sampled rows, k active parents, M pairs of a row and an active parent, n of them with one parent, d residual
width, P parents, C children per parent, s subspace width, Q teacher parents.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..geometry.bases import dual_rows
from .constraints import row_norms

if TYPE_CHECKING:
    from .hsae import HierarchicalSAE

START_ROWS = 32_768  # sampled rows that a start from data reads at most
ROWS_OF_PARENT = 512  # of them, those that one parent's children are made of, at most
CLUSTER_STEPS = 10


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


class RandomStart:
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


def tied(tie: bool | str, decoder: Tensor, independent: Tensor) -> nn.Parameter:
    """The encoder's tensor: the decoder itself (true), a copy of it (init), or its own random one (false)."""
    if tie is True and isinstance(decoder, nn.Parameter):
        return decoder
    return nn.Parameter(decoder.detach().clone() if tie == "init" else independent)


@torch.no_grad()
def start_from_rows(model: "HierarchicalSAE", batches: Iterable[Tensor]) -> None:
    """Start the router and the children at normalised rows [B, d], where the config asks for it."""
    if model.config.initial_router == model.config.initial_children == "random":
        return
    taken, left = [], START_ROWS
    for x_Bd in batches:
        taken.append(x_Bd[:left])
        left -= len(taken[-1])
        if left == 0:
            break
    rows_Nd = torch.cat(taken) if model.b_dec is None else torch.cat(taken) - model.b_dec
    if model.config.initial_router == "rows":
        _router_from_rows(model, rows_Nd)
    if model.config.initial_children == "data":
        _children_from_rows(model, rows_Nd)


def _router_from_rows(model: "HierarchicalSAE", rows_Nd: Tensor) -> None:
    """E_p = D_p = every (N / P)-th row, at unit norm; where there are fewer rows than parents the last stay random."""
    rows_Nd = rows_Nd[rows_Nd.norm(dim=1) > 0]
    n = min(len(rows_Nd), model.n_parents)
    picked_n = torch.arange(n, device=rows_Nd.device) * len(rows_Nd) // max(1, n)
    model.D[:n] = torch.nn.functional.normalize(rows_Nd[picked_n], dim=1)
    model.normalize_decoder_weights()
    model.E[:n] = model.D[:n]


def _children_from_rows(model: "HierarchicalSAE", rows_Nd: Tensor) -> None:
    """Each parent's subspace is spanned by the principal directions of x' - a D_p, its children by centres of those."""
    with model.in_eval_mode():
        chosen = [model.encode_parent(part_Bd)[:2] for part_Bd in rows_Nd.split(4096)]
    parent_Nk, code_Nk = (torch.cat(part) for part in zip(*chosen, strict=True))
    row_M, slot_M = (code_Nk > 0).nonzero(as_tuple=True)
    parent_M, order_M = parent_Nk[row_M, slot_M].sort(stable=True)
    row_M, slot_M = row_M[order_M], slot_M[order_M]
    counts = torch.bincount(parent_M, minlength=model.n_parents).tolist()
    for p, (row_n, slot_n) in enumerate(zip(row_M.split(counts), slot_M.split(counts), strict=True)):
        row_n, slot_n = row_n[:ROWS_OF_PARENT], slot_n[:ROWS_OF_PARENT]
        left_nd = rows_Nd[row_n] - code_Nk[row_n, slot_n, None] * model.D[p]
        if model.Up is None:
            model.G[p] = centres(left_nd, model.G[p])
        else:
            model.Up[p] = principal_rows(left_nd, model.Up[p])
            model.G[p] = centres(left_nd @ model.Up[p].T, model.G[p])
        if model.Down is not None and model.Up is not None:
            model.Down[p] = model.Up[p]
        model.F[p] = model.G[p] if model.config.child_encoder == model.config.child_decoder else model.atoms(p)
    model.normalize_decoder_weights()


def principal_rows(rows_nd: Tensor, spare_sd: Tensor) -> Tensor:
    """The s first principal directions of rows, orthonormal, completed from `spare` where they are fewer: [s, d]."""
    _, size, direction_rd = torch.linalg.svd(rows_nd, full_matrices=False)
    known = int((size > 1e-6 * size[:1]).sum())
    candidates = torch.cat([direction_rd[: min(known, len(spare_sd))], spare_sd])
    return torch.linalg.qr(candidates.T).Q.T[: len(spare_sd)]


def centres(rows_ns: Tensor, spare_Cs: Tensor) -> Tensor:
    """C unit directions that rows point to, by spherical k-means; where rows are fewer, the last ones of `spare`."""
    rows_ns = rows_ns[rows_ns.norm(dim=1) > 0]  # a row that started the parent leaves nothing
    C, n = len(spare_Cs), len(rows_ns)
    found_Cs = torch.nn.functional.normalize(spare_Cs, dim=1)
    first = min(n, C)
    picked = torch.arange(first, device=rows_ns.device) * n // max(1, first)
    found_Cs[:first] = torch.nn.functional.normalize(rows_ns[picked], dim=1)
    for _ in range(CLUSTER_STEPS if n > C else 0):
        nearest_n = (rows_ns @ found_Cs.T).argmax(dim=1)
        sums_Cs = torch.zeros_like(found_Cs).index_add_(0, nearest_n, rows_ns)
        new_Cs = torch.nn.functional.normalize(sums_Cs, dim=1)
        found_Cs = torch.where(new_Cs.norm(dim=1, keepdim=True) > 0.5, new_Cs, found_Cs)  # empty ones stay
    return found_Cs


@torch.no_grad()
def put_teacher(
    model: "HierarchicalSAE",
    parent_vectors: Mapping[str, Tensor],
    child_projectors: Mapping[str, ChildInit],
    geometry: SquareRoots | None,
    seed_parent: bool,
    seed_child: bool,
    seed_projectors: bool,
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
        model.F[:n_subspaces] *= model.child_norms()[:n_subspaces]
