"""Parents and children chosen from a batch: gradients, slots, thresholds, calibration, files and resuming."""

import pytest
import torch
from models import SHAPE, WIDTH, factored, normal, random_parameters
from polytope_hsae.models.budget import Budget
from test_models import LOSSES, copied_tensors, dense_loss
from test_training import assert_same_run, planted_rows, train

from polytope_hsae.config import LossOverrides
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE

BUDGETS = [("batch", "per_parent"), ("batch", "shared"), ("per_row", "batch"), ("batch", "batch")]
HARD = {**SHAPE, "gate": "hard"}


def make_model(parents, children, normalize="none", **options):
    options = {"parent_budget": parents, "child_budget": children, **HARD, **options}
    return HierarchicalSAE(factored(**options), WIDTH, normalize).double()


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
    budget = Budget(1, True, 2.0, 0.5, None)
    codes = torch.tensor([[5.0, 4.0], [3.0, 0.0], [0.0, 0.0]])
    assert budget.slots(10, False) == 2
    assert budget.slots(1, False) == 1
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
        return HierarchicalSAE(factored(**{**HARD, "parent_budget": parents, "child_budget": children}), 6, seed=1)

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
        factored(**options)


# -- annealing


@pytest.mark.parametrize("parents, children", [("per_row", "shared"), *BUDGETS[1:]])
def test_k_goes_linearly_to_its_end(parents, children):
    start = {"topk_parent_start": 5, "active_children_start": 9, "k_anneal_steps": 4}
    options = {"topk_parent": 3, "topk_child_total": 3, "budget_slots": 8.0}
    model = make_model(parents, children, **options, **start)
    random_parameters(model)
    with torch.no_grad():
        model.b_E.fill_(30.0)  # every parent and child is above 0
        model.b_F.fill_(300.0)
    x = normal(11, WIDTH, seed=3)
    found = []
    for step in range(6):
        model.update_k(step)
        codes = model(x).codes
        found.append(((codes.parent_value > 0).sum().item() / 11, (codes.child_value > 0).sum().item() / 11))
    rounding = {"batch": 0.5 / 11 + 1e-9}  # of the batch's number, or of each row's
    k, K = [5, 4.5, 4, 3.5, 3, 3], [9, 7.5, 6, 4.5, 3, 3]
    assert [a for a, _ in found] == pytest.approx(k, abs=rounding.get(parents, 0.5))
    assert [c for _, c in found] == pytest.approx(K, abs=rounding.get(children, 0.5))
    assert found[0] == (5, 9)
    assert found[4] == found[5] == (3, 3)
    model.update_k(0)
    assert model.eval()(x).codes.parent_index.shape[1] == (3 if parents == "per_row" else 6)
    assert model.train()(x).codes.parent_index.shape[1] == (5 if parents == "per_row" else 6)


@pytest.mark.parametrize("parents", ["per_row", "batch"])
def test_every_parent_of_an_annealed_k_has_its_children(parents):
    start = {"topk_parent_start": 5, "k_anneal_steps": 4}
    model = make_model(parents, "per_parent", topk_parent=2, topk_child=2, topk_child_total=None, **start)
    random_parameters(model)
    with torch.no_grad():
        model.b_E.fill_(30.0)  # every parent and child is above 0
        model.b_F.fill_(300.0)
    model.update_k(0)
    codes = model(normal(11, WIDTH, seed=3)).codes
    assert (codes.parent_value > 0).sum() == 5 * 11
    assert (codes.child_value > 0).sum() == 2 * 5 * 11


def test_a_budget_reads_its_progress_from_a_tensor():
    """As the replayed step does, which must not wait for it."""
    for of_batch in (False, True):
        budget = Budget(1, of_batch, 2.0, 0.9, 3)
        codes = torch.rand(4, 6).sort(descending=True).values
        for progress in (0.0, 0.3, 0.5, 0.99):
            now = budget.at(progress)
            assert torch.equal(budget.keep(codes, now), budget.keep(codes, torch.tensor(now)))


def test_annealing_resumes_exactly(tmp_path):
    def fresh():
        options = {"parent_budget": "batch", "topk_parent_start": 6, "active_children_start": 8, "k_anneal_steps": 25}
        return HierarchicalSAE(factored(**HARD, **options), 6, seed=1)

    straight = train(tmp_path / "straight", model=fresh())
    train(tmp_path / "killed", model=fresh(), kill_at=20)
    resumed = train(tmp_path / "killed", model=fresh())
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k_anneal_steps": 5}, "k_anneal_steps: found 5, allowed: above 0 with topk_parent_start or"),
        ({"topk_parent_start": 5, "gate": "hard"}, "k_anneal_steps: found 0, allowed: above 0 with"),
        (
            {"topk_parent_start": 5, "k_anneal_steps": 5},
            "topk_parent_start: found 5, allowed: null unless gate is hard",
        ),
        ({"topk_parent_start": 999, "k_anneal_steps": 5}, "topk_parent_start: found 999, allowed: at most n_parents"),
        ({"active_children_start": 999, "k_anneal_steps": 5}, "active_children_start: found 999, allowed: at most k"),
        (
            {"active_children_start": 5, "k_anneal_steps": 5, "child_budget": "per_parent"},
            "active_children_start: found 5, allowed: null unless child_budget is shared or batch",
        ),
    ],
)
def test_annealing_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factored(**options)


# -- one budget for parents and children


def joint_model(**options):
    return make_model("joint", "batch", topk_parent=2, topk_child_total=4, budget_slots=8.0, **options)


def test_a_joint_budget_makes_the_smallest_codes_equal():
    model = joint_model()
    random_parameters(model)
    x = 2 * normal(200, WIDTH, seed=3)
    gaps = []
    for _ in range(300):
        codes = model(x).codes
        model.update_balance(codes)
        gaps.append((model.parent_budget.smallest - model.child_budget.smallest).abs().item())
    assert gaps[-1] < 0.02 < 0.1 < gaps[0]
    parents, children = (codes.parent_value > 0).sum().item(), (codes.child_value > 0).sum().item()
    assert parents != 400
    assert parents + children == pytest.approx(6 * 200, abs=1)
    model.calibrate([x], 5.0)
    codes = model.eval().encode(x)
    assert codes.l0().double().mean().item() == pytest.approx(5, abs=0.01)
    found = (codes.parent_value > 0).double().sum(1).mean().item()
    assert found == pytest.approx(5 * model.parent_share.item(), abs=0.01)


def test_gradients_of_a_joint_budget_are_those_of_a_batch_with_the_same_numbers():
    model = joint_model(**LOSSES)
    random_parameters(model)
    assert_dense(model, 2 * normal(11, WIDTH, seed=3))  # its first step has k and K_c


def test_a_joint_budget_resumes_exactly_and_is_saved(tmp_path):
    def fresh():
        options = {"parent_budget": "joint", "child_budget": "batch", "k_anneal_steps": 9, "topk_parent_start": 4}
        return HierarchicalSAE(factored(**{**HARD, **options}), 6, seed=1)

    straight = train(tmp_path / "straight", model=fresh())
    train(tmp_path / "killed", model=fresh(), kill_at=20)
    resumed = train(tmp_path / "killed", model=fresh())
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")
    assert resumed.model.parent_share != fresh().parent_share
    resumed.model.save_pretrained(tmp_path / "model")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.parent_share, resumed.model.parent_share)


def test_a_joint_budget_needs_children_of_a_batch():
    message = "parent_budget: found joint, allowed: per_row or batch unless child_budget is batch"
    with pytest.raises(ValueError, match=message):
        factored(parent_budget="joint", gate="hard")
