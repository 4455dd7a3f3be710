"""What only the kernels have: pairs grouped by parent, the choice of the largest, AdamW; and what only a GPU shows."""

import pytest
import torch
from common import DEVICE, PRECISIONS, TOLERANCE, assert_close, leaf, normal, parents

from polytope_hsae.ops.adam.naive import adam_ as plain_adam_
from polytope_hsae.ops.adam.triton import adam_
from polytope_hsae.ops.routed import triton as functions
from polytope_hsae.ops.routed.plan import CHUNK, make_plan
from polytope_hsae.ops.routed.products import dot, outer, sum_rows
from polytope_hsae.ops.routed.select import select

precisions = pytest.mark.parametrize("precision", PRECISIONS)


@precisions
@pytest.mark.parametrize(
    "B,k,P,m,d,partial",
    [
        (33, 3, 7, 4, 37, False),
        (70, 4, 5, 20, 130, False),
        (1, 2, 9, 4, 16, False),
        (40, 8, 8, 96, 64, False),
        (CHUNK // 2 + 9, 1, 2, 1, 16, False),
        (5, 2, 3, 300, 16, False),
        (33, 6, 5, 4, 37, True),  # pairs that are left out give 0 and get no gradient
        (33, 6, 5, 20, 37, True),
    ],
)
@pytest.mark.parametrize("own_rows", [False, True])
def test_routed_dot_sum_and_outer_equal_a_gather(B, k, P, m, d, partial, own_rows, precision):
    tolerance, divisor = TOLERANCE[precision], 1 if own_rows else k
    index = torch.arange(B * k).view(B, k) * 7 % P if partial else parents(B, k, P, repeated=k == 3)
    used = normal(B, k) > 0.3 if partial else torch.ones(B, k, dtype=torch.bool)
    out, used_N1 = ~used.flatten(), used.flatten().unsqueeze(1)
    plan = make_plan(index.to(DEVICE), P, used.to(DEVICE) if partial else None)
    x, W = normal(B * k // divisor, d).requires_grad_(), normal(P, m, d).requires_grad_()
    c = (normal(B * k, m) * used_N1).requires_grad_()
    mine_x, mine_W, mine_c = leaf(x), leaf(W), leaf(c)
    expected = torch.einsum("nmd,nd->nm", W[index.flatten()], x.repeat_interleave(divisor, 0)) * used_N1
    found = functions.RoutedDot.apply(mine_x, None, mine_W, None, plan, divisor, precision)
    assert not found[out].any()
    up = normal(*expected.shape, seed=1) * used_N1
    of_x_W = torch.autograd.grad(found, (mine_x, mine_W), up.float().to(DEVICE))
    expected_sum = torch.einsum("nmd,nm->nd", W[index.flatten()], c).view(-1, divisor, d).sum(1)
    found_sum = functions.RoutedSum.apply(mine_c, mine_W, plan, divisor, precision)
    up_sum = normal(*expected_sum.shape, seed=1)
    of_c_W = torch.autograd.grad(found_sum, (mine_c, mine_W), up_sum.float().to(DEVICE))
    assert not of_c_W[0][out].any()
    wanted = torch.autograd.grad(expected, (x, W), up)
    wanted_c, wanted_W = torch.autograd.grad(expected_sum, (c, W), up_sum)
    for a, b in zip(
        (found, found_sum, *of_x_W, *of_c_W),
        (expected, expected_sum, *wanted, wanted_c * used_N1, wanted_W),
        strict=True,
    ):
        assert_close(a, b, tolerance)


def test_a_parent_of_several_chunks_and_parents_without_pairs():
    B = 2 * CHUNK + 5
    index = torch.zeros(B, 1, dtype=torch.int64)
    x, W = normal(B, 16), normal(3, 4, 16)
    mine = leaf(W)
    found = functions.RoutedDot.apply(leaf(x), None, mine, None, make_plan(index.to(DEVICE), 3), 1, "float32")
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


@pytest.mark.parametrize("step", [plain_adam_, adam_])
def test_adam_is_torchs_and_a_nan_scale_changes_nothing(step):
    p, gradients = normal(5000).requires_grad_(), [normal(5000, seed=s) for s in range(3)]
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
    mine = p.detach().float().to(DEVICE)
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    for t, gradient in enumerate(gradients, 1):
        p.grad = 0.5 * gradient
        optimizer.step()
        numbers = [0.1, 1 - 0.1 * 0.01, 1 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5]
        for scale in (torch.nan, 0.5):
            step(
                mine, gradient.float().to(DEVICE), m, v, torch.tensor(scale, device=DEVICE),
                torch.tensor(numbers, device=DEVICE), 0.9, 0.999, 1e-8,
            )  # fmt: skip
    assert_close(mine, p, 1e-5)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    P, m, d = 250_000, 4, 2304
    torch.use_deterministic_algorithms(False)
    W = torch.zeros(P, m, d, dtype=torch.bfloat16, device=DEVICE)
    W[-1] = normal(m, d).bfloat16().cuda()
    x, index = normal(5, d).bfloat16().cuda(), torch.full((5, 1), P - 1, device=DEVICE)
    plan = make_plan(index, P)
    expected = x.double().cpu() @ W[-1].double().cpu().T
    assert_close(dot(x, W, plan, 1, "bf16"), expected, 2e-2)
    coef = torch.ones(5, m, device=DEVICE)
    assert_close(sum_rows(coef, W, plan, 1, "bf16"), W[-1].double().sum(0).cpu().expand(5, d), 2e-2)
    assert_close(outer(coef, x, plan, 1, "bf16")[-1], x.double().sum(0).cpu().expand(m, d), 2e-2)
