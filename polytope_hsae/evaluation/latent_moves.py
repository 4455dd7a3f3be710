"""How the latents of a model under test move the residual: by their write directions, or by their codes.

Shapes: M contexts, d residual width, Q latents, k or K slots of a row's codes.
"""

from typing import Literal

import torch
from torch import Tensor

from polytope_hsae.evaluation.concepts import IntArray
from polytope_hsae.evaluation.pushing import Moves
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes
from polytope_hsae.models.hsae import HierarchicalSAE

Level = Literal["parent", "child"]


def directions(sae: SparseAutoencoder, level: Level, latents: IntArray) -> Tensor:
    """Unit write directions [Q, d]: D_p, or A_pc of a child's flat number p * C + c (a flat model: D of a latent)."""
    if level == "parent" or not isinstance(sae, HierarchicalSAE):
        write_Pd = sae.write_directions()
        return write_Pd[torch.as_tensor(latents, device=write_Pd.device)]
    rows_Q = torch.as_tensor(latents, device=sae.D.device)
    atoms_QCd = sae.atoms(rows_Q // sae.n_children).detach()
    atoms_Qd = atoms_QCd[torch.arange(len(rows_Q), device=rows_Q.device), rows_Q % sae.n_children]
    return torch.nn.functional.normalize(atoms_Qd, dim=-1)


@torch.no_grad()
def overrides(sae: SparseAutoencoder, level: Level, latents: IntArray, last_Md: Tensor) -> Moves:
    """Moves h + x_hat(edited codes) - x_hat(codes) that set each latent's code to one value in all contexts.

    `last_Md` is the residual at the hook. What one unit of a code writes is x_hat(codes, it raised by 1) -
    x_hat(codes), by the model's own decoding; alpha is the code's value times that step's length (its median over
    contexts, which differ only where rows are scaled one by one).
    """
    codes = sae.encode(last_Md.to(sae.write_directions().device, torch.float32))
    before_Md = sae.decode(codes)
    children = level == "child" and sae.n_children > 0
    index_Mk, value_Mk = (codes.child_index, codes.child_value) if children else codes[:2]
    steps, offsets = [], []
    for latent in latents.tolist():
        step_Md = sae.decode(_raised(codes, latent, children)) - before_Md
        code_M1 = (value_Mk * (index_Mk == latent)).sum(1, keepdim=True)
        steps.append(step_Md / step_Md.norm(dim=-1).median())
        offsets.append(-code_M1 * step_Md)
    empty = last_Md.new_zeros(0, *last_Md.shape)
    return Moves(*(torch.stack(rows).to(last_Md) if rows else empty for rows in (steps, offsets)))


def _raised(codes: Codes, latent: int, children: bool) -> Codes:
    """The codes with one latent's raised by 1, by a slot of its own: slots of one latent add up."""
    index, value = ("child_index", "child_value") if children else ("parent_index", "parent_value")
    old_index, old_value = getattr(codes, index), getattr(codes, value)
    rows = len(old_index)
    grown_index = torch.cat([old_index, old_index.new_full((rows, 1), latent)], dim=1)
    grown_value = torch.cat([old_value, old_value.new_ones(rows, 1)], dim=1)
    return codes._replace(**{index: grown_index, value: grown_value})
