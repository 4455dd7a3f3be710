"""Selection biases, which hold firing rates within limits."""

import pytest
import torch
from models import factored_sae, generator, normal, random_parameters, sae
from trainers import WIDTH, Records, make_trainer

from polytope_hsae.config import HSAEConfig, StageConfig
from polytope_hsae.models.codes import Codes, firings
from polytope_hsae.models.hsae import HierarchicalSAE


def make_model(rate=0.1, **options):
    """Of the factored form; without a limit unless the options have one, and with no more than a row's own budgets."""
    limits = {"rate_cap": 1.0 if rate and "rate_floor" not in options else None, "rate_floor": 0.0}
    return factored_sae(WIDTH, **{"gate": "hard", "balance_rate": rate, **limits, **options}).float()


def codes_of(index, value):
    index, value = torch.tensor(index), torch.tensor(value)
    return Codes(index, value, index, value)


def step(model, *batches):
    """An optimiser step of micro-batches: their codes, or rows."""
    for batch in batches:
        codes = batch if isinstance(batch, Codes) else model(batch).codes
        model.after_batch(firings(codes, model.n_parents, model.n_parents * model.n_children))
    model.before_step()


def rates(codes, model):
    """In how many rows each parent is on, and each child."""
    fired = firings(codes, model.n_parents, model.n_parents * model.n_children)
    return fired.parents, fired.children


@pytest.mark.parametrize("gate, training", [("hard", True), ("hard", False), ("straight_through", False)])
def test_the_balance_changes_the_choice_and_not_the_codes(gate, training):
    model = make_model(gate=gate).double().train(training)
    random_parameters(model)
    model.balance.parent_bias.copy_(torch.tensor([0.0, 9.0, -9.0, 0.0, 9.0, 0.0]))
    index, value, logits = model.encode_parent(normal(40, WIDTH))
    scores = torch.where(logits > 0, logits + model.balance.parent_bias, logits)
    assert torch.equal(index, scores.topk(3, dim=1).indices)
    assert not torch.equal(index, logits.topk(3, dim=1).indices)
    assert torch.equal(value, torch.relu(logits.gather(1, index)))


def test_a_largest_rate_holds_back_only_what_is_above_it():
    """Half of a batch's rows, or 2.2 times the mean number of rows, is the limit."""
    model = make_model(n_parents=4, topk_parent=2, rate_cap=0.5, rate_cap_spread=2.2)
    index, value = [[0, 1], [0, 2], [0, 3]], [[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]]
    for batches, expected in (
        ([(index, value)], [-0.1, 0, 0, 0]),  # on in 3, 1, 0, 1 rows
        ([(index, value), ([[1, 2], [1, 3]], [[1.0, 1.0]] * 2)], [-0.1, 0, 0, 0]),  # then in 0, 2, 1, 1
        ([([[1, 2]] * 3 + [[1, 3]], [[1.0, 0.0]] * 4)], [0, -0.1, 0, 0]),  # 0, 4, 0, 0
        ([([[1, 2]], [[0.0, 1.0]])], [0, 0, -0.1, 0]),  # 0, 0, 1, 0
    ):
        for batch in batches:
            step(model, codes_of(*batch))
        torch.testing.assert_close(model.balance.parent_bias, torch.tensor(expected, dtype=torch.float32))


def test_a_smallest_rate_is_kept_in_the_mean_of_batches():
    model = make_model(n_parents=4, topk_parent=2, rate_floor=0.1)
    assert model.balance.child_bias.shape == (4, model.n_children)
    model.balance.child_bias = None  # this is about parents
    index = [[0, 1]] * 10 + [[2, 1]] * 10
    for _ in range(6):  # on in 10, 20, 10, 0 rows: a mean of 10, so one row is wanted
        step(model, codes_of(index, [[1.0, 1.0]] * 20))
    assert torch.allclose(model.balance.parent_bias, torch.tensor([0.0, 0.0, 0.0, 0.6]))
    step(
        model, codes_of([[0, 1], [3, 1]], [[1.0, 1.0], [1.0, 0.0]])
    )  # on in 1, 1, 0, 1 rows: 0.075 rows are wanted, and what wants less than 0.3 goes as fast as if it wanted 0.3
    assert torch.allclose(model.balance.parent_bias, torch.tensor([0.0, 0.0, 0.03, 0.6 - 0.0925 * 0.3 / 0.075]))


