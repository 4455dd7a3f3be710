"""Parents and children chosen from a batch: gradients, slots, thresholds and calibration."""

import pytest
import torch
from dense import LOSSES, assert_dense
from models import WIDTH, factored, factored_sae, normal, random_parameters, sae

from polytope_hsae.config import HSAEConfig
from polytope_hsae.models.codes import firings
from polytope_hsae.models.sparsity import PerBatch

OFF = {"gate": "hard", "rate_cap": None, "rate_floor": 0.0}
BUDGETS = [("batch", "per_parent"), ("batch", "shared"), ("per_row", "batch"), ("batch", "batch")]


def of_budgets(parents, children, **options):
    """Fields of a model whose rows have their own number of codes unless the budgets say otherwise."""
    total = {} if children == "batch" and parents == "joint" else {"topk_child_total": None}
    return {"parent_budget": parents, "child_budget": children, "balance_rate": 0, **total, **options}


@pytest.mark.parametrize("parents, children", BUDGETS)
@pytest.mark.parametrize("child_input", ["residual", "input"])
def test_loss_and_all_gradients_equal_a_dense_implementation(parents, children, child_input):
    enough = 8.0  # slots for every parent and child, so that nothing is cut
    model = sae(**of_budgets(parents, children, child_input=child_input, topk_parent=2, budget_slots=enough, **LOSSES))
    random_parameters(model)
    x = 2 * normal(11, WIDTH, seed=3)
    assert_dense(model, x)
    codes = model(x).codes
    for of_batch, value in ((parents == "batch", codes.parent_value), (children == "batch", codes.child_value)):
        if of_batch:  # rows differ in their numbers, and the batch has as many as it may
            assert (value > 0).sum() == 2 * 11
            assert (value > 0).sum(1).unique().numel() > 1


def test_a_budget_by_hand():
    budget = PerBatch()
    codes = torch.tensor([[5.0, 4.0], [3.0, 0.0], [0.0, 0.0]])
    assert torch.equal(budget.keep(codes, codes, 1), codes)  # three codes for three rows, all of one batch
    assert budget.threshold == 3
    budget.keep(codes + 2, codes + 2, 1)  # 7 6 5 of 7 6 5 2 2 2
    assert torch.equal(budget.threshold, torch.tensor(4.0))  # the mean of 3 and 5
    budget.keep(torch.zeros(3, 2), torch.zeros(3, 2), 1)
    torch.testing.assert_close(budget.threshold, torch.tensor(8 / 3))
    budget.batches.fill_(1000)  # from 100 on the last one weighs a hundredth
    budget.keep(codes, codes, 1)
    torch.testing.assert_close(budget.threshold, torch.tensor(8 / 3 + (3 - 8 / 3) / 100))
    assert torch.equal(budget.eval().keep(codes, codes, 1), codes)
    budget.threshold.fill_(4.0)
    kept = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.equal(budget.keep(codes, codes, 1), kept)
    assert torch.equal(budget.keep(2 * codes, codes, 1), 2 * kept)  # scores decide, codes are kept


def test_slots_by_hand():
    config = factored(parent_budget="batch", gate="hard", topk_parent=3, n_parents=10, budget_slots=1.5)
    assert (config.parent_slots, config.child_slots) == (5, 3)
    assert factored(n_parents=3, topk_parent=3).parent_slots == 3
    joint = HSAEConfig(n_parents=4, topk_parent=3, n_children_per_parent=2, topk_child_total=5)
    assert (joint.parent_slots, joint.child_slots) == (4, 8)  # no more than there are


def test_a_row_has_no_more_codes_than_slots():
    model = sae(**of_budgets("batch", "batch", topk_parent=2, budget_slots=1.5, topk_child_total=3))
    random_parameters(model)
    codes = model(3 * normal(40, WIDTH, seed=3)).codes
    assert codes.parent_index.shape == (40, 3)
    assert codes.child_index.shape == (40, 5)
    assert all(len(set(row)) == len(row) for row in codes.child_index.tolist())


@pytest.mark.parametrize("parents, children", BUDGETS)
def test_calibration_reaches_the_wanted_l0_and_rows_do_not_see_each_other(parents, children):
    model = sae(
        normalize="rms",
        **of_budgets(parents, children, topk_parent=2, topk_child_total=None if children != "batch" else 3),
    )
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
    model = sae(**of_budgets("per_row", "shared"))
    model.calibrate(iter(()), 3.0)
    assert not any("budget" in name for name in model.state_dict())


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
        (
            {"parent_budget": "joint", "gate": "hard"},
            "parent_budget: found joint, allowed: per_row or batch unless child_budget is batch",
        ),
        (
            {"children": "direct", "tie_projectors": True},
            "tie_projectors: found true, allowed: false or init unless children is factored",
        ),
        ({"balance_rate": 0.1, **OFF}, r"balance_rate: found 0\.1, allowed: 0 without rate_cap or rate_floor"),
        ({**OFF, "rate_cap": 0.2}, r"rate_cap: found 0\.2, allowed: null unless balance_rate is above 0"),
        ({**OFF, "rate_floor": 0.2}, r"rate_floor: found 0\.2, allowed: 0 unless balance_rate is above 0"),
        (
            {"gate": "hard", "balance_rate": 0.1, "rate_cap": None, "rate_floor": 0.2, "rate_cap_spread": 1},
            r"rate_cap_spread: found 1\.0, allowed: 1\.3 without rate_cap",
        ),
    ],
)
def test_budgets_and_balances_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factored(**options)


def test_a_budget_reads_its_number_from_a_tensor():
    """As a joint budget and the replayed step do, which must not wait for it."""
    budget, codes = PerBatch(), torch.rand(4, 6).sort(descending=True).values
    for wanted in (0.5, 1.25, 3.0, 5.75):
        assert torch.equal(budget.keep(codes, codes, wanted), budget.keep(codes, codes, torch.tensor(wanted)))


# -- one budget for parents and children


JOINT = {"topk_parent": 2, "topk_child_total": 4, "budget_slots": 8.0, "balance_rate": 0}


def test_a_joint_budget_makes_the_smallest_codes_equal():
    model = sae(**JOINT, **LOSSES)
    random_parameters(model)
    assert_dense(model, 2 * normal(11, WIDTH, seed=3))  # the first step has topk_parent parents and K_c children
    model = factored_sae(gate="hard", parent_budget="joint", child_budget="batch", **JOINT)
    random_parameters(model)
    x = 2 * normal(200, WIDTH, seed=3)
    gaps = []
    for _ in range(300):
        codes = model(x).codes
        model.after_batch(firings(codes, 6, 24))
        model.before_step()
        budgets = model.sparsity.parent_budget, model.sparsity.child_budget
        gaps.append((budgets[0].smallest - budgets[1].smallest).abs().item())
    assert gaps[-1] < 0.02 < 0.1 < gaps[0]
    parents, children = (codes.parent_value > 0).sum().item(), (codes.child_value > 0).sum().item()
    assert parents != 400
    assert parents + children == pytest.approx(6 * 200, abs=1)
    model.calibrate([x], 5.0)
    codes = model.eval().encode(x)
    assert codes.l0().double().mean().item() == pytest.approx(5, abs=0.01)
    found = (codes.parent_value > 0).double().sum(1).mean().item()
    assert found == pytest.approx(5 * model.sparsity.share.item(), abs=0.01)
