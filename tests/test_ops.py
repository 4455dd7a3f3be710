"""The Triton kernels against float64: on a CUDA device, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import copy
import os

import pytest
import torch
from factored import factored
from polytope_hsae.models.routing import straight_through_gate
from polytope_hsae.ops.magnitude import parent_code

from polytope_hsae import ops
from polytope_hsae.config import HSAEConfig, LossOverrides
from polytope_hsae.models.constraints import project_out
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.models.losses import biorth_jax

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from polytope_hsae.ops.triton import adam, biorth, children, functions, gate, rows  # noqa: E402
from polytope_hsae.ops.triton.plan import CHUNK, make_plan  # noqa: E402
from polytope_hsae.ops.triton.select import select  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
# bf16 products are wrong in the interpreter.
PRECISIONS = ["float32", "tf32", "bf16"] if CUDA else ["float32"]
TOLERANCE = {"float32": 2e-5, "tf32": 3e-3, "bf16": 2e-2}
precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nothing has written holds NaN; runs of other tests switch that off."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a run switches it off
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def leaf(tensor):
    return tensor.detach().float().to(DEVICE).requires_grad_()


def assert_close(found, expected, tolerance):
    found, expected = found.detach().double().cpu(), expected.detach()
    assert torch.isfinite(found).all()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, error.item()


def parents(B, k, P, repeated=False):
    generator = torch.Generator().manual_seed(B + k + P)
    index = torch.stack([torch.randperm(P, generator=generator)[:k] for _ in range(B)])
    if repeated:
        index[:, 0] = index[:, -1]
    return index


@precisions
@pytest.mark.parametrize(
    "B,k,P,m,d",
    [
        (33, 3, 7, 4, 37),
        (70, 4, 5, 20, 130),
        (1, 2, 9, 4, 16),
        (40, 8, 8, 96, 64),
        (CHUNK // 2 + 9, 1, 2, 1, 16),
        (5, 2, 3, 300, 16),
    ],
)
@pytest.mark.parametrize("own_rows", [False, True])
def test_routed_dot_sum_and_outer_equal_a_gather(B, k, P, m, d, own_rows, precision):
    index, tolerance = parents(B, k, P, repeated=k == 3), TOLERANCE[precision]
    plan, divisor = make_plan(index.to(DEVICE), P), 1 if own_rows else k
    x, W, c = (t.requires_grad_() for t in (normal(B * k // divisor, d), normal(P, m, d), normal(B * k, m)))
    picked = W[index.flatten()]
    expected = torch.einsum("nmd,nd->nm", picked, x.repeat_interleave(divisor, 0))
    mine_x, mine_W, mine_c = leaf(x), leaf(W), leaf(c)
    found = functions.RoutedDot.apply(mine_x, mine_W, None, None, plan, divisor, precision)
    assert_close(found, expected, tolerance)
    up = normal(*expected.shape, seed=1)
    for a, b in zip(
        torch.autograd.grad(found, (mine_x, mine_W), up.float().to(DEVICE)),
        torch.autograd.grad(expected, (x, W), up),
        strict=True,
    ):
        assert_close(a, b, tolerance)
    expected = torch.einsum("nmd,nm->nd", W[index.flatten()], c).view(-1, divisor, d).sum(1)
    found = functions.RoutedSum.apply(mine_c, mine_W, plan, divisor, precision)
    assert_close(found, expected, tolerance)
    up = normal(*expected.shape, seed=1)
    for a, b in zip(
        torch.autograd.grad(found, (mine_c, mine_W), up.float().to(DEVICE)),
        torch.autograd.grad(expected, (c, W), up),
        strict=True,
    ):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("m,own_rows", [(4, False), (20, False), (4, True)])
def test_pairs_that_are_left_out_give_zero_and_get_no_gradient(m, own_rows):
    B, k, P, d = 33, 6, 5, 37
    index, used = torch.randint(P, (B, k), generator=torch.Generator().manual_seed(0)), normal(B, k) > 0.3
    divisor, used_N1 = 1 if own_rows else k, used.flatten().unsqueeze(1)
    plan = make_plan(index.to(DEVICE), P, used.to(DEVICE))
    x, W = normal(B * k // divisor, d).requires_grad_(), normal(P, m, d).requires_grad_()
    c = (normal(B * k, m) * used_N1).requires_grad_()
    mine_x, mine_W, mine_c = leaf(x), leaf(W), leaf(c)
    expected = torch.einsum("nmd,nd->nm", W[index.flatten()], x.repeat_interleave(divisor, 0)) * used_N1
    found = functions.RoutedDot.apply(mine_x, mine_W, None, None, plan, divisor, "float32")
    assert not found[~used.flatten()].any()
    up = normal(*expected.shape, seed=1) * used_N1
    expected_sum = torch.einsum("nmd,nm->nd", W[index.flatten()], c).view(-1, divisor, d).sum(1)
    found_sum = functions.RoutedSum.apply(mine_c, mine_W, plan, divisor, "float32")
    up_sum = normal(*expected_sum.shape, seed=1)
    of_x_W = torch.autograd.grad(found, (mine_x, mine_W), up.float().to(DEVICE))
    of_c_W = torch.autograd.grad(found_sum, (mine_c, mine_W), up_sum.float().to(DEVICE))
    assert not of_c_W[0][~used.flatten()].any()
    wanted = torch.autograd.grad(expected, (x, W), up)
    wanted_c, wanted_W = torch.autograd.grad(expected_sum, (c, W), up_sum)
    for a, b in zip(
        (found, found_sum, *of_x_W, *of_c_W),
        (expected, expected_sum, *wanted, wanted_c * used_N1, wanted_W),
        strict=True,
    ):
        assert_close(a, b, 2e-5)


def test_every_pair_gets_its_parents_bias():
    index, x, W, b = parents(20, 3, 6), normal(20, 24), normal(6, 20, 24), normal(6, 20).requires_grad_()
    expected = torch.einsum("nmd,nd->nm", W[index.flatten()], x.repeat_interleave(3, 0)) + b[index.flatten()]
    mine, plan, up = leaf(b), make_plan(index.to(DEVICE), 6), normal(60, 20)
    found = functions.RoutedDot.apply(leaf(x), leaf(W), mine, None, plan, 3, "float32")
    assert_close(found, expected, 2e-5)
    (a,) = torch.autograd.grad(found, mine, up.float().to(DEVICE))
    assert_close(a, torch.autograd.grad(expected, b, up)[0], 2e-5)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("B,k", [(33, 2), (1, 7), (20, 64)])
def test_a_gates_gradient(B, k, threshold):
    logit = normal(B, k).requires_grad_()
    level = None if threshold is None else torch.tensor(threshold)
    slots = torch.arange(k).expand(B, k)
    value = parent_code(logit, "relu" if threshold is None else "leaky_offset", level)
    expected = value * straight_through_gate(logit, slots, 0.7)
    mine, up = leaf(logit), normal(B, k, seed=1)
    found = gate.Gate.apply(mine, None if level is None else level.to(DEVICE), torch.tensor(0.7, device=DEVICE))
    assert_close(found, expected, 1e-6)
    (a,) = torch.autograd.grad(found, mine, up.float().to(DEVICE))
    assert_close(a, torch.autograd.grad(expected, logit, up)[0], 1e-5)


def test_a_learned_origin_gets_its_gradient_without_the_rows():
    index, x, W, b = parents(20, 3, 6), normal(20, 24), normal(6, 4, 24), normal(24)
    b.requires_grad_()
    up = normal(60, 4)
    expected = torch.einsum("nmd,nd->nm", W[index.flatten()], (x - b).repeat_interleave(3, 0))
    mine = leaf(b)
    plan = make_plan(index.to(DEVICE), 6)
    rows_Bd = (x - b).detach().float().to(DEVICE)
    found = functions.RoutedDot.apply(rows_Bd, leaf(W), None, mine, plan, 3, "float32")
    (a,) = torch.autograd.grad(found, mine, up.float().to(DEVICE))
    assert_close(a, torch.autograd.grad(expected, b, up)[0], 2e-5)


def test_a_parent_of_several_chunks_and_parents_without_pairs():
    B = 2 * CHUNK + 5
    index = torch.zeros(B, 1, dtype=torch.int64)
    x, W = normal(B, 16), normal(3, 4, 16)
    mine = leaf(W)
    found = functions.RoutedDot.apply(leaf(x), mine, None, None, make_plan(index.to(DEVICE), 3), 1, "float32")
    up = normal(B, 4)
    (grad,) = torch.autograd.grad(found, mine, up.float().to(DEVICE))
    assert_close(grad[0], up.T @ x, 2e-5)
    assert not grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("B,P,k", [(5, 100, 7), (3, 37, 37), (4, 64, 1), (1, 1, 1), (3, 20_000, 5), (4, 33_000, 32)])
def test_select_is_a_stable_sort(B, P, k, leaky, dtype):
    value = normal(B, P).to(dtype)
    value[0] = value[0].round()  # ties
    value[-1] = -value[-1].abs()  # no positive entry
    if P >= 20_000:
        value[1, :300] = 9 - torch.arange(300) / 64  # the largest crowd into few groups
    threshold = torch.tensor(0.5) if leaky else None
    code = value.float() if threshold is None else torch.where(value.float() >= threshold, value.float(), 0.0)
    expected = torch.sort(code, dim=1, descending=True, stable=True).indices[:, :k]
    index, entry, total = select(value.to(DEVICE), k, None if threshold is None else threshold.to(DEVICE), True)
    assert torch.equal(index.cpu(), expected)
    assert torch.equal(entry.cpu(), value.float().gather(1, expected))
    assert_close(total, torch.relu(code).double().sum(1), 1e-5)


def test_select_of_no_rows():
    index, entry, total = select(torch.zeros(0, 9, device=DEVICE), 3, None, True)
    assert index.shape == entry.shape == (0, 3)
    assert total.shape == (0,)


@precisions
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_route_and_its_gradients(threshold, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, E, b = (t.to(dtype).double().requires_grad_() for t in (normal(33, 24), normal(50, 24), normal(50)))
    logits = x @ E.T + b
    level = None if threshold is None else torch.tensor(threshold, device=DEVICE)
    mine = [leaf(t) for t in (x, E, b)]
    index, value, total, _ = functions.Route.apply(*mine, None, 4, level, None, True, precision)
    code = torch.relu(logits) if threshold is None else torch.where(logits >= threshold, logits, 0.0)
    picked = logits.gather(1, index.cpu())
    assert_close(value, picked, TOLERANCE[precision])
    assert_close(total, code.sum(1), TOLERANCE[precision])
    of_value, of_total = normal(33, 4), normal(33)
    expected = torch.autograd.grad((picked * of_value).sum() + (code.sum(1) * of_total).sum(), (x, E, b))
    loss = (value * of_value.float().to(DEVICE)).sum() + (total * of_total.float().to(DEVICE)).sum()
    for a, e in zip(torch.autograd.grad(loss, mine), expected, strict=True):
        assert_close(a, e, TOLERANCE[precision])


@precisions
def test_jax_penalty_and_its_gradients(precision):
    E, D = normal(40, 24).requires_grad_(), normal(40, 24, seed=3).requires_grad_()
    value = biorth_jax(E, D)
    mine = [leaf(E), leaf(D)]
    found = biorth.BiorthJax.apply(*mine, 1e-6, precision)
    assert_close(found, value, TOLERANCE[precision])
    for a, b in zip(torch.autograd.grad(3 * found, mine), torch.autograd.grad(3 * value, (E, D)), strict=True):
        assert_close(a, b, 2 * TOLERANCE[precision])


def test_children_of_closed_parents_and_ties():
    pre = torch.tensor([[[1.0, 3.0, 3.0], [-2.0, -1.0, -1.0], [5.0, 9.0, 1.0]]], device=DEVICE)
    assert children.best_child(pre, torch.tensor([[1.0, 2.0, 0.0]], device=DEVICE)).tolist() == [[1, 4, 6]]


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("B,k,C,K", [(7, 3, 5, 4), (1, 1, 1, 1), (4, 9, 100, 33)])
def test_kept_children_and_their_gradients(B, k, C, K, threshold):
    pre, value = normal(B, k, C).requires_grad_(), normal(B, k, seed=1)
    place = parents(B, K, k * C)
    slope = 0.0 if threshold is None else 0.01
    q = pre.flatten(1).gather(1, place)
    code = torch.where(q > 0 if threshold is None else q >= threshold, q, slope * q)
    code = code * (value.gather(1, place // C) > 0)
    dense = torch.zeros(B, k * C, dtype=torch.float64).scatter(1, place, code).view(B, k, C)
    level = None if threshold is None else torch.tensor(threshold, device=DEVICE)
    mine = leaf(pre)
    found, found_dense = children.KeepChildren.apply(mine, place.to(DEVICE), value.float().to(DEVICE), level, slope)
    assert_close(found, code, 1e-6)
    assert_close(found_dense, dense, 1e-6)
    up, up_dense = normal(B, K, seed=2), normal(B, k, C, seed=3)
    for loss, mine_loss in (
        ((code * up).sum(), (found * up.float().to(DEVICE)).sum()),
        ((dense * up_dense).sum(), (found_dense * up_dense.float().to(DEVICE)).sum()),
        ((code * up).sum() + (dense * up_dense).sum(),
         (found * up.float().to(DEVICE)).sum() + (found_dense * up_dense.float().to(DEVICE)).sum()),
    ):  # fmt: skip
        (expected,) = torch.autograd.grad(loss, pre, retain_graph=True)
        assert_close(torch.autograd.grad(mine_loss, mine, retain_graph=True)[0], expected, 1e-6)


@precisions
@pytest.mark.parametrize("given,bias", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("B,k,P,s,d", [(20, 3, 6, 4, 37), (9, 4, 5, 20, 300), (1, 1, 1, 1, 16)])
def test_reconstruct_and_its_gradients(B, k, P, s, d, given, bias, precision):
    index, tolerance = parents(B, k, P), TOLERANCE[precision]
    x, value, D = normal(B, d), normal(B, k), normal(P, d, seed=1)
    codes, Up, b, top = normal(B * k, s), normal(P, s, d), normal(d), normal(B, d, seed=2)
    parts = [top, codes, Up] if given else [value, D, codes, Up] + [b] * bias
    for part in parts:
        part.requires_grad_()
    base = top if given else torch.einsum("bk,bkd->bd", value, D[index]) + (b if bias else 0)
    x_hat = base + torch.einsum("nsd,ns->nd", Up[index.flatten()], codes).view(B, k, d).sum(1)
    errors = (x - x_hat).square().sum(1), (x - base).square().sum(1)
    mine = {id(part): leaf(part) for part in parts}
    m = [mine.get(id(part)) for part in (top, value, D, b)]
    found = functions.Reconstruct.apply(
        x.float().to(DEVICE), m[0], None if given else m[1].view(-1, 1), m[2], m[3], mine[id(codes)], mine[id(Up)],
        make_plan(index.to(DEVICE), P), precision,
    )  # fmt: skip
    for a, e in zip(found, (x_hat, base, *errors), strict=True):
        assert_close(a, e, tolerance)
    up = normal(B, seed=4), normal(B, seed=5)
    loss = sum((e * u).sum() for e, u in zip(errors, up, strict=True))
    mine_loss = sum((e * u.float().to(DEVICE)).sum() for e, u in zip(found[2:], up, strict=True))
    for a, e in zip(
        torch.autograd.grad(mine_loss, [mine[id(part)] for part in parts]),
        torch.autograd.grad(loss, parts),
        strict=True,
    ):
        assert_close(a, e, 2 * tolerance)


@pytest.mark.parametrize("normalize", ["rms", "unit_row", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_entering_rows(normalize, bias):
    h, mean, b, scale = normal(40, 9).T, normal(40), normal(40, seed=1), torch.tensor(1.7)
    divisor = h.norm(dim=1) + 1e-6 if normalize == "unit_row" else None
    x = {"rms": (h - mean) / scale, "unit_row": h / (h.norm(dim=1, keepdim=True) + 1e-6), "none": h}[normalize]
    mine = [t.float().to(DEVICE) for t in (h, mean, scale, b)]
    found, centred, norm = rows.enter(
        mine[0], normalize, mine[1], mine[2], 1e-6, mine[3] if bias else None, torch.float32
    )
    assert_close(found, x, 1e-6)
    assert_close(centred, x - b if bias else x, 1e-6)
    assert (norm is None) == (divisor is None)
    if norm is not None:
        assert_close(norm, divisor, 1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_code_size(threshold):
    q = normal(9, 700).requires_grad_()
    slope = 0.0 if threshold is None else 0.01
    size = torch.where(q >= (threshold or 0.0), q, slope * q).abs().sum(1)
    mine = leaf(q)
    level = None if threshold is None else torch.tensor(threshold, device=DEVICE)
    found = children.CodeSize.apply(mine, level, slope)
    assert_close(found, size, 1e-5)
    up = normal(9)
    (a,) = torch.autograd.grad(found, mine, up.float().to(DEVICE))
    assert_close(a, torch.autograd.grad(size, q, up)[0], 1e-5)


@pytest.mark.parametrize("d", [4, 24, 2304])
def test_row_operations(d):
    a, b = normal(11, d), normal(11, d, seed=1)
    mine = a.float().to(DEVICE)
    rows.project_out_(mine, b.float().to(DEVICE))
    assert_close(mine, project_out(a, b), 1e-5)
    mine = a.float().to(DEVICE)
    rows.normalize_rows_(mine)
    assert_close(mine, a / a.norm(dim=1, keepdim=True), 1e-5)
    y = b.clone().requires_grad_()
    mine = leaf(y)
    error = functions.SquaredError.apply(a.float().to(DEVICE), mine)
    assert_close(error, (a - y).square().sum(1), 1e-5)
    (grad,) = torch.autograd.grad(error.sum(), mine)
    assert_close(grad, 2 * (y - a), 1e-5)


def test_adam_is_torchs_and_a_nan_scale_changes_nothing():
    p, gradients = normal(5000).requires_grad_(), [normal(5000, seed=s) for s in range(3)]
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
    mine = p.detach().float().to(DEVICE)
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    for t, gradient in enumerate(gradients, 1):
        p.grad = 0.5 * gradient
        optimizer.step()
        numbers = [0.1, 1 - 0.1 * 0.01, 1 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5]
        for scale in (torch.nan, 0.5):
            adam.adam_(
                mine, gradient.float().to(DEVICE), m, v, torch.tensor(scale, device=DEVICE),
                torch.tensor(numbers, device=DEVICE), 0.9, 0.999, 1e-8,
            )  # fmt: skip
    assert_close(mine, p, 1e-5)


CONFIGS = {
    "jax": (HSAEConfig.jax_compat(n_parents=96, n_children_per_parent=8, topk_parent=6), "unit_row"),
    "wide subspace": (
        factored(
            n_parents=24, topk_parent=4, subspace_dim=20, child_input="input", child_budget="per_parent",
            l1_parent=1e-3, l1_child=1e-3, biorth_lambda=1e-3, recon_reduction="mean",
        ),
        "rms",
    ),
    "shared": (factored(n_parents=64, topk_parent=5, topk_child_total=7, l1_parent=0.01, l1_child=0.01), "rms"),
    "all codes": (
        factored(n_parents=64, topk_parent=5, topk_child=2, gate="hard", l1_scope="all", l1_parent=0.1, l1_child=0.1),
        "rms",
    ),
    "one parent": (factored(n_parents=24, topk_parent=1), "rms"),
    "auxiliary": (factored(n_parents=24, topk_parent=3, aux_weight=0.1), "rms"),
    "tied": (
        factored(
            n_parents=24, topk_parent=3, topk_child=2, child_input_detach=True, child_budget="per_parent",
            tie_projectors=True, use_tied_decoders_parent=True, use_tied_decoders_child=True,
        ),
        "none",
    ),
}  # fmt: skip


@gpu
@pytest.mark.parametrize("B", [0, 1, 200])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_model_on_a_gpu_is_the_reference(name, B, monkeypatch):
    config, normalize = CONFIGS[name]
    monkeypatch.setattr("polytope_hsae.models.hsae.routing_noise", lambda logits, *_: torch.zeros_like(logits))
    model = HierarchicalSAE(config, 48, normalize, seed=1)
    with torch.no_grad():  # away from the start, where reading and writing agree and some gradients vanish
        for parameter in model.parameters():
            parameter += 0.05 * normal(*parameter.shape).float()
    model.normalize_decoder_weights()
    reference, mine = copy.deepcopy(model).double().train(), copy.deepcopy(model).cuda().train()
    h = 3 * normal(48, B).T.float()  # not contiguous
    expected, found = reference(h.double()), mine(h.cuda())
    assert torch.equal(found.codes.parent_index.cpu(), expected.codes.parent_index)
    if B == 0:
        return
    assert torch.equal(found.codes.child_index.cpu(), expected.codes.child_index)
    assert_close(found.x_hat, expected.x_hat, 1e-5)
    assert_close(found.x_hat_top, expected.x_hat_top, 1e-5)
    terms, terms_found = reference.loss_terms(expected, LossOverrides()), mine.loss_terms(found, LossOverrides())
    for key, (weight, value) in terms.items():
        assert terms_found[key][0] == weight
        assert_close(terms_found[key][1], value, 1e-4)
    sum(w * value for w, value in terms.values()).backward()
    sum(w * value for w, value in terms_found.values()).backward()
    for (_, a), (_, b) in zip(mine.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-12:
            assert_close(a.grad, b.grad, 1e-4)
    with torch.no_grad():
        output = mine.eval()(h.cuda())
        assert_close(mine.decode_normalized(output.codes), output.x_hat.double().cpu(), 1e-5)


@gpu
def test_the_same_bits_twice():
    model = HierarchicalSAE(CONFIGS["jax"][0], 48, "unit_row", seed=1).cuda().train()
    model.precision = "bf16"
    h, grads = normal(3000, 48).float().cuda(), []
    for _ in range(2):
        model.zero_grad()
        sum(w * value for w, value in model.loss_terms(model(h), LossOverrides()).values()).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@gpu
def test_offsets_beyond_2_to_the_31():
    P, m, d = 250_000, 4, 2304
    torch.use_deterministic_algorithms(False)
    W = torch.zeros(P, m, d, dtype=torch.bfloat16, device=DEVICE)
    W[-1] = normal(m, d).bfloat16().cuda()
    x, index = normal(5, d).bfloat16().cuda(), torch.full((5, 1), P - 1, device=DEVICE)
    plan = make_plan(index, P)
    expected = x.double().cpu() @ W[-1].double().cpu().T
    assert_close(functions.dot(x, W, plan, 1, "bf16"), expected, 2e-2)
    coef = torch.ones(5, m, device=DEVICE)
    assert_close(functions.sum_rows(coef, W, plan, 1, "bf16"), W[-1].double().sum(0).cpu().expand(5, d), 2e-2)
    assert_close(functions.outer(coef, x, plan, 1, "bf16")[-1], x.double().sum(0).cpu().expand(m, d), 2e-2)


@gpu
def test_public_operations_on_no_rows():
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    W, F = normal(4, 3, 8).float().cuda(), normal(4, 5, 3).float().cuda()
    empty = torch.zeros(0, 8, device=DEVICE)
    assert ops.encode_children(empty, ops.routing(none, W), W, F, None).shape == (0, 2, 5)
    assert ops.decode_children(none, torch.zeros(0, 2, device=DEVICE), W, F).shape == (0, 8)
    assert ops.weighted_row_sum(W[:, 0], none, torch.zeros(0, 2, device=DEVICE)).shape == (0, 8)
