"""The JAX-compatible mode, number for number: `scripts/make_jax_fixture.py` wrote the fixture with JAX.

Sizes, tolerances and what lies in the file are in that script; both of its variants are used, P < d and P > d.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from running import hsae, refused
from safetensors import safe_open
from trainers import Records

from polytope_hsae.config import HSAEConfig, LossOverrides, StageConfig, TrainingConfig, load_config
from polytope_hsae.interop.jax_hsae import LEAVES, import_jax, model_of_tree, tensors_of_tree
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.training.schedule import learning_rate, penalty_warmup
from polytope_hsae.training.trainer import HSAETrainer, clip_gradients

FIXTURE = Path(__file__).parent / "data" / "jax_hsae.safetensors"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
PARTS = {
    "recon": "recon",
    "recon_top": "recon_top",
    "l1_parent": "l1_parent",
    "l1_child": "l1_child",
    "orth": "biorth_router",
}
TOLERANCE = {  # of loss parts, of gradient tensors, of the change after 20 steps: relative
    "float64": {"loss": 1e-9, "gradient": 1e-9, "change": 1e-7},
    "float32": {"loss": 1e-5, "gradient": 1e-4, "change": 1e-3},
}

both = pytest.mark.parametrize("dtype", list(DTYPES))
variants = pytest.mark.parametrize("variant", ["narrow", "wide"])


class Fixture:
    """The file's tensors, and what its header says."""

    def __init__(self):
        with safe_open(str(FIXTURE), framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.header = json.loads(file.metadata()["fixture"])

    def below(self, prefix):
        """Leaves by dotted name."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def model(self, variant, dtype, where="start"):
        k = self.header["configs"][variant]["k"]
        return model_of_tree(self.below(f"{variant}/{where}/"), k).to(DTYPES[dtype]).train()

    def log(self, variant, dtype, name):
        return self.tensors[f"{variant}/{dtype}/{name}"].tolist()

    def rows(self, variant, dtype):
        return self.tensors[f"{variant}/inputs"].to(DTYPES[dtype])

    def trainer(self, variant, dtype, steps):
        config = self.header["configs"][variant]
        return HSAETrainer(
            self.model(variant, dtype),
            Batches(self.rows(variant, dtype)),
            [StageConfig(name="train", steps=steps)],
            TrainingConfig(
                batch_size=config["B"],
                lr=config["peak_lr"],
                lr_start=config["first_lr"],
                warmup_steps=config["warmup_steps"],
                penalty_warmup_steps=config["warmup_steps"],
                schedule_steps=config["decay_steps"],
                grad_clip=self.header["weights"]["max_norm"],
                log_every=1,
                dead_after=1,
                dead_after_routed=1,
            ),
        )


class Batches:
    """A stream of given batches [steps, B, d]."""

    def __init__(self, rows):
        self.rows, self.place = rows, 0

    def next(self):
        self.place += 1
        return self.rows[self.place - 1]


@pytest.fixture(scope="module")
def fixture():
    return Fixture()


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@both
@variants
def test_every_loss_part_of_the_first_step(fixture, variant, dtype):
    model = fixture.model(variant, dtype)
    terms = model.loss_terms(model(fixture.rows(variant, dtype)[0]), LossOverrides())
    assert set(terms) == set(PARTS.values())
    for theirs, mine in PARTS.items():
        expected = fixture.log(variant, dtype, theirs)[0]
        assert terms[mine][1].item() == pytest.approx(expected, rel=TOLERANCE[dtype]["loss"]), mine
    weights = fixture.header["weights"]
    assert {name: weight for name, (weight, _) in terms.items()} == {
        "recon": 1.0,
        "recon_top": weights["recon_top"],
        "l1_parent": weights["l1"],
        "l1_child": weights["l1"],
        "biorth_router": weights["orth"],
    }


@both
@variants
@pytest.mark.parametrize("step", [0, 13])
def test_every_gradient_before_and_after_projection_and_clipping(fixture, variant, dtype, step):
    where = f"float64/gradients/{step}"
    config = fixture.trainer(variant, dtype, 20).config
    model = fixture.model(variant, dtype, f"{where}/parameters")
    terms = model.loss_terms(model(fixture.rows(variant, dtype)[step]), LossOverrides())
    warmup = penalty_warmup(config, step)
    free = ("recon", "recon_top")
    sum(w * (1.0 if name in free else warmup) * value for name, (w, value) in terms.items()).backward()

    def compare(stage):
        expected = tensors_of_tree(fixture.below(f"{variant}/{where}/{stage}/"))
        for name in LEAVES:
            error = relative(getattr(model, name).grad, expected[name])
            assert error <= TOLERANCE[dtype]["gradient"], (stage, name, error)

    compare("raw")
    model.project_gradients()
    compare("projected")
    norm = clip_gradients(list(model.parameters()), config.grad_clip)
    assert norm.item() == pytest.approx(
        fixture.log(variant, "float64", "grad_norm")[step], rel=TOLERANCE[dtype]["gradient"]
    )
    compare("clipped")


@both
@variants
def test_twenty_steps(fixture, variant, dtype):
    trainer, log = fixture.trainer(variant, dtype, 20), Records()
    trainer.fit(log)
    start = tensors_of_tree(fixture.below(f"{variant}/start/"))
    end = tensors_of_tree(fixture.below(f"{variant}/{dtype}/end/"))
    for name in LEAVES:
        change = getattr(trainer.model, name).detach() - start[name]
        error = relative(change, end[name].double() - start[name].double())
        assert error <= TOLERANCE[dtype]["change"], (name, error)
    assert trainer.model.router.threshold.item() == start["threshold"].item()
    limit = TOLERANCE[dtype]["change"]
    for theirs, mine in [*PARTS.items(), ("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "lr")]:
        expected = fixture.log(variant, dtype, theirs)
        assert list(log.values[mine].values()) == pytest.approx(expected, rel=limit, abs=1e-10), (
            mine
        )  # JAX's float32 loses lr 1e-11


def test_ties_go_to_the_lowest_index(fixture):
    model = model_of_tree(fixture.below("ties/parameters/"), topk_parent=3)
    model.normalize = "none"  # the rows are given in the model's units
    codes = model.encode(fixture.tensors["ties/x"])
    parents, children = fixture.tensors["ties/parents"], fixture.tensors["ties/children"]
    assert torch.equal(codes.parent_index.int(), parents.int())
    assert torch.equal(codes.parent_value, fixture.tensors["ties/parent_codes"])
    assert torch.equal(codes.child_value, fixture.tensors["ties/child_codes"])
    open_Bk = codes.parent_value > 0  # a closed parent's child is a slot with code 0, whichever it is
    flat = parents * model.n_children + children
    assert torch.equal(codes.child_index[open_Bk].int(), flat[open_Bk].int())


def test_the_tree_is_checked(fixture):
    leaves = fixture.below("narrow/start/")
    with pytest.raises(ValueError, match="found no W_up, allowed"):
        tensors_of_tree({name: leaf for name, leaf in leaves.items() if name != "W_up"})
    with pytest.raises(ValueError, match=r"found W_up of shape \(16, 3, 24\), allowed: one that fits P=16, d=24, s=3"):
        tensors_of_tree(leaves | {"W_up": leaves["W_down"]})


@pytest.fixture
def scripts(monkeypatch):
    """The JAX implementation and the orbax writer can be imported; the tests are skipped where JAX is missing."""
    for module in ("jax", "equinox", "optax", "orbax.checkpoint"):
        pytest.importorskip(module)
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / folder))


def test_live_training_repeats_the_fixture(fixture, scripts):
    import jax_hsae

    with jax_hsae.precision("float32"):
        config = jax_hsae.Config(steps=3)
        model = jax_hsae.init(config, "float32")
        _, log, _ = jax_hsae.train(model, lambda _, step: fixture.tensors["narrow/inputs"].numpy()[step], config)
    start = fixture.below("narrow/start/")
    assert all(torch.equal(torch.tensor(leaf), start[name]) for name, leaf in jax_hsae.leaves(model).items())
    for name, values in log.items():
        assert list(map(float, values)) == pytest.approx(fixture.log("narrow", "float32", name)[:3], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("layout", ["single", "manager", "zarr"])
def test_published_weights_become_a_model_of_this_package(fixture, scripts, tmp_path, layout):
    import jax_hsae
    import make_orbax_checkpoint

    made = jax_hsae.init(jax_hsae.Config(seed=4), "float32")
    make_orbax_checkpoint.save(made, tmp_path / "checkpoint", layout)
    answer = hsae("import-jax", tmp_path / "checkpoint", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "16 parents with 4 children each, width 24, 4 active parents" in answer.out
    model = HierarchicalSAE.from_pretrained(tmp_path / "out")
    assert model.config == HSAEConfig.jax_compat(16, 4, 3, 4)
    expected = tensors_of_tree({name: torch.tensor(leaf) for name, leaf in jax_hsae.leaves(made).items()})
    held = {**model.tensors(), "threshold": model.router.threshold}
    for name, tensor in expected.items():
        assert torch.equal(held[name], tensor), name
    rows = fixture.rows("narrow", "float32")[0]
    found = jax_hsae.encode(made, jax_hsae.unit_rows(rows.numpy()))
    assert torch.equal(model.encode(rows).parent_index, torch.tensor(found["parents"].tolist()))
    _, x_hat = jax_hsae.decode(made, found)
    norms = rows.norm(dim=1, keepdim=True) + 1e-6
    torch.testing.assert_close(model.reconstruct(rows), torch.tensor(x_hat.tolist()) * norms, rtol=1e-5, atol=1e-5)


def test_checkpoints_that_are_none(scripts, tmp_path):
    import jax_hsae
    import make_orbax_checkpoint

    with pytest.raises(ValueError, match="found no checkpoint, allowed"):
        import_jax(tmp_path, tmp_path / "out")
    for name in ("one", "two"):
        make_orbax_checkpoint.save(jax_hsae.init(jax_hsae.Config(), "float32"), tmp_path / name, "single")
    with pytest.raises(ValueError, match="found 2: "):
        import_jax(tmp_path, tmp_path / "out")
    assert import_jax(tmp_path / "one", tmp_path / "out", topk_parent=7).config.topk_parent == 7


def test_without_orbax_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    refused(hsae("import-jax", tmp_path, tmp_path / "out"), 'import-jax needs orbax: pip install "polytope-hsae[jax]"')


def test_the_packaged_config_is_the_published_one():
    config = load_config("jax-compat")
    assert config.hsae == HSAEConfig.jax_compat()
    assert config.data.normalize == "unit_row"
    assert (config.training.batch_size, config.training.grad_clip) == (32_512, 0.75)
    rates = [learning_rate(config.training, step, config.training.baseline.steps) for step in (0, 1000, 121_598)]
    assert rates == pytest.approx([1e-11, 5e-4, 5e-5], rel=1e-4)
    assert [penalty_warmup(config.training, step) for step in (0, 500, 1000)] == [0, 0.5, 1]
