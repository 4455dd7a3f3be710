"""Flat arms: their config, FLOPs and parameters, the sizes that `match` sets, and a run with one arm of each kind."""

import json
from types import SimpleNamespace

import pytest
import torch
from models import factored
from running import contents, hsae
from test_models import step_flops
from test_phases import small
from torch.utils.flop_counter import FlopCounterMode

from polytope_hsae.config import FLAT_KINDS, Config, ConfigError, load_config
from polytope_hsae.fileio import read_json, write_json
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.flops import latents_for, parameter_count, training_flops
from polytope_hsae.phases.flat_arms import MODELS, flat_config, match_record

KINDS = list(MODELS)


def config_of(*arms, **hsae):
    return Config(arms=[{"name": "base"}, *arms], hsae=hsae)


# -- the config


@pytest.mark.parametrize(
    "arm, message",
    [
        ({"kind": "batch"}, "arms.1.kind: found 'batch', allowed: input should be 'hsae', 'topk', 'batchtopk', "),
        ({"match_l0": "base"}, "arms.1.match_l0: found an unknown key, allowed: name, kind, init, stages, "),
        ({"match": {"l1": "base"}}, "arms.1.match.l1.[key]: found 'l1', allowed: input should be 'l0', 'params' or "),
        ({"init": "teacher"}, "arms.f.init: found teacher, allowed: random for a flat arm"),
        ({"flat": {"n_latents": 8}}, "arms.f.flat.k: found 32, allowed: at most n_latents = 8"),
        ({"flat": {"k": 2.5}}, "arms.f.flat.k: found 2.5, allowed: input should be a valid integer"),
        ({"flat": {"k": 0}}, "arms.f.flat.k: found 0, allowed: input should be greater than or equal to 1"),
        ({"flat": {"latents": 8}}, "arms.f.flat.latents: found an unknown key, allowed: n_latents, k, tied, "),
        ({"flat": {"fractions": [1.0]}}, "arms.f.flat.fractions: found an unknown key, allowed: n_latents, "),
        ({"kind": "matryoshka", "flat": {"fractions": [0.5]}}, "arms.f.flat.fractions: found [0.5], allowed: rising"),
        ({"kind": "jumprelu", "flat": {"bandwidth": 0}}, "arms.f.flat.bandwidth: found 0, allowed: input should be "),
        ({"kind": "hsae", "flat": {"k": 2}}, "arms.f.flat: found {'k': 2}, allowed: nothing unless kind is flat"),
        ({"kind": "hsae", "match": {"l0": "base"}}, "arms.f.match: found {'l0': 'base'}, allowed: nothing unless "),
        ({"match": {"params": "base", "flops": "base"}}, "arms.f.match: found params and flops, allowed: one of them"),
        ({"match": {"l0": "base", "flops": "late"}}, "arms.f.match: found {'l0': 'base', 'flops': 'late'}, allowed: "),
        ({"match": {"params": "nosuch"}}, "arms.f.match.params: found nosuch, allowed: an earlier arm"),
        ({"match": {"l0": "late"}}, "arms.f.match.l0: found late, allowed: an earlier arm"),
        ({"match": {"l0": "f"}}, "arms.f.match.l0: found f, allowed: an earlier arm"),
        ({"match": {"flops": "taught"}}, "arms.f.match.flops: found taught, allowed: an arm with init random, "),
        ({"match": {"l0": "base"}, "flat": {"k": 4}}, "arms.f.flat.k: found 4, allowed: nothing: l0 sets it"),
        ({"match": {"flops": "base"}, "flat": {"n_latents": 64}}, "arms.f.flat.n_latents: found 64, allowed: nothing"),
    ],
)
def test_what_flat_arms_may_not_have(tmp_path, arm, message):
    arm = {"name": "f", "kind": "topk", **arm}
    first = {"name": "taught", "init": "teacher"} if "taught" in str(arm) else {"name": "base"}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"arms": [first, arm, {"name": "late"}]}))
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_flat_arm_follows_its_hsae_unless_it_says_otherwise():
    shape = {"n_parents": 20, "topk_parent": 4, "n_children_per_parent": 3, "topk_child_total": 5}
    config = config_of(
        {"name": "plain", "kind": "topk", "flat": {"aux_weight": 0.3, "aux_k": 7}},
        {"name": "own", "kind": "batchtopk", "flat": {"k": 2.5, "n_latents": 30}},
        {"name": "small", "kind": "jumprelu", "hsae": {"n_parents": 10}},
        {"name": "nested", "kind": "matryoshka", "match": {"l0": "own"}},
        {"name": "whole", "kind": "topk", "match": {"l0": "own"}},
        **shape,
        recon_reduction="mean",
        project_gradient=True,
    )
    flat = {arm.name: config.arm_flat(arm) for arm in config.arms[1:]}
    assert flat["plain"].model_dump() == {
        "n_latents": 80, "k": 9, "tied": False,
        "recon_reduction": "mean", "project_gradient": True, "aux_weight": 0.3, "aux_k": 7,
    }  # fmt: skip
    assert (flat["own"].n_latents, flat["own"].k, flat["own"].aux_weight) == (30, 2.5, 0)
    assert (flat["small"].n_latents, flat["small"].k) == (40, 9)
    assert (flat["nested"].k, flat["whole"].k) == (2.5, 2)
    assert [type(flat[name]) for name in ("plain", "own", "small", "nested")] == list(FLAT_KINDS.values())


