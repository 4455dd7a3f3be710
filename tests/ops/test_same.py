"""Every operation, every output and every gradient: naive, cpu and kernels alike equal a formula in float64."""

import pytest
import torch
from common import BACKENDS, assert_close, leaf, normal, parents
from torch.utils._python_dispatch import TorchDispatchMode

from polytope_hsae.ops import CPU, Children, Routing, Rows
from polytope_hsae.ops.routed.cpu import composes

backends = pytest.mark.parametrize("backend", BACKENDS)
B, k, P, C, s, d = 23, 3, 7, 5, 4, 37


class Both:
    """float64 tensors, and their float32 copies for a backend: `of` gives the copy of a tensor."""

    def __init__(self, backend, *tensors):
        self.ops, self.device = BACKENDS[backend]
        self.tensors = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
        self.copies = {id(tensor): leaf(tensor, self.device) for tensor in self.tensors}

    def of(self, tensor):
        if tensor is None or id(tensor) in self.copies:
            return None if tensor is None else self.copies[id(tensor)]
        return tensor.float().to(self.device) if tensor.is_floating_point() else tensor.to(self.device)

    def check(self, found, expected, tolerance=2e-5, masks=None):
        """Outputs, and the gradients of a weighted sum of them; masks: by tensor, the entries whose gradient counts."""
        losses = [0.0, 0.0]
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_close(mine, theirs, tolerance)
            weight = normal(*theirs.shape, seed=number + 1)
            losses[0] = losses[0] + (mine * weight.float().to(self.device)).sum()
            losses[1] = losses[1] + (theirs * weight).sum()
        mine = torch.autograd.grad(losses[0], [self.copies[id(t)] for t in self.tensors])
        theirs = torch.autograd.grad(losses[1], self.tensors)
        for tensor, a, b in zip(self.tensors, mine, theirs, strict=True):
            mask = (masks or {}).get(id(tensor))
            assert_close(a if mask is None else a.cpu() * mask, b if mask is None else b * mask, 2 * tolerance)


@backends
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", ["rms", "unit_row", "none"])
def test_enter_and_the_gradient_of_its_bias(backend, normalize, bias):
    h, mean, b, scale, E = normal(d, B).T, normal(d), normal(d, seed=1), torch.tensor(1.7), normal(P, d)
    both = Both(backend, b if bias else None, E)
    x = {"rms": (h - mean) / scale, "unit_row": h / (h.norm(dim=1, keepdim=True) + 1e-6), "none": h}[normalize]
    found, rows, norm = both.ops.enter(
        both.of(h), normalize, both.of(mean), both.of(scale), both.of(b) if bias else None
    )
    assert_close(found, x, 1e-6)
    assert_close(rows.values, x - b if bias else x, 1e-6)
    assert (norm is None) == (normalize != "unit_row")
    if norm is not None:
        assert_close(norm, h.norm(dim=1) + 1e-6, 1e-6)
    logits = ((x - b) if bias else x) @ E.T
    chosen = both.ops.route(rows, both.of(E), None, P)
    both.check([chosen.logit], [logits.gather(1, chosen.indices.cpu())])


@backends
def test_rows_that_ask_for_a_gradient_get_it_through_enter(backend):
    h, b = normal(B, d), normal(d)
    both = Both(backend, h, b)
    x, rows, _ = both.ops.enter(both.of(h), "unit_row", both.of(normal(d)), both.of(torch.tensor(1.0)), both.of(b))
    expected = h / (h.norm(dim=1, keepdim=True) + 1e-6)
    both.check([x, rows.values], [expected, expected - b])


@backends
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])  # of the logits that a gradient reaches
@pytest.mark.parametrize("biased", [False, True])
def test_linear(backend, share, biased):
    x, weight, b = normal(30, d), normal(40, d), normal(40)
    on = torch.rand(30, 40, generator=torch.Generator().manual_seed(5)) < share
    both = Both(backend, x, weight, b if biased else None)
    found = both.ops.linear(Rows(both.of(x)), both.of(weight), both.of(b) if biased else None)
    expected = x @ weight.T + (b if biased else 0)
    assert_close(found, expected, 2e-5)
    both.check([found.where(on.to(found.device), 0.0)], [expected.where(on, 0.0)])


@backends
@pytest.mark.parametrize("sum_codes", [False, True])
@pytest.mark.parametrize("by_code", [False, True])
@pytest.mark.parametrize("noisy,biased", [(False, False), (True, False), (False, True), (True, True)])
def test_route(backend, noisy, biased, by_code, sum_codes):
    x, E, b_E = normal(B, d), normal(40, d), normal(40)
    noise, bias = normal(B, 40, seed=2), 3 * normal(40, seed=3)
    threshold = torch.tensor(0.3, dtype=torch.float64) if by_code else None
    both = Both(backend, x, E, b_E)
    logits = x @ E.T + b_E
    codes = torch.relu(logits) if threshold is None else torch.where(logits >= threshold, logits, 0.0)
    choice = codes if by_code else logits
    choice = choice + (noise if noisy else 0) + (torch.where(logits > 0, bias, 0.0) if biased else 0)
    indices = torch.sort(choice, dim=1, descending=True, stable=True).indices[:, :4]
    found = both.ops.route(
        Rows(both.of(x)), both.of(E), both.of(b_E), 4, bias=both.of(bias) if biased else None,
        noise=(lambda of_logits: noise.float().to(of_logits)) if noisy else None,
        threshold=both.of(threshold), sum_codes=sum_codes,
    )  # fmt: skip
    assert torch.equal(found.indices.cpu(), indices)
    assert_close(found.logits, logits, 2e-5)
    assert not found.logits.requires_grad
    assert (found.code_sum is None) == (not sum_codes)
    sums = ([found.code_sum], [codes.sum(1)]) if sum_codes else ([], [])
    both.check([found.logit, *sums[0]], [logits.gather(1, indices), *sums[1]])


