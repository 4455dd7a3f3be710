"""Subspaces of a parent's differences, and the projectors and child rows that come from them (docs/method.md
§4).

Shape suffixes: Q parents, R children (rows over all parents), K children of one parent, C children per parent
in the model, d residual width, s subspace width, n and m any number of rows. Vectors are in the unified
coordinate.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Projectors(NamedTuple):
    """Initial values of a model's child part; every atom Up^T G has Euclidean length 1 and F . G = 1."""

    down: Tensor
    """[Q, s, d] reads the subspace; down up^T = I."""
    up: Tensor
    """[Q, s, d] writes it."""
    child_encoder: Tensor
    """F [Q, C, s]."""
    child_decoder: Tensor
    """G [Q, C, s]."""
    seeded: Tensor
    """[Q, C] bool: the children that come from the teacher; the rest are an orthogonal completion."""


def seeded_generator(purpose: str, seed: int) -> torch.Generator:
    """A generator of its own for every purpose."""
    # With one stream for all, a random teacher that is turned at random would be turned toward itself.
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose}:{seed}".encode()))


def subspace_bases(
    parents_Qd: Tensor,
    deltas_Rd: Tensor,
    child_parent: Sequence[int],
    subspace_dim: int,
    energy: float,
    seed: int,
) -> Tensor:
    """Orthonormal bases B [Q, s, d] (unified) of each parent's differences (docs/method.md §4).

    The leading right singular vectors of the differences, as many (at most s) as hold `energy` of the summed
    squared singular values, then seeded random directions orthogonal to those and to l_p. Raises ValueError
    when s or energy is out of range.
    """
    width = parents_Qd.shape[1]
    if not 1 <= subspace_dim <= width - 1:
        raise ValueError(f"subspace_dim: found {subspace_dim}, allowed: 1 to {width - 1} (width - 1)")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy: found {energy}, allowed: above 0, at most 1")
    generator = seeded_generator("bases", seed)
    owner_R = torch.tensor(list(child_parent), dtype=torch.int64)
    bases = []
    for row, parent_d in enumerate(parents_Qd):
        kept_rd = _leading_directions(deltas_Rd[(owner_R == row).to(deltas_Rd.device)], subspace_dim, energy)
        fresh = torch.randn(subspace_dim - len(kept_rd), width, generator=generator, dtype=torch.float64)
        bases.append(torch.cat([kept_rd, orthogonal_to(fresh.to(kept_rd), torch.cat([kept_rd, parent_d[None]]))]))
    return torch.stack(bases)


def _leading_directions(deltas_Kd: Tensor, at_most: int, energy: float) -> Tensor:
    if not len(deltas_Kd) or not deltas_Kd.any():
        return deltas_Kd[:0]
    _, values, directions = torch.linalg.svd(deltas_Kd, full_matrices=False)
    # Directions at rounding level are not differences: energy 1.0 keeps the rank, not the noise below it.
    rank = int((values > values[0] * 1e-10).sum())
    share = values.square().cumsum(0) / values.square().sum()
    wanted = int((share < energy - 1e-12).sum()) + 1
    return directions[: min(wanted, rank, at_most)]


def orthogonal_to(fresh_nd: Tensor, taken_md: Tensor) -> Tensor:
    """Orthonormal rows [n, d] in the span of `fresh_nd` after removing the span of `taken_md` (need not be
    orthonormal).

    n plus the rank of `taken_md` must not exceed d.
    """
    if not len(fresh_nd):
        return fresh_nd
    if len(taken_md):
        _, values, basis = torch.linalg.svd(taken_md, full_matrices=False)
        basis = basis[values > values[0].clamp_min(1e-300) * 1e-10]
        for _ in range(2):  # the second pass removes what rounding left of the first
            fresh_nd = fresh_nd - fresh_nd @ basis.T @ basis
    return torch.linalg.qr(fresh_nd.T)[0].T


def completion(given_Ks: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n random unit rows [n, s], orthogonal to the given ones and to each other while the subspace has
    room."""
    width = given_Ks.shape[1]
    rank = int(torch.linalg.matrix_rank(given_Ks)) if len(given_Ks) else 0
    fresh_ns = torch.randn(n, width, generator=generator, dtype=torch.float64)
    room = min(n, width - rank)
    free_ns = torch.nn.functional.normalize(fresh_ns[room:], dim=-1)
    return torch.cat([orthogonal_to(fresh_ns[:room], given_Ks), free_ns])


def rotated_rows(rows_nd: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Rows [n, d] turned by `degrees`, each toward its own random orthogonal direction; lengths are kept."""
    lengths_n1 = rows_nd.norm(dim=-1, keepdim=True)
    along_nd = torch.nn.functional.normalize(rows_nd, dim=-1)
    across_nd = torch.randn(rows_nd.shape, generator=generator, dtype=torch.float64)
    across_nd = across_nd - (across_nd * along_nd).sum(-1, keepdim=True) * along_nd
    across_nd = torch.nn.functional.normalize(across_nd, dim=-1)
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return lengths_n1 * (angle.cos() * along_nd + angle.sin() * across_nd)


def rotated_together(rows_nd: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Rows [n, d] turned by one rotation that turns every vector by `degrees`: lengths and inner products stay.

    cos I + sin J, where J turns every vector by a right angle: in random orthonormal coordinates it takes each of the
    first d/2 axes to one of the others, and that to minus the first. Raises ValueError where d is odd: there is none.
    """
    d = rows_nd.shape[1]
    if d % 2:
        raise ValueError(f"teacher.rotate_deg: found rows of width {d}, allowed: an even width, or noise_deg")
    axes_dd = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    first_nh, second_nh = (rows_nd @ axes_dd).split(d // 2, dim=1)
    turned_nd = torch.cat([-second_nh, first_nh], dim=1) @ axes_dd.T
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return angle.cos() * rows_nd + angle.sin() * turned_nd


def dual_rows(unified_nd: Tensor, sqrt_dd: Tensor, inv_sqrt_dd: Tensor) -> tuple[Tensor, Tensor]:
    """Read and write rows (E, D) [n, d] of unified concepts l (docs/method.md §4).

    With n = |Sigma^(-1/2) l|: D = Sigma^(-1/2) l / n (unit) and E = Sigma^(1/2) l n / |l|^2, so that E . D =
    1.
    """
    write_nd = unified_nd @ inv_sqrt_dd
    norm_n1 = write_nd.norm(dim=-1, keepdim=True)
    read_nd = unified_nd @ sqrt_dd * norm_n1 / unified_nd.square().sum(-1, keepdim=True)
    return read_nd, write_nd / norm_n1
