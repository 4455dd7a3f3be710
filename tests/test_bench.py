"""`hsae bench`: the floor by hand, peers that compute what ours does, refusals, and the scripts in benchmarks/."""

import json
from pathlib import Path

import pytest
import torch
from models import factored
from running import hsae, refused, script

from polytope_hsae.bench import run
from polytope_hsae.bench.floor import Ceilings, flat_parts, floor_record, hsae_parts
from polytope_hsae.bench.measure import guarded
from polytope_hsae.bench.peers import FlatTopK, NaiveHSAE, PeerStep
from polytope_hsae.bench.shapes import load_shape
from polytope_hsae.config import HSAEConfig, LossOverrides, TopKConfig
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.ops import NAIVE
from polytope_hsae.training.trainer import HSAETrainer

ROOT = Path(__file__).parents[1]
TINY = {
    "hsae.n_parents": 8, "hsae.topk_parent": 2, "hsae.n_children_per_parent": 3, "hsae.subspace_dim": 2,
    "training.batch_size": 16, "run.threads": 1,
}  # fmt: skip
TINY_SET = [f"{key}={value}" for key, value in TINY.items()]
SET = [part for one in TINY_SET for part in ("--set", one)]
PLAIN = factored(
    n_parents=8, topk_parent=2, n_children_per_parent=4, subspace_dim=2, gate="hard", child_input="input",
    child_budget="per_parent", use_encoder_bias=False, use_decoder_bias=False,
)  # fmt: skip


def test_the_floor_by_hand():
    """B 10, d 16, P 8, k 2, C 4, s 2 in float32: N = M = 20 pairs, K = 2."""
    found = {part.name: (part.bytes, part.flops) for part in hsae_parts(PLAIN, 16, 10, "float32")}
    assert found == {
        "router": (4 * (160 + 128 + 80), 2 * 10 * 8 * 16),
        "choice of parents": (4 * 80, 0),
        "router, backward": (4 * (320 + 128), 2 * 20 * 16),
        "children, forward": (4 * (320 + 8 * 2 * 20 + 80), 2 * 20 * 2 * 20),
        "decoding and errors": (4 * 60 * 16 + 4 * 320, 2 * 60 * 16 + 2 * 20 * 2),
        "codes, backward": (4 * (320 + 8 * 3 * 16), 2 * 60 * 16 + 2 * 40 * 2),
        "routed weights, backward": (4 * 320 + 4 * (8 * 5 * 16 + 2 * 8 * 4 * 2), 2 * (60 + 40) * 16 + 2 * 40 * 2),
        "Adam": (28 * 896, 0),
    }


def test_the_published_losses_make_the_router_dense():
    config = HSAEConfig.jax_compat()
    found = {part.name: part for part in hsae_parts(config, 2304, 32_512, "bf16")}
    logits = 32_512 * 16_384
    assert found["router"].flops == found["router, backward"].flops == 2 * logits * 2304
    assert found["choice of parents"].bytes == 2 * 2 * logits
    assert found["orthogonality"].flops == 4 * 2 * 16_384 * 2304**2
    assert found["Adam"].bytes == 28 * (2 * 16_384 * 2304 + 2 * 16_384 * 4 * 2304 + 2 * 16_384 * 16 * 4)
    limits = Ceilings(4.25, {"bf16": 790.0})
    assert 12 < floor_record(list(found.values()), limits, "bf16")["ms"] < 20


def test_the_flat_floor_by_hand():
    found = {part.name: (part.bytes, part.flops) for part in flat_parts(TopKConfig(n_latents=8, k=2), 16, 10, "bf16")}
    assert found["router"] == (2 * (160 + 128 + 80), 2 * 10 * 8 * 16)
    assert found["decoding and errors"] == (2 * 320 + 4 * 320, 2 * 320)
    assert found["Adam"] == (28 * (8 * 33 + 16), 0)


def test_a_part_takes_the_longer_of_its_bytes_and_its_products():
    limits = Ceilings(1e-12, {"float32": 1e-12})  # one byte and one FLOP a second
    record = floor_record(hsae_parts(PLAIN, 16, 10, "float32"), limits, "float32")
    assert record["ms"] == 1e3 * (2560 + 320 + 1792 + 2880 + 5120 + 2816 + 4352 + 25_088)
    assert record["bytes"] == 1472 + 320 + 1792 + 2880 + 5120 + 2816 + 4352 + 25_088


class Batches:
    def __init__(self, batches: list[torch.Tensor]):
        self.left = iter(batches)

    def next(self) -> torch.Tensor:
        return next(self.left)


