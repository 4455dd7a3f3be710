"""Dead parents put to use again: half of a crowded one, or what the model rebuilds worst (docs/method.md section 2).

Shapes: B rows, d width, P parents, C children, n parents that change.
"""

import torch
from torch import Tensor

from .codes import load
from .hsae import HierarchicalSAE

SPLIT = 0.1  # the opposite perturbations of a split parent's two halves, as a share of the rows' norms


@torch.no_grad()
def recycle(
    model: HierarchicalSAE,
    h_Bd: Tensor,
    dead_P: Tensor,
    free_P: Tensor,
    split_above: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Give every dead parent something to do; the numbers of all parents that changed [n].

    Parents that are active in more than `split_above` of the raw rows come first, most crowded first: each is copied
    into a dead parent. The dead ones that are left start at the errors of the rows that are rebuilt worst. Only `free`
    parents change. This waits for the device.
    """
    with model.in_eval_mode():
        output = model(h_Bd)
    dead = (dead_P & free_P).nonzero().flatten().tolist()
    share_P = (
        load(output.codes.parent_index, output.codes.parent_value, model.n_parents) / max(1, len(h_Bd))
    ).masked_fill(dead_P | ~free_P, 0)
    order = share_P.argsort(descending=True, stable=True).tolist()
    crowded = order[: int((share_P > split_above).sum())] if split_above is not None else []
    pairs = list(zip(crowded, dead, strict=False))
    for crowded_p, dead_p in pairs:
        _split(model, crowded_p, dead_p, generator)
    left = dead[len(pairs) :]
    error_Bd = output.x - output.x_hat
    worst = error_Bd.square().sum(1).topk(min(len(left), len(error_Bd))).indices
    fresh = torch.tensor(left[: len(worst)], dtype=torch.int64, device=h_Bd.device)
    _restart(model, fresh, error_Bd[worst], ~dead_P)
    model.normalize_decoder_weights()
    return torch.cat([torch.tensor(pairs, dtype=torch.int64, device=h_Bd.device).flatten(), fresh])


def _split(model: HierarchicalSAE, p: int, q: int, generator: torch.Generator) -> None:
    """Make q a copy of p, E and D moved apart; children with odd numbers move to q, which gives p its own for them."""
    tensors = {id(tensor): (name, tensor) for name, tensor in model.tensors().items() if name != "b_dec"}
    if model.child_balance is not None:
        model.child_balance[q] = 0
        tensors[id(model.child_balance)] = ("child_balance", model.child_balance)
    direction_d = torch.randn(model.width, generator=generator, device=model.D.device).to(model.D)
    for name, tensor in tensors.values():
        if name in ("F", "b_F", "G", "child_balance"):
            tensor[p, 1::2], tensor[q, 1::2] = tensor[q, 1::2].clone(), tensor[p, 1::2].clone()
            continue
        tensor[q] = tensor[p]
        if name in ("E", "D"):
            step_d = SPLIT * tensor[p].norm() * direction_d / direction_d.norm()
            tensor[p] += step_d
            tensor[q] -= step_d
    if model.balance is not None:
        model.balance[q] = model.balance[p]


def _restart(model: HierarchicalSAE, parent_n: Tensor, error_nd: Tensor, alive_P: Tensor) -> None:
    """E and D at the errors' directions, E with the mean norm of the parents in use; no biases; children stay."""
    unit_nd = torch.nn.functional.normalize(error_nd, dim=1)
    norms_P = model.E.norm(dim=1)
    size = (norms_P * alive_P).sum() / alive_P.sum().clamp_min(1)
    model.D[parent_n] = unit_nd
    if model.E is not model.D:
        model.E[parent_n] = size * unit_nd
    if model.b_E is not None:
        model.b_E[parent_n] = 0
    if model.balance is not None:
        model.balance[parent_n] = 0
    if model.child_balance is not None:
        model.child_balance[parent_n] = 0
