"""Parents and children chosen from a batch: gradients, slots, thresholds, calibration, files and resuming."""

import pytest
import torch
from test_models import LOSSES, SHAPE, WIDTH, copied_tensors, dense_loss, normal, random_parameters
from test_training import assert_same_run, planted_rows, train

from polytope_hsae.config import HSAEConfig, LossOverrides
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.budget import Budget
from polytope_hsae.models.hsae import HierarchicalSAE

BUDGETS = [("batch", "per_parent"), ("batch", "shared"), ("per_row", "batch"), ("batch", "batch")]
HARD = {**SHAPE, "gate": "hard"}


def make_model(parents, children, normalize="none", **options):
    options = {"parent_budget": parents, "child_budget": children, **HARD, **options}
    return HierarchicalSAE(HSAEConfig(**options), WIDTH, normalize).double()


def assert_dense(model, x, sigma=None):
    """Loss and all gradients equal those of the dense implementation."""
    sigma = torch.eye(WIDTH, dtype=torch.float64) if sigma is None else sigma
    mine = sum(weight * value for weight, value in model.loss_terms(model(x), LossOverrides()).values())
    copies = copied_tensors(model)
    theirs = dense_loss(copies, model.config, x, 1.0, sigma)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    mine.backward()
    theirs.backward()
    for name, tensor in model.tensors().items():
        torch.testing.assert_close(tensor.grad, copies[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("parents, children", BUDGETS)
@pytest.mark.parametrize("child_input", ["residual", "input"])
def test_loss_and_all_gradients_equal_a_dense_implementation(parents, children, child_input):
    enough = 8.0  # slots for every parent and child, so that nothing is cut
    model = make_model(parents, children, child_input=child_input, topk_parent=2, budget_slots=enough, **LOSSES)
    random_parameters(model)
    x = 2 * normal(11, WIDTH, seed=3)
    assert_dense(model, x)
    codes = model(x).codes
    for of_batch, value in ((parents == "batch", codes.parent_value), (children == "batch", codes.child_value)):
        if of_batch:  # rows differ in their numbers, and the batch has as many as it may
            assert (value > 0).sum() == 2 * 11
            assert (value > 0).sum(1).unique().numel() > 1


def test_a_budget_by_hand():
    budget = Budget(1, True, 2.0, 0.5)
    codes = torch.tensor([[5.0, 4.0], [3.0, 0.0], [0.0, 0.0]])
    assert budget.slots(10) == 2
    assert budget.slots(1) == 1
    assert torch.equal(budget.keep(codes), codes)  # three codes for three rows, all of one batch
    assert budget.threshold == 3
    budget.keep(codes + 2)  # 7 6 5 of 7 6 5 2 2 2
    assert torch.equal(budget.threshold, torch.tensor(4.0))  # the mean of 3 and 5
    budget.keep(torch.zeros(3, 2))
    assert torch.equal(budget.threshold, torch.tensor(2.0))
    assert torch.equal(budget.eval().keep(codes), torch.tensor([[5.0, 4.0], [3.0, 0.0], [0.0, 0.0]]))
    budget.threshold.fill_(4.0)
    assert torch.equal(budget.keep(codes), torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


def test_a_row_has_no_more_codes_than_slots():
    model = make_model("batch", "batch", topk_parent=2, budget_slots=1.5, topk_child_total=3)
    random_parameters(model)
    codes = model(3 * normal(40, WIDTH, seed=3)).codes
    assert codes.parent_index.shape == (40, 3)
    assert codes.child_index.shape == (40, 5)
    assert all(len(set(row)) == len(row) for row in codes.child_index.tolist())


@pytest.mark.parametrize("parents, children", BUDGETS)
def test_calibration_reaches_the_wanted_l0_and_rows_do_not_see_each_other(parents, children):
    model = make_model(parents, children, "rms", topk_parent=2, topk_child_total=None if children != "batch" else 3)
    random_parameters(model)
    rows = normal(400, WIDTH, seed=3)
    target = model.config.total_l0 - 0.6
    model.calibrate(rows.split(150), target)
    assert model.training
    model.eval()
    codes = model.encode(rows)
    if children == "batch":
        assert codes.l0().sum() == pytest.approx(target * 400, abs=1)
    if parents == "batch":
        assert (codes.parent_value > 0).sum() == pytest.approx(target * 2 / model.config.total_l0 * 400, abs=1)
    alone = model.encode(rows[7:8])
    assert all(torch.equal(mine[7:8], own) for mine, own in zip(codes[:4], alone[:4], strict=True))


def test_without_a_batch_budget_nothing_is_calibrated():
    model = make_model("per_row", "shared")
    model.calibrate(iter(()), 3.0)
    assert not any("budget" in name for name in model.state_dict())


@pytest.mark.parametrize("parents, children", BUDGETS)
def test_resuming_is_exact(tmp_path, parents, children):
    def fresh():
        return HierarchicalSAE(HSAEConfig(**{**HARD, "parent_budget": parents, "child_budget": children}), 6, seed=1)

    straight = train(tmp_path / "straight", model=fresh())
    train(tmp_path / "killed", model=fresh(), kill_at=20)
    resumed = train(tmp_path / "killed", model=fresh())
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")
    budgets = [budget for budget in (resumed.model.parent_budget, resumed.model.child_budget) if budget.of_batch]
    assert [budget.batches.item() for budget in budgets] == [60] * len(budgets)  # 30 steps of two micro-batches
    resumed.model.calibrate([planted_rows()], 4.0)
    resumed.model.save_pretrained(tmp_path / "model")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    state = resumed.model.state_dict()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    rows = planted_rows(seed=3)
    assert torch.equal(loaded.reconstruct(rows), resumed.model.eval().reconstruct(rows))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parent_budget": "batch"}, "parent_budget: found batch, allowed: per_row unless gate is hard"),
        (
            {"parent_budget": "batch", "gate": "hard", "magnitude": "binary"},
            "parent_budget: found batch, allowed: per_row unless magnitude is relu",
        ),
        (
            {"child_budget": "batch", "magnitude": "leaky_offset"},
            "child_budget: found batch, allowed: per_parent or shared unless magnitude is relu",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HSAEConfig(**options)
