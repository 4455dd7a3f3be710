"""Parents balanced by a bias of the choice."""

import pytest
import torch
from factored import factored
from test_models import SHAPE, generator, normal, random_parameters
from test_training import assert_same_run, planted_rows, train

from polytope_hsae.models.codes import Codes
from polytope_hsae.models.hsae import HierarchicalSAE

WIDTH = 6


def make_model(gate="hard", rate=0.1, **options):
    return HierarchicalSAE(factored(**{**SHAPE, "gate": gate, "router_balance_rate": rate, **options}), WIDTH, "none")


def codes_of(index, value):
    index, value = torch.tensor(index), torch.tensor(value)
    return Codes(index, value, index, value)


def test_the_balance_moves_against_the_load_by_hand():
    model = make_model(n_parents=4, topk_parent=2)
    model.update_balance(codes_of([[0, 1], [0, 2], [0, 3]], [[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]]))
    assert torch.equal(model.balance, torch.tensor([-0.1, 0.1, 0.1, 0.1]))  # loads 3, 1, 0, 1 of mean 1.25
    model.update_balance(codes_of([[0, 1], [2, 3]], [[1.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(model.balance, torch.tensor([-0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize("gate, training", [("hard", True), ("hard", False), ("straight_through", False)])
def test_the_balance_changes_the_choice_and_not_the_codes(gate, training):
    model = make_model(gate).double().train(training)
    random_parameters(model)
    model.balance.copy_(torch.tensor([0.0, 9.0, -9.0, 0.0, 9.0, 0.0]))
    index, value, logits = model.encode_parent(normal(40, WIDTH))
    assert torch.equal(index, (logits + model.balance).topk(3, dim=1).indices)
    assert not torch.equal(index, logits.topk(3, dim=1).indices)
    assert torch.equal(value, torch.relu(logits.gather(1, index)))


def test_noise_and_balance_add_up():
    model = make_model("straight_through").double().train()
    random_parameters(model)
    x = normal(40, WIDTH)
    before = model.encode_parent(x, generator(1))[0]
    assert torch.equal(before, model.encode_parent(x, generator(1))[0])
    model.balance[0] = 100.0
    assert (model.encode_parent(x, generator(1))[0] == 0).any(1).all()


def test_loads_become_even():
    def spread(rate):
        model = make_model(rate=rate) if rate else make_model(rate=0)
        with torch.no_grad():
            model.b_E.copy_(torch.arange(6) / 2)
        rows = 0.2 * torch.randn(512, WIDTH, generator=generator(0))
        for _ in range(200):
            model.update_balance(model(rows).codes)
        codes = model(rows).codes
        load = torch.bincount(codes.parent_index[codes.parent_value > 0], minlength=6)
        return load.max() / load.double().mean()

    assert spread(0) > 1.5
    assert spread(0.01) < 1.2


def test_the_balance_resumes_exactly(tmp_path):
    def fresh():
        return make_model(normalize_decoder=True)

    straight = train(tmp_path / "straight", model=fresh())
    train(tmp_path / "killed", model=fresh(), kill_at=20)
    resumed = train(tmp_path / "killed", model=fresh())
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")
    assert resumed.model.balance.abs().max() > 0.2
    resumed.model.save_pretrained(tmp_path / "model")
    loaded = HierarchicalSAE.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.reconstruct(planted_rows()), resumed.model.eval().reconstruct(planted_rows()))


def test_a_largest_load_holds_back_only_what_is_above_it():
    model = make_model(n_parents=4, topk_parent=2, router_load_max=0.5)
    index, value = [[0, 1], [0, 2], [0, 3]], [[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]]
    model.update_balance(codes_of(index, value))
    assert torch.equal(model.balance, torch.tensor([-0.1, 0.0, 0.0, 0.0]))  # loads 3, 1, 0, 1 of 1.5
    model.update_balance(codes_of(index, value))
    model.update_balance(codes_of([[1, 2]], [[1.0, 1.0]]))
    assert torch.allclose(model.balance, torch.tensor([-0.1, -0.1, -0.1, 0.0]))


@pytest.mark.parametrize("parents", ["batch", "joint"])
def test_a_largest_load_is_kept_under_a_batchs_budget(parents):
    options = {"parent_budget": parents, "child_budget": "batch", "topk_child_total": 2, "budget_slots": 3.0}

    def largest(rate, most):
        model = make_model(rate=rate, topk_parent=2, router_load_max=most, **options)
        with torch.no_grad():
            model.b_E.copy_(torch.arange(6) / 2)
        rows = 0.2 * torch.randn(512, WIDTH, generator=generator(0))
        for _ in range(300):
            model.update_balance(model(rows).codes)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parent_budget": "batch"}, "router_balance_rate: found 0.1, allowed: 0 unless parent_budget is per_row or"),
        ({"rate": 0, "router_load_max": 0.2}, "router_load_max: found 0.2, allowed: null unless router_balance_rate"),
    ],
)
def test_a_balance_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)
