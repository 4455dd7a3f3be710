"""The model of docs/method.md section 1 with dense masks, which gradients are compared with."""

import torch
from models import WIDTH, total

from polytope_hsae.config import LossOverrides

LOSSES = {
    "top_level_beta": 0.3,
    "l1_parent": 0.05,
    "l1_child": 0.07,
    "biorth_lambda": 0.02,
    "causal_ortho_lambda": 0.4,
}


def dense_soft_mask(logits, mask, temperature):
    soft = torch.softmax(logits / temperature, dim=1) * mask
    return soft if mask[0].sum() == 1 else soft / soft.sum(1, keepdim=True)


def copied_tensors(model):
    """The model's tensors as leaves of their own; tied ones stay one leaf."""
    copies = {}
    return {name: copies.setdefault(id(t), t.detach().clone().requires_grad_()) for name, t in model.tensors().items()}


def largest(scores, n):
    """Numbers of the n largest entries of a list, in falling order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:n]


def of_batch(scores, n):
    """1 at the n largest positive entries of all."""
    mask = torch.zeros(scores.numel(), dtype=torch.float64)
    mask[largest(scores.flatten().tolist(), n)] = 1.0
    return mask.view_as(scores) * (scores > 0)


def dense_atoms(t):
    return torch.einsum("pcs,psd->pcd", t["G"], t["Up"]) if "Up" in t else t["G"]


def dense_forward(t, config, x, temperature):
    """(x_hat, x_hat_top, a [B, P], c [B, P, C])."""
    B, P, C = len(x), config.n_parents, config.n_children_per_parent
    centred = x - t["b_dec"] if "b_dec" in t else x
    r = centred @ t["E"].T + t["b_E"]
    mask = torch.zeros(B, P, dtype=torch.float64)
    for i in range(B):
        mask[i, largest(r[i].tolist(), config.topk_parent)] = 1.0
    if config.parent_budget != "per_row":
        mask = of_batch(r, B * config.topk_parent)
    gate = mask
    if config.gate == "straight_through":
        soft = dense_soft_mask(r, mask, temperature)
        gate = mask + soft - soft.detach()
    a = gate * (torch.relu(r) if config.magnitude == "relu" else torch.ones_like(r))
    top = a @ t["D"]
    child_input = centred
    if config.child_input == "residual":
        child_input = centred - top
    reads = torch.einsum("pcs,psd->pcd", t["F"], t["Down"]) if "Down" in t else t["F"]
    q = torch.einsum("bd,pcd->bpc", child_input, reads) + t["b_F"]
    child_mask = torch.zeros(B, P, C, dtype=torch.float64)
    if config.child_budget == "batch":
        child_mask = of_batch(q * (mask * a > 0).unsqueeze(2), B * config.active_children)
    for i in range(B if config.child_budget != "batch" else 0):
        routed = [p for p in range(P) if mask[i, p] > 0 and a[i, p] > 0]
        if config.child_budget == "per_parent":
            for p in routed:
                child_mask[i, p, largest(q[i, p].tolist(), config.topk_child)] = 1.0
        else:
            pairs = [(p, j) for p in routed for j in range(C)]
            for n in largest([q[i, p, j].item() for p, j in pairs], config.active_children):
                child_mask[i, pairs[n][0], pairs[n][1]] = 1.0
    c = child_mask * (torch.relu(q) if config.magnitude == "relu" else torch.ones_like(q))
    atoms = dense_atoms(t)
    base = t["b_dec"] if "b_dec" in t else torch.zeros(x.shape[1], dtype=torch.float64)
    return base + top + torch.einsum("bpc,pcd->bd", c, atoms), base + top, a, c


def dense_loss(t, config, x, temperature, sigma):
    x_hat, x_top, a, c = dense_forward(t, config, x, temperature)
    B, d = x.shape
    per = d if config.recon_reduction == "mean" else 1
    loss = ((x - x_hat) ** 2).sum() / B / per + config.top_level_beta * ((x - x_top) ** 2).sum() / B / per
    loss = loss + (config.l1_parent * a.sum() + config.l1_child * c.sum()) / B
    for read, write in ((t["E"][None], t["D"][None]), (t["F"], t["G"])):
        n = read.shape[1]
        if config.use_offdiag_biorth:
            unit = [rows / rows.norm(dim=-1, keepdim=True) for rows in (read, write)]
            product = unit[0] @ unit[1].mT
            off = product[:, ~torch.eye(n, dtype=torch.bool)]
            loss = loss + config.biorth_lambda * (off**2).mean()
        else:
            loss = loss + config.biorth_lambda * ((read @ write.mT - torch.eye(n, dtype=torch.float64)) ** 2).sum()
    inner = [
        t["D"][p] @ sigma @ dense_atoms(t)[p, j]
        for p in range(config.n_parents)
        for j in range(config.n_children_per_parent)
    ]
    return loss + config.causal_ortho_lambda * torch.stack([v**2 for v in inner]).mean()


def assert_dense(model, x, sigma=None):
    """Loss and all gradients equal those of the dense implementation."""
    sigma = torch.eye(WIDTH, dtype=torch.float64) if sigma is None else sigma
    mine = total(model.loss_terms(model(x), LossOverrides()))
    copies = copied_tensors(model)
    theirs = dense_loss(copies, model.config, x, model.router_temperature, sigma)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    mine.backward()
    theirs.backward()
    for name, tensor in model.tensors().items():
        got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        expected = torch.zeros_like(tensor) if copies[name].grad is None else copies[name].grad
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
