"""The trainer: exact resume, interruptions, anchors, what training achieves."""

import json
import os
import signal

import pytest
import torch
from models import assert_equal_state, child_inits, factored_sae, normal, sae
from trainers import (
    WIDTH,
    Records,
    assert_resumes,
    assert_same_run,
    make_model,
    make_trainer,
    planted_rows,
    stages,
    train,
)

from polytope_hsae.config import FLAT_KINDS, LossOverrides, StageConfig, TeacherConfig
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.models.losses import WARMED_UP, causal_orthogonality
from polytope_hsae.phases.flat_arms import MODELS
from polytope_hsae.training.checkpoint import latest_checkpoint, load_checkpoint
from polytope_hsae.training.trainer import Diverged, Interrupted, discard_checkpoints

# -- resuming


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run with the default options: its trainer and folder."""
    folder = tmp_path_factory.mktemp("straight")
    return train(folder), folder


@pytest.mark.parametrize(
    "checkpoint_every, kills",
    [
        (17, [18]),  # dies after a checkpoint in the second stage
        (17, [20]),  # dies later: three steps and their metric lines are lost and made again
        (12, [13]),  # a checkpoint exactly at the stage boundary
        (7, [9, 13, 16, 29]),  # inside the frozen stage, and again and again
        (30, [None]),  # dies after the last checkpoint: nothing is left to train
        (30, [30]),  # dies before the first checkpoint
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, straight, checkpoint_every, kills):
    for kill_at in kills:
        dead = train(tmp_path, kill_at=kill_at, checkpoint_every=checkpoint_every)
        assert dead.step == (kill_at or 30)
    resumed = train(tmp_path, checkpoint_every=checkpoint_every)
    assert resumed.step == 30
    assert_same_run(straight[0], resumed, straight[1], tmp_path)


def test_temperature_and_warmup_run_on_through_stages(straight):
    lines = [json.loads(line) for line in (straight[1] / "metrics.jsonl").read_text().splitlines()]
    temperature = {line["step"]: line["value"] for line in lines if line["name"] == "router_temperature"}
    # The value logged after step n is the one that step n - 1 (counted from 0) used; stages do not restart it.
    assert temperature == pytest.approx({n: 1.5 - 0.8 * (n - 1) / 30 for n in range(3, 31, 3)})
    warmup = {line["step"]: line["value"] for line in lines if line["name"] == "penalty_warmup"}
    assert warmup == pytest.approx({n: min(1, (n - 1) / 20) for n in range(3, 31, 3)})


FROZEN = {"plan": stages(12, 18, freeze=["G"]), "checkpoint_every": 8, "kill_at": 9}  # killed inside the frozen stage
TIED = {"use_tied_decoders_parent": True, "use_tied_decoders_child": True, "tie_projectors": True}
BALANCE = {"gate": "hard", "balance_rate": 0.1, "rate_floor": 0.9, "rate_cap": 0.2, "rate_cap_spread": 1}
BUDGETS = [("batch", "per_parent"), ("batch", "shared"), ("per_row", "batch"), ("batch", "batch")]


def of_budgets(parents, children):
    fields = {"parent_budget": parents, "child_budget": children, "balance_rate": 0, "topk_child_total": None}
    return sae(WIDTH, "rms", 1, **fields).float()


RESUMED = {  # name: (a new model, options)
    "factored": (lambda: make_model("factored"), FROZEN),
    "tied": (lambda: make_model("factored", **TIED), FROZEN),
    "literal": (lambda: make_model("factored", causal_orth_form="literal", gate="hard"), FROZEN),
    "causal, without bias": (
        lambda: make_model("factored", norm_metric="causal", use_decoder_bias=False, project_gradient=True),
        FROZEN,
    ),
    "direct, causal": (lambda: make_model(norm_metric="causal", project_gradient=True), FROZEN),
    "joint": (lambda: sae(WIDTH, "rms", 1).float(), {}),
    "balance": (lambda: factored_sae(WIDTH, **BALANCE).float(), {}),
    **{f"{parents}, {children}": (lambda b=(parents, children): of_budgets(*b), {}) for parents, children in BUDGETS},
    **{
        kind: (lambda kind=kind: MODELS[kind](FLAT_KINDS[kind](n_latents=12, k=3, aux_weight=0.1), WIDTH), {})
        for kind in FLAT_KINDS
    },
    **{
        f"anchor {anchor}": (make_model, {"teacher": TeacherConfig(anchor=anchor), "n_teacher": 3})
        for anchor in ("frozen", "slow", "pull")
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_calibrating_and_saving_are_exact(tmp_path, name):
    fresh, options = RESUMED[name]
    straight, resumed = assert_resumes(tmp_path, fresh, **options)
    for trainer in (straight, resumed):
        trainer.model.calibrate([planted_rows()], 4.0)
    assert_equal_state(straight.model, resumed.model)
    resumed.model.save_pretrained(tmp_path / "model")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "model")
    assert_equal_state(resumed.model, loaded)
    rows = planted_rows(seed=3)
    assert torch.equal(loaded.reconstruct(rows), resumed.model.eval().reconstruct(rows))
    if name == "balance":
        assert loaded.balance.parent_bias.abs().max() > 0.2
    if name == "joint":
        assert loaded.sparsity.share != fresh().sparsity.share
    if name == "batch, batch":
        budgets = loaded.sparsity.parent_budget, loaded.sparsity.child_budget
        assert [budget.batches.item() for budget in budgets] == [60, 60]  # 30 steps of two micro-batches


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    trainer = train(tmp_path, checkpoint_every=4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000028.safetensors", "step-00000030.safetensors"]
    step, parts, metadata = load_checkpoint(tmp_path / "checkpoints" / names[0])
    assert step == 28
    assert set(parts) == {"model", "optimizer", "usage", "noise"}
    assert json.loads(metadata["stream"])["rows_consumed"] == 28 * trainer.rows_per_step
    discard_checkpoints(tmp_path)
    assert make_trainer(tmp_path).resume() is False


def test_a_broken_checkpoint_is_one_clear_line(tmp_path):
    train(tmp_path, kill_at=20)
    path = latest_checkpoint(tmp_path / "checkpoints")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step-00000017\.safetensors: not a complete safetensors file"):
        make_trainer(tmp_path).resume()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"step-00000017\.safetensors: model\.[\w.]+: found float32 \[8, ") as error:
        make_trainer(tmp_path, model=make_model(n_parents=9)).resume()
    assert "\n" not in str(error.value)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(None)
    assert trainer.resume() is False
    assert trainer.fit(Records()) == {}
    assert list(tmp_path.iterdir()) == []


# -- interruptions


def test_the_same_trainer_goes_on_after_a_signal():
    trainer = make_trainer()

    def stop(step, total):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trainer.fit(Records(), stop)
    assert trainer.step == 5
    trainer.fit(Records())
    assert trainer.step == 30


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    def poison(trainer, step):
        if step == 20:
            trainer.stream.store.rows.fill_(torch.nan)

    with pytest.raises(Diverged, match=r"the loss is nan at step 20 \(recon nan.*step-00000017\.safetensors"):
        train(tmp_path, after=poison)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path.name == "step-00000017.safetensors"
    _, parts, _ = load_checkpoint(path)
    assert all(tensor.isfinite().all() for tensor in parts["model"].values())


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters(tmp_path):
    """The loss may still be finite at that step, which may be a checkpoint's or the last."""

    def poison(trainer, step):
        if step == 29:
            trainer.model.b_E.register_hook(lambda grad: grad * torch.nan)

    with pytest.raises(Diverged, match=r"the gradient norm is nan at step 29 .*step-00000017"):
        train(tmp_path, after=poison)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000017.safetensors"


