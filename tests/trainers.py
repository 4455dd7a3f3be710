"""Small trainings: rows, a store and a tracker in memory, trainers that can be killed and resumed."""

import torch
from models import assert_equal_state, factored_sae, sae

from polytope_hsae.config import LossOverrides, StageConfig, TrainingConfig
from polytope_hsae.data.stream import RowStream
from polytope_hsae.tracking import JsonlTracker
from polytope_hsae.training.checkpoint import latest_checkpoint
from polytope_hsae.training.trainer import HSAETrainer

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


def stages(*sizes, freeze=()):
    """Stages of the given steps; the first one freezes."""
    return [
        StageConfig(
            name=f"stage{number}",
            steps=steps,
            freeze=list(freeze) if number == 0 else [],
            loss=LossOverrides() if number == 0 else LossOverrides(causal_ortho_lambda=0.0),
        )
        for number, steps in enumerate(sizes)
    ]


def make_model(kind="default", **options):
    """An H-SAE of the default form, or of the factored one."""
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
    assert_equal_state(one.model, other.model)
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


def assert_resumes(folder, fresh, kill_at=20, **options):
    """A run that is killed and goes on equals an uninterrupted one; returns both trainers."""
    straight = train(folder / "straight", model=fresh(), **options)
    train(folder / "killed", model=fresh(), kill_at=kill_at, **options)
    resumed = train(folder / "killed", model=fresh(), **options)
    assert_same_run(straight, resumed, folder / "straight", folder / "killed")
    return straight, resumed
