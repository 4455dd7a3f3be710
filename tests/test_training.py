"""The trainer: exact resume, interruptions, anchors, schedules, usage, trackers."""

import json
import os
import signal
from itertools import product

import pytest
import torch
from models import factored_sae, normal, sae
from test_models import child_inits

from polytope_hsae.config import LossOverrides, StageConfig, TeacherConfig, TrainingConfig
from polytope_hsae.data.stream import RowStream
from polytope_hsae.models.codes import Codes, firings
from polytope_hsae.models.flat import TopKConfig, TopKSAE
from polytope_hsae.models.losses import WARMED_UP, causal_orthogonality
from polytope_hsae.tracking import JsonlTracker, Trackers
from polytope_hsae.training.checkpoint import latest_checkpoint, load_checkpoint
from polytope_hsae.training.schedule import learning_rate, penalty_warmup, rate_multiplier, stage_at
from polytope_hsae.training.trainer import Diverged, HSAETrainer, Interrupted, clip_gradients, discard_checkpoints
from polytope_hsae.training.usage import Usage

WIDTH = 6


class MemoryStore:
    """An activation store of one split in memory, in three shards."""

    device = torch.device("cpu")

    def __init__(self, rows):
        self.rows = rows

    def n_rows(self, split):
        return len(self.rows)

    def shard_bounds(self, split):
        return [0, len(self.rows) // 3, len(self.rows) // 2, len(self.rows)]

    def acts(self, split, indices):
        return self.rows[indices]


def planted_rows(n=150, width=WIDTH, n_atoms=10, active=2, seed=0):
    """Rows that are sums of a few positive multiples of fixed unit atoms."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n_atoms, width, generator=generator), dim=1)
    chosen = torch.rand(n, n_atoms, generator=generator).topk(active, dim=1).indices
    amount = 1 + torch.rand(n, active, generator=generator)
    return torch.einsum("na,nad->nd", amount, atoms[chosen])


class Records:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.values = {}
        self.tokens = {}

    def log(self, values, step, tokens):
        self.tokens[step] = tokens
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    def close(self):
        pass


def stages(*sizes, freeze=(), first_loss=None):
    """Stages of the given steps; the first one freezes."""
    return [
        StageConfig(
            name=f"stage{number}",
            steps=steps,
            freeze=list(freeze) if number == 0 else [],
            loss=LossOverrides(**(first_loss or {})) if number == 0 else LossOverrides(causal_ortho_lambda=0.0),
        )
        for number, steps in enumerate(sizes)
    ]


def make_model(kind="default", **options):
    """Of the default form, of the factored form, or a flat TopK."""
    if kind == "topk":
        return TopKSAE(TopKConfig(n_latents=12, k=3, **options), WIDTH)
    losses = {"l1_parent": 0.01, "l1_child": 0.01, "biorth_lambda": 0.01, "causal_ortho_lambda": 0.1}
    shape = {"n_parents": 8, "topk_parent": 3, "n_children_per_parent": 3, "subspace_dim": 2}
    make = factored_sae if kind == "factored" else sae
    model = make(WIDTH, "rms", 1, **{**shape, **losses, **options}).float()
    root = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    model.set_metric(root @ root.T / WIDTH + 0.2 * torch.eye(WIDTH))
    return model


def make_trainer(folder=None, model=None, plan=None, rows=None, teacher=None, n_teacher=0, evaluate=None, **config):
    defaults = {
        "batch_size": 16,
        "lr": 0.01,
        "warmup_steps": 5,
        "penalty_warmup_steps": 20,
        "log_every": 3,
        "checkpoint_every": 17,
        "val_every": 8,
        "dead_after": 100,
        "dead_after_routed": 40,
    }
    store = MemoryStore(planted_rows() if rows is None else rows)
    options = TrainingConfig(**{**defaults, **config})
    return HSAETrainer(
        model or make_model(),
        RowStream(store, "train", options.batch_size, seed=3),
        plan or stages(12, 18, freeze=["D", "G"]),
        options,
        folder=folder,
        evaluate=evaluate,
        teacher=teacher,
        n_teacher=n_teacher,
        seed=4,
    )


def validation(model):
    """A metric that depends on all parameters."""
    return {"val_sum": sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())}


class KilledError(Exception):
    """Stands for kill -9."""


def train(folder, kill_at=None, after=lambda trainer, step: None, **options):
    """One process: a new trainer that resumes if it can; returns it."""
    trainer = make_trainer(folder, evaluate=validation, accumulate=2, **options)
    trainer.resume()
    tracker = JsonlTracker(folder / "metrics.jsonl", 2, "arm", 0, trainer.step)

    def on_step(step, total):
        after(trainer, step)
        if step == kill_at:
            raise KilledError

    try:
        trainer.final = trainer.fit(tracker, on_step)
    except KilledError:
        pass
    finally:
        tracker.close()
    return trainer


def assert_same_run(one, other, folder_one, folder_other):
    state, again = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    for name, parameter in one.parameters.items():
        left, right = one.optimizer.state[parameter], other.optimizer.state[other.parameters[name]]
        assert all(torch.equal(left[key], right[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert one.final == other.final != {}
    left, right = folder_one / "metrics.jsonl", folder_other / "metrics.jsonl"
    assert left.read_bytes() == right.read_bytes()
    assert (
        latest_checkpoint(folder_one / "checkpoints").read_bytes()
        == latest_checkpoint(folder_other / "checkpoints").read_bytes()
    )


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


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "factored"},
        {"kind": "factored", "use_tied_decoders_parent": True, "use_tied_decoders_child": True, "tie_projectors": True},
        {"kind": "factored", "causal_orth_form": "literal", "gate": "hard"},
        {"kind": "factored", "norm_metric": "causal", "use_decoder_bias": False, "project_gradient": True},
        {"norm_metric": "causal", "project_gradient": True},
    ],
)
def test_resume_of_other_models(tmp_path, options):
    plan = stages(12, 18, freeze=["G"])  # D stays free: the literal penalty needs nothing else
    straight = train(tmp_path / "straight", model=make_model(**options), plan=plan)
    train(tmp_path / "killed", model=make_model(**options), plan=plan, checkpoint_every=8, kill_at=9)
    resumed = train(tmp_path / "killed", model=make_model(**options), plan=plan, checkpoint_every=17)
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")


def test_resume_of_a_flat_model(tmp_path):
    straight = train(tmp_path / "straight", model=make_model("topk"))
    train(tmp_path / "killed", model=make_model("topk"), kill_at=20)
    resumed = train(tmp_path / "killed", model=make_model("topk"))
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "killed")


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


@pytest.mark.parametrize(
    "number, name, step",
    [(signal.SIGTERM, "SIGTERM", 5), (signal.SIGINT, "SIGINT", 12), (signal.SIGTERM, "SIGTERM", 30)],
)
def test_a_signal_writes_a_checkpoint_and_raises(tmp_path, straight, number, name, step):
    handler = signal.getsignal(number)

    def send(trainer, now):
        if now == step:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"{name} at step {step} of 30; checkpoint written"):
        train(tmp_path, after=send, checkpoint_every=1000)
    assert signal.getsignal(number) is handler
    assert latest_checkpoint(tmp_path / "checkpoints").name == f"step-{step:08d}.safetensors"
    assert_same_run(straight[0], train(tmp_path, checkpoint_every=1000), straight[1], tmp_path)


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


def test_norms_hold_after_every_step_of_the_trainer():
    for kind, norm_metric in product(("default", "factored"), ("euclidean", "causal")):
        model = make_model(kind, norm_metric=norm_metric)
        metric = model.sigma.double() if norm_metric == "causal" else torch.eye(WIDTH, dtype=torch.float64)

        def unit(rows, metric=metric):
            norms = torch.einsum("...d,de,...e->...", rows.double(), metric, rows.double()).sqrt()
            torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)

        def check(step, total, model=model, unit=unit):
            unit(model.D.detach())
            unit(model.atoms(slice(None)).detach())

        make_trainer(model=model).fit(Records(), check)


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


def test_an_anchor_without_rows_changes_nothing():
    reference, _, _ = anchored("none")
    for kind in ("frozen", "pull"):
        model, _, _ = anchored(kind, n_teacher=0)
        assert all(torch.equal(tensor, reference.tensors()[name]) for name, tensor in model.tensors().items())


@pytest.mark.parametrize("kind", ["frozen", "slow", "pull"])
def test_anchored_training_resumes_exactly(tmp_path, kind):
    options = {"teacher": TeacherConfig(anchor=kind), "n_teacher": 3}
    straight = train(tmp_path / "straight", **options)
    train(tmp_path / "killed", kill_at=20, **options)
    assert_same_run(straight, train(tmp_path / "killed", **options), tmp_path / "straight", tmp_path / "killed")


# -- what training achieves


@pytest.mark.parametrize("kind", ["topk", "default", "factored"])
def test_planted_features_are_found(kind):
    """Sums of 2 of 10 atoms in 6 dimensions: an optimal code explains everything, the mean nothing."""
    rows = planted_rows(600)
    model = (
        make_model("topk")
        if kind == "topk"
        else make_model(kind, topk_parent=2, causal_ortho_lambda=0.0, biorth_lambda=0.0, l1_parent=0.0, l1_child=0.0)
    )
    mean = rows.mean(0)
    model.set_normalization(mean, (rows - mean).square().sum(1).mean().div(WIDTH).sqrt().item())
    model.initialize_bias([rows])

    def explained():
        model.eval()
        with torch.no_grad():
            return 1 - ((rows - model.reconstruct(rows)).square().sum() / (rows - mean).square().sum()).item()

    before = explained()
    trainer = make_trainer(model=model, rows=rows, plan=stages(250), batch_size=100, lr=0.02, log_every=50)
    records = Records()
    trainer.fit(records)
    assert explained() > 0.9 > 0.7 > before
    assert records.values["recon"][250] < 0.6 * records.values["recon"][50]


def test_metrics_of_a_step():
    trainer = make_trainer(log_every=10, accumulate=2)
    records = Records()
    trainer.fit(records)
    assert records.tokens == {10: 320, 20: 640, 30: 960}
    terms = {
        "recon": 1.0,
        "recon_top": 0.1,
        "l1_parent": 0.01,
        "l1_child": 0.01,
        "biorth_router": 0.01,
        "biorth_child": 0.01,
        "causal_orth": 0.1,
    }
    value = {name: steps[10] for name, steps in records.values.items()}
    warm = value["penalty_warmup"]
    assert warm == pytest.approx(9 / 20)
    total = sum(weight * value[name] * (warm if name in WARMED_UP else 1) for name, weight in terms.items())
    assert value["loss"] == pytest.approx(total, rel=1e-5)
    assert "causal_orth" not in {name for name, steps in records.values.items() if 20 in steps}
    assert value["active_parents_per_sample"] > 0
    assert value["active_children_per_sample"] >= 0
    assert value["active_parents_per_sample"] + value["active_children_per_sample"] <= 7
    assert 0 <= value["full_rows_parents"] <= 1
    assert 0 <= value["full_rows_children"] <= 1
    assert 0 < value["router_entropy"] <= torch.tensor(8.0).log().item()
    assert 0 < value["max_firing_rate"] <= 1
    assert 0 <= value["dead_children"] <= 1


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


def test_the_learning_rate_of_the_published_schedule():
    """optax.warmup_cosine_decay_schedule: from lr_start at step 0 to lr after the warm-up, then to 10 % at step 100."""
    config = TrainingConfig(lr=5e-4, lr_start=1e-11, warmup_steps=10, schedule_steps=100)
    rates = [learning_rate(config, step, 60) for step in range(160)]
    assert rates[0] == 1e-11
    assert rates[5] == pytest.approx(1e-11 + (5e-4 - 1e-11) / 2)
    assert rates[10] == 5e-4
    assert rates[55] == pytest.approx(0.55 * 5e-4)
    assert rates[100] == pytest.approx(5e-5)
    assert rates[100:] == [rates[100]] * 60


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
    assert first == {
        "phase": 2,
        "arm": "a",
        "seed": 0,
        "step": 1,
        "tokens": 8,
        "name": "loss",
        "value": 0.5,
    }
    with path.open("a") as stream:
        stream.write('{"phase": 2, "arm": "a", "se')  # the process died in the middle of a line
    JsonlTracker(path, 2, "a", 0, resume_step=2).close()
    assert read_steps(path, "a") == [1, 1, 2, 2, 4, 4]  # the last two are of another seed
    assert read_steps(path, "b") == [1, 1, 2, 2, 3, 3]
    JsonlTracker(path, 2, "a", 0).close()
    assert read_steps(path, "a") == [4, 4]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_any_cut_of_the_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, "a", [1, 2])
    text = path.read_text()
    path.write_text(text[:-cut])
    JsonlTracker(path, 2, "a", 0, resume_step=9).close()
    assert path.read_text() == "".join(line + "\n" for line in text.splitlines()[:-1])


def test_several_trackers_hear_the_same():
    one, two = Records(), Records()
    trackers = Trackers([one, two])
    trackers.log({"loss": 1.0}, 3, 24)
    trackers.close()
    assert one.values == two.values == {"loss": {3: 1.0}}
