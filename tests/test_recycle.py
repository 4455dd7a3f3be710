"""Dead parents put to use again."""

import pytest
import torch
from factored import factored
from polytope_hsae.models.recycle import SPLIT, recycle
from test_models import SHAPE, WIDTH, generator, normal, random_parameters
from test_training import assert_same_run, make_trainer, stages, train

from polytope_hsae.config import TeacherConfig
from polytope_hsae.models.hsae import HierarchicalSAE


def make_model(width=WIDTH, **options):
    config = factored(**{**SHAPE, "gate": "hard", "n_children_per_parent": 4, **options})
    return HierarchicalSAE(config, width, "none").double()


def mask(*numbers):
    found = torch.zeros(6, dtype=torch.bool)
    found[list(numbers)] = True
    return found


EVERY = torch.ones(6, dtype=torch.bool)


def test_dead_parents_start_at_the_largest_errors():
    model = make_model(router_balance_rate=0.1)
    random_parameters(model)
    model.balance.fill_(1.0)
    with torch.no_grad():
        model.b_E[[2, 5]] = -1e3
    rows = normal(30, WIDTH, seed=3)
    before = model.eval()(rows)
    model.train()
    error = before.x - before.x_hat
    worst = error.norm(dim=1).argsort(descending=True)[:2]
    size = model.E[[0, 1, 3, 4]].norm(dim=1).mean()
    changed = recycle(model, rows, mask(2, 5), EVERY, None, generator(0))
    assert changed.tolist() == [2, 5]
    expected = error[worst] / error[worst].norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.D[[2, 5]], expected)
    torch.testing.assert_close(model.E[[2, 5]], size * expected)
    assert model.b_E[[2, 5]].tolist() == model.balance[[2, 5]].tolist() == [0, 0]
    assert model.training
    codes = model(rows).codes
    assert all((codes.parent_value[codes.parent_index == p] > 0).any() for p in (2, 5))


@pytest.mark.parametrize("tie", [True, "init"])
def test_a_crowded_parent_is_split_into_a_dead_one(tie):
    model = make_model(use_tied_decoders_parent=tie, use_tied_decoders_child=tie, tie_projectors=tie)
    model.double()
    with torch.no_grad():
        model.b_E[1] = 50.0  # in every row
        model.b_E[2] = -50.0
        model.b_F.copy_(normal(6, 4))
    old = {name: tensor.detach().clone() for name, tensor in model.tensors().items()}
    changed = recycle(model, normal(30, WIDTH, seed=3), mask(2), EVERY, 0.9, generator(0))
    assert changed.tolist() == [1, 2]
    new = model.tensors()
    apart = new["E"][[1, 2]] - old["E"][1]
    if tie != True:  # noqa: E712  # a tied E is of unit norm again
        torch.testing.assert_close(apart[0], -apart[1])
        torch.testing.assert_close(apart.norm(dim=1), SPLIT * old["E"][1].norm().expand(2))
    assert 0.5 * SPLIT < (new["D"][1] - new["D"][2]).norm() < 2.5 * SPLIT
    torch.testing.assert_close(new["D"].norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert new["b_E"][2] == 50
    assert torch.equal(new["Up"][2], old["Up"][1])
    for name in ("F", "b_F", "G"):
        torch.testing.assert_close(new[name][1, ::2], old[name][1, ::2])
        torch.testing.assert_close(new[name][2, 1::2], old[name][1, 1::2])
        torch.testing.assert_close(new[name][1, 1::2], old[name][2, 1::2])
    untouched = [0, 3, 4, 5]
    assert all(torch.equal(new[name][untouched], old[name][untouched]) for name in ("b_E", "Up", "Down", "b_F"))


def test_held_rows_and_models_without_dead_parents_stay():
    model = make_model()
    before = {name: tensor.detach().clone() for name, tensor in model.tensors().items()}
    model.b_E.data[1] = before["b_E"][1] = 50.0
    assert len(recycle(model, normal(9, WIDTH), mask(), EVERY, 0.1, generator(0))) == 0
    assert len(recycle(model, normal(9, WIDTH), mask(0), ~mask(0), None, generator(0))) == 0
    held = recycle(model, normal(9, WIDTH), mask(0), ~mask(1), 0.99, generator(0))
    assert held.tolist() == [0]  # started at an error: the only crowded parent is held
    assert torch.equal(model.E[1], before["E"][1])


def dying(**options):
    model = make_model(6, recycle_every=10, recycle_until=25, split_above=0.6, aux_weight=0.0, **options).float()
    with torch.no_grad():
        model.b_E[[2, 5]] = -1e3
        model.b_E[4] = 20.0  # in every row
    return model


def test_the_trainer_recycles_on_time_and_forgets():
    trainer = make_trainer(model=dying(), plan=stages(40), dead_after=64, log_every=1)
    moments = {}

    def on_step(step, total):
        state = trainer.optimizer.state[trainer.model.E]
        moments[step] = (
            state["exp_avg_sq"].abs().sum(1)[[2, 4, 5]].tolist(),
            trainer.usage.idle_parent[[2, 5]].tolist(),
        )

    trainer.fit(type("Quiet", (), {"log": lambda *_: None})(), on_step)
    assert moments[9][0][1] > 0
    assert moments[10][0] == [0, 0, 0]  # 4 is split, too
    assert min(moments[9][1]) > 100
    assert max(moments[10][1]) == 0
    assert min(moments[12][0]) > 0


@pytest.mark.parametrize("kill_at", [10, 15])
def test_recycling_resumes_exactly(tmp_path, kill_at):
    options = {"plan": stages(30), "dead_after": 64, "checkpoint_every": 5}
    straight = train(tmp_path / "straight", model=dying(), **options)
    train(tmp_path / "killed", model=dying(), kill_at=kill_at, **options)
    resumed = train(tmp_path / "killed", model=dying(), **options)
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")
    assert "recycled_parents" in (tmp_path / "straight" / "metrics.jsonl").read_text()


def test_an_anchor_holds_its_rows_against_recycling():
    model = dying()
    before = model.E[:3].detach().clone()
    anchor = TeacherConfig(anchor="frozen")
    trainer = make_trainer(model=model, plan=stages(30), dead_after=64, teacher=anchor, n_teacher=3)
    trainer.fit(type("Quiet", (), {"log": lambda *_: None})())
    assert torch.equal(model.E[:3], before)
    assert model.b_E[5] > -10


def test_what_cannot_be_is_refused():
    for field in ("recycle_until", "split_above"):
        with pytest.raises(ValueError, match=f"{field}: found 1.*, allowed: null unless recycle_every is above 0"):
            factored(**{field: 1})