def test_the_bias_of_children_changes_the_choice_and_not_the_codes():
    for budget in ({"child_budget": "per_parent"}, {"child_budget": "per_parent", "topk_child": 2}, {}):
        model = make_model(rate_floor=0.1, **budget).double()
        random_parameters(model)
        rows = normal(40, WIDTH)
        parents, values, _ = model.encode_parent(rows)
        pre_BkC = model.encode_children(rows, parents, values)[2]
        model.balance.child_bias.copy_(5 * normal(*model.balance.child_bias.shape).abs())
        index, codes, _ = model.encode_children(rows, parents, values)
        C, chosen = model.n_children, codes > 0
        slot = (parents.unsqueeze(2) == (index // C).unsqueeze(1)).int().argmax(1)
        q = pre_BkC.flatten(1).gather(1, slot * C + index % C)
        assert torch.equal(codes[chosen], q[chosen])
        assert chosen.any()
        # what is not chosen has a smaller score, q + beta, than what is, among those that compete with it
        score_BkC = torch.where(pre_BkC > 0, pre_BkC + model.balance.child_bias[parents], -torch.inf)
        score_BkC[values <= 0] = -torch.inf
        n = model.config.active_children if not budget else model.config.topk_child
        pool = score_BkC.flatten(1) if not budget else score_BkC
        expected = pool.topk(n, dim=-1).values
        assert torch.allclose(
            expected[expected > -torch.inf].sort().values,
            (q + model.balance.child_bias.flatten()[index])[chosen].sort().values,
        )


def test_a_smallest_rate_brings_back_what_is_hardly_ever_on():
    options = {"parent_budget": "joint", "child_budget": "batch", "topk_child_total": 2, "budget_slots": 3.0}
    options |= {"rate_cap": None, "normalize_decoder": True}

    def rate_and_never_on(least, frozen=()):
        model = make_model(rate=0.05 if least else 0, topk_parent=2, rate_floor=least, **options)
        model.freeze(frozen)
        with torch.no_grad():
            model.b_E[0], model.b_F[1:, 0] = -4.0, -2.0
        rows = 2 * torch.randn(512, WIDTH, generator=generator(0))
        for _ in range(1000):
            step(model, rows)
        model.calibrate([rows], 4.0)
        codes = model.eval().encode(rows)
        assert codes.l0().double().mean().item() == pytest.approx(4, abs=0.02)
        on_P, on_R = rates(codes, model)
        return on_P[0].item(), (on_R == 0).sum().item()

    assert rate_and_never_on(0) == (2, 3)
    assert rate_and_never_on(0.2, {"b_E", "b_F"}) == (12, 0)  # the parent reads no more than 12 rows
    assert rate_and_never_on(0.2) == (32, 0)  # of 34 that are wanted: 0.2 of the mean rate


@pytest.mark.parametrize("parents", ["batch", "joint"])
def test_a_largest_rate_is_kept_under_a_batchs_budget(parents):
    options = {"parent_budget": parents, "child_budget": "batch", "topk_child_total": 2, "budget_slots": 3.0}

    def largest(rate, most):
        model = make_model(rate=rate, topk_parent=2, rate_cap=most, **options)
        with torch.no_grad():
            model.b_E.copy_(torch.arange(6) / 2)
        rows = 0.2 * torch.randn(512, WIDTH, generator=generator(0))
        for _ in range(300):
            step(model, rows)
        model.calibrate([rows], 3.0)
        codes = model.eval().encode(rows)
        assert codes.l0().double().mean().item() == pytest.approx(3, abs=0.02)
        values = codes.parent_value[codes.parent_value > 0]
        assert torch.isin(
            values, torch.relu(model.encode_parent(rows)[2])
        ).all()  # codes are the logits, not the scores
        return torch.bincount(codes.parent_index[codes.parent_value > 0], minlength=6).max() / 512

    assert largest(0, None) > 0.9
    assert largest(0.01, 0.6) < 0.65


def test_no_rate_means_no_limits_and_the_config_says_so():
    off = HSAEConfig(balance_rate=0)
    assert (off.rate_cap, off.rate_floor) == (None, 0)
    assert HSAEConfig(**off.model_dump()) == off
    assert HierarchicalSAE(off, 64, "none").balance.child_bias is None
    on = HierarchicalSAE(HSAEConfig(), 64, "none")
    assert on.balance.parent_bias.shape == (1024,)
    assert on.balance.child_bias.shape == (1024, 7)


@pytest.mark.parametrize("parents", ["per_row", "joint"])
def test_what_is_silent_on_every_row_takes_no_slot(parents):
    options = {"parent_budget": parents, "topk_parent": 2, "rate_floor": 0.5, "normalize_decoder": True}
    if parents == "joint":
        options |= {"child_budget": "batch", "topk_child_total": 2}
    model = make_model(rate=0.1, **options)
    model.freeze({"b_E"})
    with torch.no_grad():
        model.b_E[:2] = -20.0
    rows = 2 * torch.randn(512, WIDTH, generator=generator(0))
    before = model(rows).codes.l0().sum()
    for _ in range(500):
        step(model, rows)
    codes = model(rows).codes
    on_P, _ = rates(codes, model)
    assert on_P[:2].sum() == 0
    assert codes.l0().sum() > 0.95 * before
    mean_code = codes.parent_value.sum() / on_P.sum()
    assert torch.allclose(
        model.balance.parent_bias[:2], mean_code, rtol=0.05
    )  # and it waits where it could come back at once


def test_a_child_is_lifted_only_while_its_parent_is_on():
    model = make_model(rate=0.1, rate_floor=0.5, rate_cap=None)
    model.freeze({"b_E"})
    with torch.no_grad():
        model.b_E[0] = -20.0
        model.b_F.fill_(-4.0)
        model.b_F[3, 0] = 1.0  # the one child that is ever on, at first
    rows = 2 * torch.randn(512, WIDTH, generator=generator(0))
    for _ in range(60):
        step(model, rows)
    assert (model.b_F[0] == -4).all()
    assert (model.b_F[1:3] > -4).any(1).all()


def test_children_of_a_rare_parent_hardly_lift_each_other():
    model = make_model(rate=0.1, rate_floor=0.3, rate_cap=None, child_budget="per_parent")
    model.freeze({"b_E"})
    with torch.no_grad():
        model.b_E[0] = -5.0  # on in one row of every eight batches, always with one of its four children
    draw = generator(0)
    for _ in range(2000):
        step(model, 2 * torch.randn(32, WIDTH, generator=draw))
    assert model.b_F[0].max() < 1.6  # 7.2 if it were lifted whenever its parent is on and it is not


def test_a_batch_without_any_code_moves_no_bias():
    model = make_model(rate=0.1, rate_floor=0.5, rate_cap=0.5)
    step(model, codes_of([[0, 1]], [[0.0, 0.0]]))
    for tensor in (model.balance.parent_bias, model.balance.child_bias, model.b_E, model.b_F):
        assert not tensor.any()


def test_micro_batches_move_the_biases_as_one_batch_of_all_their_rows():
    found = []
    for accumulate in (1, 2):
        model = make_model(rate_floor=0.9, rate_cap=0.2, rate_cap_spread=1)
        with torch.no_grad():
            model.b_E.copy_(torch.arange(6) / 2)
        plan = [StageConfig(name="train", steps=1)]
        make_trainer(model=model, plan=plan, batch_size=32 // accumulate, accumulate=accumulate).fit(Records())
        found.append(model.balance)
    one, two = found
    torch.testing.assert_close(two.parent_bias, one.parent_bias)
    torch.testing.assert_close(two.child_bias, one.child_bias)
    assert (one.parent_bias < 0).any()
    assert (one.parent_bias > 0).any()
    assert (one.child_bias > 0).any()


@pytest.mark.parametrize(
    "stage, held",
    [
        ({}, ""),
        ({"freeze": ["b_E"]}, "b_E"),
        ({"freeze": ["b_F"]}, "b_F"),
        ({"lr_mult": {"b_E": 0.0}}, "b_E"),
        ({"lr_mult": {"children": 0.0}}, "b_F"),
    ],
)
def test_an_encoder_bias_that_does_not_learn_is_not_lifted(stage, held):
    model = sae(WIDTH, topk_child_total=6, rate_floor=0.5, balance_rate=0.1).float()
    with torch.no_grad():
        model.b_E[0], model.b_F[1, 0] = -8.0, -8.0  # silent on every row
    before = {name: getattr(model, name).detach().clone() for name in ("b_E", "b_F")}
    plan = [StageConfig(name="train", steps=20, **stage)]
    make_trainer(model=model, plan=plan, lr=1e-6).fit(Records())
    for name, bias in before.items():
        moved = getattr(model, name) - bias
        assert torch.equal(moved, torch.zeros_like(moved)) if name == held else moved.max() > 0.5