# -- parameters and FLOPs


def make_config(kind, **fields):
    return FLAT_KINDS[kind](**{"n_latents": 100, "k": 5, **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_flat_model_by_hand(kind):
    # 100 logits of width 10; 5 logits' gradients to E and to x - b_dec; 5 rows decoded, and back to D and the codes
    assert training_flops(make_config(kind), 10) == 2 * 100 * 10 + 5 * (20 + 20) + 5 * (20 + 20 + 20)
    dead = make_config(kind, aux_weight=0.1, aux_k=3)
    assert training_flops(dead, 10) == 2 * 100 * 10 + 8 * 40 + 8 * 60
    if kind != "topk":
        assert training_flops(make_config(kind, k=2.5), 10) == 2 * 100 * 10 + 250


def test_flops_of_an_hsae_by_hand():
    shape = {"n_parents": 10, "topk_parent": 2, "n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"}
    parents = 2 * 10 * 5 + 2 * (10 + 10) + 2 * 3 * 10  # logits; gradients to E and x; decode, to D and to codes
    children = 2 * 40 + 6 * 8 + 2 * (8 + 8) + 2 * (40 + 40)  # Down, F; gradients of F and Down, of their inputs
    decode = 3 * (2 * 8 + 2 * 40)  # codes times G, Up; both gradients of each

    def flops(**options):
        return training_flops(factored(**shape, **options), 5)

    assert flops() == parents + children + decode
    assert flops(l1_parent=1, l1_child=1) == flops()  # only what is selected is touched
    published = {"magnitude": "leaky_offset"}  # whose L1 is of all codes
    assert flops(**published, l1_parent=1) == flops() + (10 - 2) * 20
    assert flops(**published, l1_child=1) == flops() + (6 - 2) * 16
    assert flops(use_decoder_bias=False) == flops() - 2 * 10  # E's input needs no gradient, the residual does
    assert flops(use_decoder_bias=False, child_input="input") == flops() - 2 * 10 - 2 * 40
    assert flops(topk_child_total=1) == flops() - 16 - 80 - 3 * (8 + 40)


def test_flops_agree_with_pytorchs_counter():
    """An H-SAE's are counted but for children whose code is 0, of which no gradient is taken; a flat model's logits."""
    total, _, _ = step_flops(64, "per_parent")
    shape = {"n_parents": 64, "topk_parent": 4, "n_children_per_parent": 4, "subspace_dim": 3}
    expected = 512 * training_flops(factored(**shape, child_budget="per_parent", l1_parent=0.1), 16)
    assert 0.97 * expected < total <= expected
    model = MODELS["topk"](make_config("topk"), 10)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(7, 10))
    assert counter.get_total_flops() == 7 * (training_flops(make_config("topk"), 10) - 5 * 100)


@pytest.mark.parametrize("size_of", [parameter_count, training_flops])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_for_a_size_are_exact_to_one(kind, size_of):
    config = make_config(kind, aux_weight=0.1)

    def size(n):
        return size_of(config.model_copy(update={"n_latents": n}), 17)

    for n in (40, 41, 1000, 123_457):
        step = size(n + 1) - size(n)
        for offset, expected in ((0, n), (step // 2 - 1, n), (step // 2 + 1, n + 1)):
            assert latents_for(size_of, config, 17, size(n) + offset) == expected
    model = MODELS[kind](make_config(kind), 17)
    assert parameter_count(model.config, 17) == sum(tensor.numel() for tensor in model.parameters())


# -- sizes by another arm


@pytest.fixture
def trained(tmp_path):
    """A stand-in for a run whose first arm has these figures in train.json."""

    def make(arm, l0=6.3, params=10_000, flops=20_000):
        config = config_of({"name": "f", **arm})
        record = {
            "arm": "base", "identity": {}, "steps": 1, "tokens": 1, "parameters": params, "flops_per_row": flops,
            "teacher_parents": [], "validation": {"val_ev": 0.5, "val_l0": l0},
        }  # fmt: skip
        write_json(tmp_path / "base" / "train.json", record)
        run = SimpleNamespace(config=config, store=SimpleNamespace(width=16), arm_folder=lambda name: tmp_path / name)
        return run, config.arm("f")

    return make


def test_match_sizes_k_and_latents(trained):
    assert flat_config(*trained({"kind": "batchtopk", "match": {"l0": "base"}})).k == 6.3
    assert flat_config(*trained({"kind": "topk", "match": {"l0": "base"}})).k == 6
    assert flat_config(*trained({"kind": "topk", "match": {"l0": "base"}}, l0=0.2)).k == 1
    assert flat_config(*trained({"kind": "topk", "match": {"params": "base"}})).n_latents == round((10_000 - 16) / 33)
    sized = flat_config(*trained({"kind": "jumprelu", "match": {"l0": "base", "flops": "base"}}, flops=20_010))
    assert (sized.k, sized.n_latents) == (6.3, round((20_010 - 10 * 6.3 * 16) / 32))
    unmatched = flat_config(*trained({"kind": "topk"}))
    assert (unmatched.k, unmatched.n_latents) == (32, 8192)


def test_a_match_that_no_size_reaches_is_one_line(trained):
    with pytest.raises(ValueError, match=r"^arms\.f\.flat\.k: found 32, allowed: at most n_latents = 4$"):
        flat_config(*trained({"kind": "topk", "match": {"params": "base"}}, params=150))
    with pytest.raises(ValueError, match=r"^arms\.f\.flat\.n_latents: found -\d+, allowed: .* or equal to 1$"):
        flat_config(*trained({"kind": "topk", "match": {"flops": "base"}}, flops=100))


def test_figures_of_both_arms_are_recorded_and_a_miss_is_said(trained):
    run, arm = trained({"kind": "topk", "match": {"l0": "base", "params": "base"}})
    mine = {"validation": {"val_l0": 6.0}, "parameters": 10_015, "flops_per_row": 12_345}
    record = match_record(run, arm, mine)
    assert record == {
        "l0": {"this": 6.0, "other": 6.3, "asked": True, "matched": False},
        "params": {"this": 10_015, "other": 10_000, "asked": True, "matched": True},
        "flops": {"this": 12_345, "other": 20_000, "asked": False, "matched": False},
    }
    for l0, matched in ((6.18, True), (6.42, True), (6.17, False), (6.43, False)):
        assert match_record(run, arm, {**mine, "validation": {"val_l0": l0}})["l0"]["matched"] is matched
    run, arm = trained({"kind": "topk"})
    assert match_record(run, arm, mine) == {}


# -- a run


def test_a_run_with_one_arm_of_each_kind(tmp_path):
    arms = [
        {"name": "baseline"},
        {"name": "topk", "kind": "topk", "match": {"l0": "baseline", "params": "baseline"}},
        {"name": "batchtopk", "kind": "batchtopk", "match": {"l0": "baseline", "flops": "baseline"}},
        {"name": "jumprelu", "kind": "jumprelu", "flat": {"bandwidth": 0.5}, "match": {"l0": "baseline"}},
        {"name": "matryoshka", "kind": "matryoshka", "flat": {"k": 6.5, "n_latents": 100, "fractions": [0.2, 1.0]}},
        {"name": "teacher", "init": "teacher"},
    ]
    run, config = tmp_path / "run", small(f"arms={json.dumps(arms)}")
    answer = hsae("run", *config, "--out", run)
    assert answer.code == 0, answer.err
    records = {arm["name"]: read_json(run / "phase2" / arm["name"] / "train.json") for arm in arms[:-1]}
    base = records["baseline"]
    for name in KINDS:
        record, metrics = records[name], read_json(run / "phase4/results.json")["arms"][name]
        model = SparseAutoencoder.from_pretrained(run / "phase2" / name / "model")
        assert type(model) is MODELS[name]
        assert record["parameters"] == sum(tensor.numel() for tensor in model.parameters())
        assert record["flops_per_row"] == training_flops(model.config, model.width)
        assert metrics["ev"]["value"] is not None
        assert metrics["l0"]["value"] > 0
        if name != "matryoshka":
            assert record["match"]["l0"]["this"] == record["validation"]["val_l0"]
            assert record["match"]["l0"]["other"] == base["validation"]["val_l0"]
            assert f"phase 2: {name} and baseline: L0 " in answer.out
    assert records["matryoshka"]["match"] == base["match"] == {}
    assert records["topk"]["parameters"] == pytest.approx(base["parameters"], rel=0.01)
    assert records["batchtopk"]["flops_per_row"] == pytest.approx(base["flops_per_row"], rel=0.01)

    before = contents(run)
    for name in ("batchtopk", "jumprelu"):  # finished again from the last checkpoint, calibration included
        (run / "phase2" / name / "train.json").unlink()
    answer = hsae("run", *config, "--out", run)
    assert answer.code == 0, answer.err
    assert "jumprelu resumes at step 4" in answer.out
    assert contents(run) == before