# -- stages and anchors


def test_frozen_tensors_do_not_change_by_one_bit_and_their_optimiser_state_waits():
    trainer = make_trainer(
        plan=[
            StageConfig(name="free", steps=5),
            StageConfig(name="held", steps=5, freeze=["D", "G", "b_E"]),
            StageConfig(name="free again", steps=5),
        ],
        weight_decay=0.1,
    )
    snapshots = {}

    def look(step, total):
        state = trainer.optimizer.state
        snapshots[step] = {
            name: (parameter.detach().clone(), {key: value.clone() for key, value in state[parameter].items()})
            for name, parameter in trainer.parameters.items()
        }

    trainer.fit(Records(), look)
    for name in trainer.parameters:
        (before, memory), (after, waited), (end, resumed) = (snapshots[step][name] for step in (5, 10, 15))
        held = name in ("D", "G", "b_E")
        assert torch.equal(before, after) == held
        assert all(torch.equal(memory[key], waited[key]) for key in memory) == held
        assert not torch.equal(after, end)
        assert resumed["step"].item() == (10 if held else 15)


def test_learning_rate_multipliers_and_loss_overrides_of_a_stage():
    plan = [StageConfig(name="one", steps=6, lr_mult={"E": 0.0, "Up": 2.0}, loss=LossOverrides(l1_parent=0.0))]
    trainer = make_trainer(model=make_model("factored"), plan=plan, log_every=1)
    before = trainer.model.E.detach().clone()
    records = Records()
    trainer.fit(records)
    assert torch.equal(trainer.model.E, before)
    rates = {group["names"][0]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["Up"] == pytest.approx(2 * rates["D"])
    assert "l1_parent" not in records.values
    assert set(records.values) >= {"loss", "recon", "recon_top", "l1_child", "biorth_router", "causal_orth"}


def anchored(kind, n_teacher=3, plan=None, **options):
    model = make_model(**options)
    start = {name: getattr(model, name).detach().clone() for name in ("E", "D")}
    trainer = make_trainer(
        model=model,
        plan=plan,
        n_teacher=n_teacher,
        teacher=TeacherConfig(anchor=kind, anchor_weight=20.0, anchor_lr_mult=0.05),
    )
    trainer.fit(Records())
    turned = {}
    for name, rows in start.items():
        cosine = torch.nn.functional.cosine_similarity(getattr(model, name).detach().double(), rows.double(), dim=1)
        turned[name] = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    return model, start, turned


@pytest.mark.parametrize("tie", ["init", True])
def test_a_frozen_anchor_holds_its_rows_bit_for_bit(tie):
    model, start, turned = anchored("frozen", use_tied_decoders_parent=tie)
    for name in ("E", "D"):
        rows = getattr(model, name)
        assert torch.equal(rows[:3], start[name][:3])
        assert (turned[name][3:] > 0.1).all()


@pytest.mark.parametrize("kind", ["none", "slow", "pull", "frozen"])
def test_thresholds_are_held_under_every_anchor(kind):
    model = make_model()
    before = model.b_E.detach().clone()
    trainer = make_trainer(model=model, n_teacher=3, teacher=TeacherConfig(anchor=kind, threshold=0.3))
    trainer.fit(Records())
    assert torch.equal(model.b_E[:3], before[:3])
    assert (model.b_E[3:] != before[3:]).any()


def test_slow_and_pulling_anchors_hold_the_rows_more_loosely():
    _, _, free = anchored("none")
    _, _, slow = anchored("slow")
    _, _, pull = anchored("pull")
    for name in ("E", "D"):
        assert (free[name][:3] > 2).all()
        assert (slow[name][:3] < 0.2 * free[name][:3]).all()
        assert (slow[name][:3] > 1e-3).all()
        assert pull[name][:3].mean() < 0.5 * free[name][:3].mean()
        assert (pull[name][3:] > 1).all()


# -- what training achieves


@pytest.mark.parametrize("kind", ["default", "factored", *FLAT_KINDS])
def test_planted_features_are_found(kind):
    """Sums of 2 of 10 atoms in 6 dimensions: an optimal code explains everything, the mean nothing."""
    rows = planted_rows(600)
    if kind in FLAT_KINDS:
        model = MODELS[kind](FLAT_KINDS[kind](n_latents=16, k=2), WIDTH)
    else:
        off = {"causal_ortho_lambda": 0.0, "biorth_lambda": 0.0, "l1_parent": 0.0, "l1_child": 0.0}
        model = make_model(kind, topk_parent=2, **off)
    mean = rows.mean(0)
    model.set_normalization(mean, (rows - mean).square().sum(1).mean().div(WIDTH).sqrt().item())
    model.initialize_bias([rows])

    def explained():
        model.eval()
        with torch.no_grad():
            return 1 - ((rows - model.reconstruct(rows)).square().sum() / (rows - mean).square().sum()).item()

    before, records = explained(), Records()
    make_trainer(model=model, rows=rows, plan=stages(250), batch_size=100, lr=0.02, log_every=50).fit(records)
    model.calibrate([rows], model.config.total_l0)
    # Matryoshka's loss has a floor: the errors of its small prefixes.
    least, fall = (0.9, 0.6) if kind in ("default", "factored", "topk") else (0.7, 1.0)
    assert explained() > least
    assert before < 0.7
    assert records.values["recon"][250] < fall * records.values["recon"][50]
    torch.testing.assert_close(model.D.norm(dim=1), torch.ones(len(model.D)))


def test_metrics_of_a_step():
    trainer = make_trainer(log_every=10, accumulate=2)
    records = Records()
    trainer.fit(records)
    assert records.tokens == {10: 320, 20: 640, 30: 960}
    terms = {"recon": 1.0, "recon_top": 0.1, "l1_parent": 0.01, "l1_child": 0.01, "causal_orth": 0.1}
    terms |= {"biorth_router": 0.01, "biorth_child": 0.01}
    value = {name: steps[10] for name, steps in records.values.items()}
    warm = value["penalty_warmup"]
    assert warm == pytest.approx(9 / 20)
    total = sum(weight * value[name] * (warm if name in WARMED_UP else 1) for name, weight in terms.items())
    assert value["loss"] == pytest.approx(total, rel=1e-5)
    assert "causal_orth" not in {name for name, steps in records.values.items() if 20 in steps}
    assert 0 < value["active_parents_per_sample"] + value["active_children_per_sample"] <= 7
    for name in ("full_rows_parents", "full_rows_children", "max_firing_rate", "dead_children"):
        assert 0 <= value[name] <= 1


def test_the_causal_penalty_falls_in_the_stage_that_turns_it_on():
    """A stage much shorter than the warm-up of the other penalties, at a start from a teacher."""
    names, ends = ["bird", "fish", "tool"], {}
    for weight in (0.0, 10.0):
        model = make_model("factored", causal_ortho_lambda=10.0)
        vectors = {name: normal(WIDTH, seed=number) for number, name in enumerate(names)}
        model.initialize_from_teacher(vectors, child_inits(names, WIDTH))
        losses = LossOverrides(causal_ortho_lambda=weight)
        plan = [StageConfig(name="stabilise", steps=40, freeze=["D", "G"], loss=losses)]
        start = causal_orthogonality(model.D, model.Up, model.G, model.sigma, "atom").item()
        make_trainer(model=model, plan=plan, penalty_warmup_steps=1000).fit(Records())
        ends[weight] = causal_orthogonality(model.D, model.Up, model.G, model.sigma, "atom").item() / start
    assert ends[10.0] < 0.5
    assert ends[0.0] > 0.8


def test_dead_latents_come_back_with_the_auxiliary_term():
    def trained(weight):
        model = TopKSAE(TopKConfig(n_latents=40, k=1, aux_weight=weight), WIDTH, seed=1)
        with torch.no_grad():
            model.E[:4] *= 0.01  # never chosen, so that nothing else gives them a gradient
        plan = [StageConfig(name="train", steps=60)]
        trainer = make_trainer(model=model, plan=plan, dead_after=100, lr=0.05)
        before = model.D.detach().clone()
        trainer.fit(Records())
        return (model.D.detach() - before)[:4].abs().max()

    assert trained(0.0) < 1e-3
    assert trained(1.0) > 1e-2