@backends
def test_route_takes_the_first_of_equal_codes(backend):
    ops, device = BACKENDS[backend]
    E = torch.eye(8, device=device)
    rows = torch.tensor([[0.1, 0.9, 0.1, 0.9, 0.0, 0.0, 0.0, 0.2]], device=device)
    found = ops.route(Rows(rows), E, None, 5, threshold=torch.tensor(0.5, device=device))
    assert found.indices.tolist() == [[1, 3, 0, 2, 4]]


@backends
@pytest.mark.parametrize("partial", [False, True])
def test_decode(backend, partial):
    index, value, D = parents(B, k, P, repeated=True), normal(B, k), normal(P, d)
    used = normal(B, k, seed=1) > 0 if partial else None
    value = value if used is None else value * used
    both = Both(backend, value, D)
    found = both.ops.decode(Routing(both.of(index), P, both.of(used) if partial else None), both.of(value), both.of(D))
    expected = torch.einsum("bk,bkd->bd", value, D[index])
    both.check([found], [expected], masks={} if used is None else {id(value): used})


@backends
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("width", ["direct", "factored", "many rows"])
def test_encode_children(backend, width, partial):
    rows = 60 if width == "many rows" else B  # where all atoms of width d are made first on a CPU
    index, x, b_F = parents(rows, k, P), normal(rows, d), normal(P, C)
    inner = 6 if width == "many rows" else s
    F, Down = (normal(P, C, d), None) if width == "direct" else (normal(P, C, inner), normal(P, inner, d))
    used = normal(rows, k, seed=1) > 0 if partial else None
    both = Both(backend, x, F, b_F, Down)
    routes = Routing(both.of(index), P, None if used is None else both.of(used))
    found = both.ops.encode_children(Rows(both.of(x)), routes, both.of(F), both.of(b_F), both.of(Down))
    read = F if Down is None else F @ Down
    expected = torch.einsum("bd,bkcd->bkc", x, read[index]) + b_F[index]
    if used is not None:
        open_BkC = used.unsqueeze(2).expand(-1, -1, C)
        assert not found.detach().cpu()[~open_BkC].any()
        found, expected = found.where(open_BkC.to(found.device), 0.0), expected.where(open_BkC, 0.0)
    both.check([found], [expected])


@backends
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("K", [1, 4])
def test_decode_children(backend, K, factored):
    index, value = torch.stack([torch.randperm(P * C)[:K] for _ in range(B)]), normal(B, K)
    G, Up = (normal(P, C, s), normal(P, s, d)) if factored else (normal(P, C, d), None)
    both = Both(backend, value, G, Up)
    found = both.ops.decode_children(both.of(index), both.of(value), both.of(G), both.of(Up))
    atoms = (G if Up is None else G @ Up).flatten(0, 1)
    both.check([found], [torch.einsum("bk,bkd->bd", value, atoms[index])])