@pytest.mark.parametrize("name", ["jax-compat", "factored"])
def test_a_step_of_the_naive_peer_is_a_step_of_ours(name):
    """Losses, clipping, AdamW and the constraints: three steps from one start, in float64."""
    shape = load_shape(name, TINY_SET + (["hsae.topk_child_total=2"] if name == "factored" else []))
    shape = shape._replace(width=32).with_training(warmup_steps=0, penalty_warmup_steps=0, schedule="constant")
    models = [HierarchicalSAE(shape.hsae, 32, shape.normalize).double() for _ in range(2)]
    for model in models:
        model.set_normalization(torch.zeros(32), 1.0)
    batches = [torch.randn(16, 32, dtype=torch.float64) for _ in range(3)]
    naive = NaiveHSAE(models[1], shape.stage.loss)
    assert models[1].router.ops == models[1].child.ops == NAIVE
    step = PeerStep(naive, shape.training, "float32")
    trainer = HSAETrainer(models[0], Batches(batches), [shape.stage], shape.training)
    for batch in batches:
        trainer.train_step(shape.stage)
        step(batch)
    for tensor, (key, expected) in zip(models[1].tensors().values(), models[0].tensors().items(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_the_plain_flat_topk_is_ours():
    config = TopKConfig(n_latents=12, k=3)
    model = TopKSAE(config, 16, "rms").double()
    plain = FlatTopK(config, 16, "rms").double()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "data" not in name})
    rows = torch.randn(20, 16, dtype=torch.float64)
    expected = model.loss_terms(model(rows), LossOverrides())["recon"][1]
    torch.testing.assert_close(plain(rows), expected)


def test_too_little_memory_is_a_why_and_halves_a_batch():
    tried = []

    def step(batch: int) -> dict:
        tried.append(batch)
        if batch > 64:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    assert run.halving(step, 256, "cpu") == {"batch": 64}
    assert tried == [256, 128, 64]
    tried.clear()
    assert "memory" in run.halving(lambda batch: step(batch + 64), 1024, "cpu")["why"]
    assert tried == [1088, 576, 320, 192, 128]  # down to a sixteenth
    assert "memory" in guarded(lambda: step(65), "cpu")["why"]


def test_a_run_prints_and_writes_its_tables(tmp_path):
    answer = hsae("bench", "--shape", "smoke", *SET, "--steps", 2, "--peers", "flat,naive", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    document = json.loads((tmp_path / "bench.json").read_text())
    text = (tmp_path / "bench.md").read_text()
    assert json.loads(answer.out) == document
    (shape,) = document["shapes"]
    names = [one["what"] for one in shape["measured"] if one["routing"] == "zipf"]
    assert names == [
        "ours, float32", "flat TopK, 8 latents, k 2", "flat TopK, 32 latents, k 4", "H-SAE, naive PyTorch",
    ]  # fmt: skip
    for one in shape["measured"]:
        assert one["rows_per_s"] == pytest.approx(16e3 / one["ms"])
        assert one["peak_gib"] is None
        assert 0 < one["max_firing_rate"] <= 1
        assert sum(one["parts"].values()) > 0
        assert f"| {one['what']} | {one['routing']} | {one['ms']:.2f} |" in text
    assert shape["measured"][0]["of_ours"] == 1
    assert "B 16." in text
    assert shape["training"]["batch_size"] == 16
    assert document["ceilings"]["copy_tb_per_s"] > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "runs/mine.yaml"], ["--shape", "'runs/mine.yaml'", "jax-compat"]),
        (["--peers", "flat,sparsify"], ["--peers", "'sparsify'", "naive"]),
        (["--routing", "square"], ["--routing", "'square'", "zipf"]),
        (["--device", "tpu"], ["--device", "'tpu'"]),
        (["--steps", "0"], ["--steps"]),
        (["--shape", "smoke", "--set", "hsae.subspace_dim=300"], ["subspace_dim", "256"]),
        (["--shape", "smoke", "--set", "hsae.n_parent=3"], ["n_parent", "n_parents"]),
        (["--shape", "smoke", "--set", "hsae.children=direct"], ["hsae.children", "direct", "factored"]),
        (["--shape", "smoke", "--set", "hsae.child_budget=batch"], ["hsae.child_budget", "batch", "shared"]),
        (["--shape", "smoke", "--set", "hsae.balance_rate=0.1"], ["hsae.balance_rate", "0.1"]),
    ],
)
def test_bad_options_are_one_line(arguments, words):
    refused(hsae("bench", *arguments), *words)


def test_scaling_continues_where_it_stopped(tmp_path):
    command = ROOT / "benchmarks/scaling.py", "--out", tmp_path, "--steps", 1, "--device", "cpu"
    answer = script(*command, "--seconds", 0)
    assert (answer.code, answer.out) == (0, "5 points left: run it again\n")
    assert script(*command).code == 0
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert list(document["curves"]) == ["P", "k", "s and C", "d", "B"]
    document["curves"]["P"][0] |= {"ms": 1.0, "batch": 1234}
    document["curves"]["d"][0] = {"point": {"d": 16}, "sizes": document["curves"]["d"][0]["sizes"], "why": "no room"}
    document["curves"]["B"] = []
    (tmp_path / "scaling.json").write_text(json.dumps(document))
    answer = script(*command)
    assert answer.out.count(" s  ") == 1
    text = (tmp_path / "scaling.md").read_text()
    assert "| P 32 | 1.00 | 1,234,000 | - |" in text
    assert "| d 16 | - | - | no room |" in text
