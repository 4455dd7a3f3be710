"""Functions of the step, clipping, dead latents, and the lines of metrics.jsonl."""

import json

import pytest
import torch
from trainers import make_model, make_trainer, stages

from polytope_hsae.config import StageConfig, TrainingConfig
from polytope_hsae.models.codes import Codes, firings
from polytope_hsae.tracking import JsonlTracker
from polytope_hsae.training.schedule import learning_rate, penalty_warmup, rate_multiplier, stage_at
from polytope_hsae.training.trainer import clip_gradients
from polytope_hsae.training.usage import Usage

# -- usage


def one_batch(parents, values, children, child_values):
    codes = Codes(torch.tensor(parents), torch.tensor(values), torch.tensor(children), torch.tensor(child_values))
    return firings(codes, 3, 6)


def test_dead_counters_known_answer():
    usage = Usage(3, 2, torch.device("cpu"))
    batch = one_batch([[0, 1], [0, 2]], [[1.0, 0.5], [2.0, 0.0]], [[0, 2], [1, 4]], [[0.7, 0.0], [0.0, 0.0]])
    usage.update(batch)
    # Rows: 0 active twice, 1 once, 2 selected but silent. Child 0 of parent 0 fired, its sibling did not.
    assert usage.idle_parent.tolist() == [0, 0, 2]
    assert usage.idle_child.tolist() == [0, 2, 1, 1, 0, 0]
    usage.update(batch)
    assert usage.idle_parent.tolist() == [0, 0, 4]
    assert usage.idle_child.tolist() == [0, 4, 2, 2, 0, 0]
    # "Dead when not selected for n tokens": the n-th token without selection makes it dead.
    assert usage.dead_parents(4).tolist() == [False, False, True]
    assert usage.dead_parents(5).tolist() == [False, False, False]
    # A child is dead by its parent's routed tokens: parent 2 was never active, so its children are not dead.
    assert usage.dead_children(4).tolist() == [False, True, False, False, False, False]
    assert usage.dead_children(2).tolist() == [False, True, True, True, False, False]
    usage.update(one_batch([[2, 0]], [[1.0, 0.0]], [[5, 4]], [[1.0, 0.0]]))
    assert usage.idle_parent.tolist() == [1, 1, 0]
    assert usage.idle_child.tolist() == [0, 4, 2, 2, 1, 0]
    other = Usage(3, 2, torch.device("cpu"))
    other.load_state_dict(usage.state_dict())
    assert torch.equal(other.idle_child, usage.idle_child)


def test_usage_of_a_flat_model():
    usage = Usage(3, 0, torch.device("cpu"))
    none = torch.zeros(1, 0)
    usage.update(firings(Codes(torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]]), none.long(), none), 3, 0))
    assert usage.idle_parent.tolist() == [1, 0, 1]
    assert usage.dead_children(1).tolist() == []


# -- schedules


def test_learning_rate_at_its_corners():
    config = TrainingConfig(lr=2.0, warmup_steps=10, lr_end_fraction=0.1, schedule="cosine")
    assert learning_rate(config, 0, 101) == pytest.approx(0.2)
    assert learning_rate(config, 4, 101) == pytest.approx(1.0)
    assert learning_rate(config, 9, 101) == learning_rate(config, 10, 101) == pytest.approx(2.0)
    assert learning_rate(config, 55, 101) == pytest.approx(1.1)  # half way: the mean of 2.0 and 0.2
    assert learning_rate(config, 100, 101) == pytest.approx(0.2)
    rates = [learning_rate(config, step, 101) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    constant = TrainingConfig(lr=2.0, warmup_steps=10, schedule="constant")
    assert [learning_rate(constant, step, 101) for step in (0, 9, 10, 100)] == pytest.approx([0.2, 2, 2, 2])
    assert learning_rate(TrainingConfig(lr=2.0, warmup_steps=0), 0, 1) == pytest.approx(2.0)
    assert learning_rate(TrainingConfig(lr=2.0, warmup_steps=9), 3, 4) == pytest.approx(8 / 9)


def test_rates_by_tensor_and_by_group():
    assert rate_multiplier(["E"], {"router": 0.5, "D": 2.0}) == 0.5
    assert rate_multiplier(["D"], {"decoders": 0.5, "D": 2.0}) == 2.0
    assert rate_multiplier(["b_dec"], {"router": 0.5}) == 1.0
    assert rate_multiplier(["D", "E"], {"router": 0.5}) == 0.5
    with pytest.raises(ValueError, match=r"found \[0.5, 2.0\] for the tied D and E, allowed: one rate"):
        rate_multiplier(["D", "E"], {"router": 0.5, "decoders": 2.0})
    plan = [StageConfig(name="one", steps=2, lr_mult={"router": 0.5, "decoders": 2.0})]
    make_trainer(plan=plan)
    with pytest.raises(ValueError, match="tied"):
        make_trainer(plan=plan, model=make_model(use_tied_decoders_parent=True))


def test_clipping_is_exact():
    parameters = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = (torch.tensor([3.0, 0, 0]).double(), torch.tensor([0, 4.0, 0]).double())
    assert clip_gradients(parameters, 10.0) == 5
    assert clip_gradients(parameters, None) == 5
    assert parameters[0].grad.tolist() == [3, 0, 0]
    assert clip_gradients(parameters, 0.75) == 5
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0, 0.6, 0], dtype=torch.float64), rtol=1e-15, atol=0)


def test_penalty_warmup():
    config = TrainingConfig(penalty_warmup_steps=4)
    assert [penalty_warmup(config, step) for step in (0, 1, 3, 4, 9)] == [0, 0.25, 0.75, 1, 1]
    assert penalty_warmup(TrainingConfig(penalty_warmup_steps=0), 0) == 1


def test_stages_by_step():
    plan = stages(3, 1, 2)
    found = [stage_at(plan, step) for step in range(6)]
    assert [stage.config.name for stage in found] == ["stage0"] * 3 + ["stage1"] + ["stage2"] * 2
    assert [stage.start for stage in found] == [0, 0, 0, 3, 4, 4]
    with pytest.raises(IndexError, match="step 6 is past the last stage, which ends at 6"):
        stage_at(plan, 6)


# -- metrics.jsonl


def write_lines(path, arm, steps, seed=0):
    tracker = JsonlTracker(path, 2, arm, seed, 100)
    for step in steps:
        tracker.log({"loss": step / 2, "lr": 0.1}, step, step * 8)
    tracker.close()


def read_steps(path, arm):
    return [line["step"] for line in map(json.loads, path.read_text().splitlines()) if line["arm"] == arm]


def test_reopening_drops_later_lines_of_the_arm_and_an_unfinished_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write_lines(path, "a", [1, 2, 3])
    write_lines(path, "b", [1, 2, 3])
    write_lines(path, "a", [4], seed=1)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"phase": 2, "arm": "a", "seed": 0, "step": 1, "tokens": 8, "name": "loss", "value": 0.5}
    with path.open("a") as stream:
        stream.write('{"phase": 2, "arm": "a", "se')  # the process died in the middle of a line
    JsonlTracker(path, 2, "a", 0, resume_step=2).close()
    assert read_steps(path, "a") == [1, 1, 2, 2, 4, 4]  # the last two are of another seed
    assert read_steps(path, "b") == [1, 1, 2, 2, 3, 3]
    JsonlTracker(path, 2, "a", 0).close()
    assert read_steps(path, "a") == [4, 4]
