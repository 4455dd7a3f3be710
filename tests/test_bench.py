"""`hsae bench`: the floor by hand, peers that compute what ours does, refusals, and the scripts in benchmarks/."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import factored
from running import hsae, refused, script

from polytope_hsae.bench import jax_peer, run
from polytope_hsae.bench.floor import Ceilings, flat_parts, floor_record, hsae_parts
from polytope_hsae.bench.measure import Rows, deterministic, guarded, make_rows, max_rate, times
from polytope_hsae.bench.peers import FlatTopK, LoopHSAE, PeerStep
from polytope_hsae.bench.shapes import load_shape
from polytope_hsae.bench.table import markdown
from polytope_hsae.config import ConfigError, HSAEConfig, LossOverrides, TopKConfig
from polytope_hsae.models.flat import TopKSAE
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.training.trainer import HSAETrainer

ROOT = Path(__file__).parents[1]
TINY = {
    "hsae.n_parents": 8, "hsae.topk_parent": 2, "hsae.n_children_per_parent": 3, "hsae.subspace_dim": 2,
    "training.batch_size": 16, "run.threads": 1,
}  # fmt: skip
SET = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
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


VARIANTS = {
    "jax-compat": {"n_parents": 96},  # so many that no row has fewer than k codes: among zeros the loop picks others
    "v2-focused": {},
    "factored": {"topk_child_total": 5, "use_offdiag_biorth": True, "biorth_lambda": 0.1, "gram_lambda": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loop_has_our_loss_and_gradients(name):
    """In float64, with every loss of the config on; routing noise is off in eval mode, and L1 of all codes."""
    shape = load_shape(name)
    sizes = {"n_parents": 12, "topk_parent": 3, "n_children_per_parent": 4, "subspace_dim": 3}
    config = factored(**{**shape.losses.model_dump(), **sizes, **VARIANTS[name]})
    torch.manual_seed(1)
    model = HierarchicalSAE(config, 16, shape.normalize).double().train(name == "jax-compat")
    model.normalize_decoder_weights()
    with torch.no_grad():
        for bias in (model.b_E, model.b_F, model.b_dec):
            if bias is not None:
                bias.normal_(std=0.1)
    loop = LoopHSAE(model, config).eval()
    rows = torch.randn(40, 16, dtype=torch.float64)
    terms = model.loss_terms(model(rows), LossOverrides())
    expected = sum(weight * value for weight, value in terms.values())
    found = loop(rows)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    gradients = {name: parameter.grad for name, parameter in loop.named_parameters()}
    assert set(gradients) == set(model.tensors())
    for name, parameter in model.tensors().items():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    model.project_gradients()
    loop.project_gradients()
    torch.testing.assert_close(loop.G.grad, model.G.grad)
    model.normalize_decoder_weights()
    loop.normalize_decoder_weights()
    torch.testing.assert_close(loop.G, model.G)


def test_a_step_of_the_loop_is_a_step_of_ours():
    """Clipping, AdamW and the constraints too: three steps from one start."""
    shape = load_shape("factored", [f"{key}={value}" for key, value in TINY.items()] + ["hsae.topk_child_total=2"])
    shape = shape.with_training(warmup_steps=0, penalty_warmup_steps=0, schedule="constant")
    model = HierarchicalSAE(shape.hsae, 256, shape.normalize)
    loop = LoopHSAE(model, shape.losses)
    batches = [torch.randn(16, 256) for _ in range(3)]
    step = PeerStep(loop, shape.training, "float32")
    trainer = HSAETrainer(model, Rows(torch.cat([batches[2], *batches[:2]]), 16), [shape.stage], shape.training)
    for batch in batches:
        trainer.train_step(shape.stage)
        step(batch)
    for name, parameter in model.tensors().items():
        torch.testing.assert_close(dict(loop.named_parameters())[name], parameter, rtol=1e-3, atol=1e-5)


def test_the_plain_flat_topk_is_ours():
    config = TopKConfig(n_latents=12, k=3)
    model = TopKSAE(config, 16, "rms").double()
    plain = FlatTopK(config, 16, "rms").double()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "data" not in name})
    rows = torch.randn(20, 16, dtype=torch.float64)
    expected = model.loss_terms(model(rows), LossOverrides())["recon"][1]
    torch.testing.assert_close(plain(rows), expected)


@pytest.mark.parametrize("name", ["jax-compat", "v2-focused", "factored"])
def test_a_start_on_the_device_looks_like_a_real_one(name):
    shape = load_shape(name, ["hsae.n_parents=64", "hsae.topk_parent=8"])
    real = HierarchicalSAE(shape.hsae, shape.width, shape.normalize)
    drawn = run.start(shape, "cpu")
    for name, parameter in real.named_parameters():
        found = dict(drawn.named_parameters())[name]
        assert found.shape == parameter.shape
        assert float(found.detach().std()) == pytest.approx(float(parameter.detach().std()), rel=0.1), name
    for name, buffer in real.named_buffers():
        assert torch.equal(drawn.get_buffer(name), buffer), name


def test_zipf_rows_favour_few_parents():
    torch.manual_seed(0)
    E = torch.nn.functional.normalize(torch.randn(64, 256), dim=1)
    loads = {}
    for routing in ("uniform", "zipf"):
        rows = make_rows(routing, 32, E, 4).next()
        assert rows.shape == (32, 256)
        loads[routing] = max_rate((rows @ E.T).topk(4, dim=1).indices, 64)
    assert loads["zipf"] > 2 * loads["uniform"]


def test_the_time_limit_ends_a_measurement():
    calls = []
    assert len(times(lambda: calls.append(0), "cpu", 4, warm_up=2)) == 4
    assert len(calls) == 6
    assert len(times(lambda: calls.append(0), "cpu", 4, warm_up=0, seconds=0)) == 1


def test_too_little_memory_is_a_why_and_halves_a_peers_batch(tmp_path):
    shape = load_shape("smoke")
    bench = run.ShapeBench(shape, run.Options("cpu", 1), Ceilings(1.0, {"float32": 1.0}), lambda line: None)
    tried = []

    def step(batch: int) -> dict:
        tried.append(batch)
        if batch > 64:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    assert bench._halving(step) == {"batch": 64}
    assert tried == [256, 128, 64]

    def never(batch: int) -> dict:
        raise torch.OutOfMemoryError

    assert "memory" in bench._halving(never)["why"]
    assert "memory" in guarded(lambda: never(1), "cpu")["why"]


def test_a_loop_that_would_take_too_long_is_estimated(monkeypatch):
    shape = load_shape("smoke", ["hsae.n_parents=4096"])
    bench = run.ShapeBench(shape, run.Options("cpu", 1), Ceilings(1.0, {"float32": 1.0}), lambda line: None)
    took = {64: 100.0, 256: 4_000.0}
    monkeypatch.setattr(bench, "_loop_step", lambda routing, P, steps, batch: {"ms": took[P], "batch": batch})
    why = bench._looped("uniform")["why"]
    assert "about 82 s" in why  # 4 s for 256 parents, 20.3 ms for each of 3,840 more


def test_without_jax_there_is_a_why(monkeypatch):
    monkeypatch.setattr(jax_peer, "NEEDS", ("no_such_package",))
    found = jax_peer.measure(load_shape("smoke"), ["uniform"], "cpu", 1, 10)
    assert found == {"uniform": {"why": "no_such_package not installed"}}


def test_jax_is_measured_in_a_process_of_its_own(monkeypatch):
    for name in jax_peer.NEEDS:
        pytest.importorskip(name)
    shape = load_shape("smoke", [f"{key}={value}" for key, value in TINY.items()])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = jax_peer.measure(shape, ["zipf"], "cpu", 2, 120)["zipf"]
    assert "why" not in found
    assert found["ms"] > 0
    assert found["batch"] == 16
    assert "not finished" in jax_peer.measure(shape, ["uniform"], "cpu", 2, 0.05)["uniform"]["why"]


def test_a_run_prints_and_writes_its_tables(tmp_path):
    answer = hsae("bench", "--shape", "smoke", *SET, "--steps", 2, "--peers", "flat,loop", "--out", tmp_path)
    assert answer.code == 0, answer.err
    document = json.loads((tmp_path / "bench.json").read_text())
    text = (tmp_path / "bench.md").read_text()
    assert text.strip() in answer.out
    (shape,) = document["shapes"]
    names = [one["what"] for one in shape["measured"] if one["routing"] == "zipf"]
    assert names == [
        "ours, float32", "flat TopK, 8 latents, k 2", "flat TopK, 32 latents, k 4", "H-SAE, loop over parents",
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


def test_the_deterministic_step_is_that_of_a_run():
    def settings() -> tuple[bool, bool]:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), filled

    before = settings()
    with deterministic():
        assert settings() == (True, False)  # a run fills no fresh memory
    assert settings() == before


def test_what_has_no_numbers_says_why():
    document = run.bench(
        [load_shape("smoke", [f"{key}={value}" for key, value in TINY.items()])],
        run.Options("cpu", 1, (), ("uniform",)),
    )
    gone = {"what": "H-SAE in JAX", "routing": "uniform", "precision": "float32", "why": "jax not installed"}
    document["shapes"][0]["measured"].append(gone)
    text = markdown(document)
    assert re.search(r"\| H-SAE in JAX \| uniform( \| -){8} \|", text)
    assert "H-SAE in JAX, uniform: no numbers: jax not installed." in text


def test_json_is_one_document():
    answer = hsae("bench", "--shape", "smoke", *SET, "--steps", 1, "--peers", "none", "--routing", "uniform", "--json")
    assert answer.code == 0, answer.err
    assert [one["what"] for one in json.loads(answer.out)["shapes"][0]["measured"]] == [
        "ours, float32", "ours, float32, deterministic",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "nosuch"], ["--shape", "'nosuch'", "jax-compat"]),
        (["--peers", "flat,sparsify"], ["--peers", "'sparsify'", "loop"]),
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


def test_a_shape_is_a_name():
    with pytest.raises(ConfigError, match="--shape"):
        load_shape("runs/mine.yaml")


def test_scaling_goes_on_where_it_stopped(tmp_path):
    command = ROOT / "benchmarks/scaling.py", "--out", tmp_path, "--steps", 1, "--device", "cpu"
    answer = script(*command, "--seconds", 0)
    assert answer.code == 1
    answer = script(*command)
    assert answer.code == 0, answer.err
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert list(document["curves"]) == ["P", "k", "s and C", "d", "B"]
    page = (tmp_path / "scaling.html").read_text()
    assert page.count("<svg") == 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    document["curves"]["P"][0] |= {"rows_per_s": 1234.5}
    document["curves"]["d"][1] = {"point": {"d": 32}, "sizes": document["curves"]["d"][1]["sizes"], "why": "no room"}
    (tmp_path / "scaling.json").write_text(json.dumps(document))
    assert script(*command).code == 0
    assert "| P 32 | " in (tmp_path / "scaling.md").read_text()
    assert "1,234 |" in (tmp_path / "scaling.md").read_text()
    assert "no room" in (tmp_path / "scaling.md").read_text()


def test_on_a_cpu_both_trainings_of_the_precision_script_are_one(tmp_path):
    sets = [
        "run.threads=1", "corpus.max_tokens=3000", "corpus.context_length=128", "corpus.split=[0.4, 0.3, 0.3]",
        "geometry.permutations=100", "concepts.max_parents=4", "concepts.split=[0.5, 0.2, 0.3]",
        "hsae.n_parents=16", "hsae.topk_parent=4", "hsae.topk_child_total=4", "training.batch_size=64",
    ]  # fmt: skip
    options = [part for one in sets for part in ("--set", one)]
    answer = script(ROOT / "benchmarks/precision.py", "--out", tmp_path, "--steps", 6, "--device", "cpu", *options)
    assert answer.code == 0, answer.err
    document = json.loads((tmp_path / "precision.json").read_text())
    assert document["largest_distance"] == {"float32": 0, "float32 again": 0}
    assert len(document["curves"]["float32"]["loss"]) == 6
    assert "bf16 was not measured" in (tmp_path / "precision.md").read_text()
    assert (tmp_path / "precision.svg").read_text().startswith("<?xml")


def test_a_model_that_is_timed_keeps_its_ties():
    ties = ["hsae.use_tied_decoders_parent=true", "hsae.tie_projectors=true"]
    model = run.start(load_shape("jax-compat", ["hsae.n_parents=32", *ties]), "cpu")
    assert model.E is model.D
    assert model.Down is model.Up
    assert model.F is not model.G