@backends
@pytest.mark.parametrize("differentiates", ["errors", "everything"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_reconstruct(backend, factored, given, differentiates):
    index, place = parents(B, k, P), torch.stack([torch.randperm(k * C)[:4] for _ in range(B)])
    numbers = index.gather(1, place // C) * C + place % C
    x, value, codes, b_dec, top = normal(B, d), normal(B, k), normal(B, 4), normal(d), normal(B, d, seed=2)
    G, Up = (normal(P, C, s), normal(P, s, d)) if factored else (normal(P, C, d), None)
    D, every = normal(P, d, seed=1), differentiates == "everything"
    learned = [top, codes, G, Up] if given else [value, D, b_dec, codes, G, Up]
    both = Both(backend, *learned, x if every else None)
    found = both.ops.reconstruct(
        both.of(x), both.of(top) if given else None, Routing(both.of(index), P), both.of(value),
        Children(both.of(numbers), both.of(place), both.of(codes)), both.of(D), both.of(b_dec), both.of(G), both.of(Up),
    )  # fmt: skip
    base = top if given else torch.einsum("bk,bkd->bd", value, D[index]) + b_dec
    atoms = (G if Up is None else G @ Up).flatten(0, 1)
    x_hat = base + torch.einsum("bk,bkd->bd", codes, atoms[numbers])
    expected = [x_hat, base, (x - x_hat).square().sum(1), (x - base).square().sum(1)]
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, 2e-5)
    both.check(found if every else found[2:], expected if every else expected[2:])


@backends
@pytest.mark.parametrize("n,slots", [(33, 2), (1, 7), (20, 64)])
def test_gate(backend, n, slots):
    logit, both = normal(n, slots), None
    both = Both(backend, logit)
    soft = torch.softmax(logit / 0.7, dim=1)
    both.check([both.ops.gate(both.of(logit), 0.7)], [torch.relu(logit) * (1 + soft - soft.detach())], 1e-5)


@backends
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_l1(backend, threshold):
    pre = normal(9, 35, 20)
    both, slope = Both(backend, pre), 0.0 if threshold is None else 0.01
    level = None if threshold is None else torch.tensor(threshold)
    expected = torch.where(pre >= (threshold or 0.0), pre, slope * pre).abs().sum((1, 2))
    both.check([both.ops.l1(both.of(pre), both.of(level), slope)], [expected])


@backends
@pytest.mark.parametrize("shape", [(40, 24), (10, 24), (3, 5, 90)])
def test_products_of_all_rows(backend, shape):
    E, D = normal(*shape), normal(*shape, seed=3)
    both = Both(backend, E, D)
    both.check([both.ops.cross(both.of(E), both.of(D))], [torch.einsum("...nd,...md->...nm", E, D)])


@backends
@pytest.mark.parametrize("n", [40, 10, 1])
def test_the_published_orthogonality(backend, n):
    E, D = normal(n, 24), normal(n, 24, seed=3)
    both = Both(backend, E, D)
    unit_E, unit_D = (rows / (rows.norm(dim=1, keepdim=True) + 1e-6) for rows in (E, D))
    M = unit_D @ unit_E.T
    off = M - M.diagonal()[None, :].expand_as(M)
    found = both.ops.biorth_jax(both.of(E), both.of(D))
    if n == 1:
        assert found == 0
    else:
        both.check([found], [off.square().sum().sqrt() / (n * n - n)], 5e-5)


@backends
@pytest.mark.parametrize("shape", [(11, 4), (5, 3, 24), (11, 2304)])
def test_row_operations(backend, shape):
    a, b = normal(*shape), normal(*shape, seed=1)
    both = Both(backend)
    mine = both.of(a)
    both.ops.project_out_(mine, both.of(b))
    assert_close(mine, a - (a * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True) * b, 1e-5)
    mine = both.of(a)
    both.ops.normalize_rows_(mine)
    assert_close(mine, a / a.norm(dim=-1, keepdim=True), 1e-5)
    strided = both.of(a).transpose(-1, -2)  # not contiguous
    both.ops.normalize_rows_(strided)
    assert_close(strided, a.mT / a.mT.norm(dim=-1, keepdim=True), 1e-5)


@backends
@pytest.mark.parametrize("of_x", [False, True])
def test_squared_error(backend, of_x):
    x, y = normal(B, d), normal(B, d, seed=1)
    both = Both(backend, y, x if of_x else None)
    both.check([both.ops.squared_error(both.of(x), both.of(y))], [(x - y).square().sum(1)])


@backends
def test_no_rows(backend):
    ops, device = BACKENDS[backend]
    none = torch.zeros(0, 2, dtype=torch.int64, device=device)
    empty, codes = torch.zeros(0, 8, device=device), torch.zeros(0, 2, device=device)
    Down, F, D = (normal(*shape).float().to(device) for shape in ((4, 3, 8), (4, 5, 3), (4, 8)))
    routes = Routing(none, 4)
    assert ops.route(Rows(empty), D, None, 2).indices.shape == (0, 2)
    assert ops.encode_children(Rows(empty), routes, F, None, Down).shape == (0, 2, 5)
    assert ops.decode(routes, codes, D).shape == (0, 8)
    assert ops.decode_children(none, codes, F, Down).shape == (0, 8)
    found = ops.reconstruct(empty, None, routes, codes, Children(none, none, codes), D, None, F, Down)
    assert [tuple(part.shape) for part in found] == [(0, 8), (0, 8), (0,), (0,)]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor of the work inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("C, s", [(4, 8), (8, 4)])  # atoms made first; through the subspaces
def test_no_tensor_grows_with_rows_and_width_and_slots_together(C, s):
    B, k, P, d = 64, 8, 16, 256
    assert composes(B * k, P, C, s) == (s >= C)
    shapes = (B, d), (P, s, d), (P, C, s), (P, s, d), (P, C, s), (P, C)
    x, Down, F, Up, G, b_F = (normal(*shape).requires_grad_() for shape in shapes)
    parent = parents(B, k, P)
    with Largest() as largest:
        pre = CPU.encode_children(Rows(x), Routing(parent, P), F, b_F, Down)
        value, place = pre.flatten(1).topk(k, dim=1)
        index = (parent.unsqueeze(2) * C + torch.arange(C)).flatten(1).gather(1, place)
        CPU.decode_children(index, value, G, Up).square().sum().backward()
    assert largest.numbers <= P * max(C, s) * d < B * k * d
