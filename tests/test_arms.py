"""Every ablation of the teacher in studies/evidence is what its name says."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from polytope_hsae.config import ArmConfig, Config, load_config
from polytope_hsae.evaluation.concepts import labelled_rows
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.phases.arms import arm_concepts, arm_teacher, initial_model, initialize_teacher
from polytope_hsae.phases.measure import concept_data
from polytope_hsae.phases.run import Run
from polytope_hsae.sweep.plan import load_sweep
from polytope_hsae.teacher import Teacher

STUDY = Path(__file__).parents[1] / "studies" / "evidence" / "study.yaml"


@cache
def study_config() -> Config:
    return load_sweep(STUDY)[1]["layers.4"]


@pytest.fixture(scope="module")
def run(finished) -> Run:
    """The smoke run with the study's arms of seeds 0 and 1: its teacher is from tokens, its phase 1 is done."""
    arms = [
        arm.model_dump(mode="json", exclude_defaults=True)
        for arm in study_config().arms
        if arm.seed in (0, 1) and "recommended" not in arm.name  # a form of another size
    ]
    for arm in arms:  # the smoke model is smaller
        if "hsae" in arm:
            arm["hsae"] = {name: value if value is True else min(value, 4) for name, value in arm["hsae"].items()}
    opened = Run.open(finished, quiet=True)
    overrides = [f"arms={json.dumps(arms)}", "training.allow_unequal_budget=true", "run.threads=1"]
    opened.config = load_config("smoke", overrides)
    return opened


def teacher(run: Run, name: str, seed: int = 0) -> Teacher:
    arm = run.config.arm(f"{name}-s{seed}")
    return arm_teacher(run, arm, run.config.arm_teacher(arm), run.store)


def started(run: Run, name: str, seed: int = 0) -> HierarchicalSAE:
    arm = run.config.arm(f"{name}-s{seed}")
    model = initial_model(run, arm, run.store)
    assert isinstance(model, HierarchicalSAE)
    if arm.init != "random":
        initialize_teacher(run, arm, model, run.store)
    return model


def test_a_random_teacher_has_other_directions_and_a_permuted_one_the_concepts(run):
    real, random, permuted = (teacher(run, name) for name in ("teacher_pull", "random_teacher", "permuted_pull"))
    assert torch.cosine_similarity(random.parent_unified, real.parent_unified).abs().max() < 0.35
    assert permuted.parent_names == real.parent_names
    assert torch.cosine_similarity(permuted.parent_unified, real.parent_unified).max() < 0.9
    assert not torch.equal(permuted.parent_unified, teacher(run, "permuted_pull", seed=1).parent_unified)
    assert torch.equal(real.parent_unified, teacher(run, "teacher_pull", seed=1).parent_unified)


def test_random_projectors_keep_the_parents_alone(run):
    Q = run.concepts.n_parents
    real, baseline = started(run, "teacher_pull"), started(run, "baseline")
    for name, same in (("random_projectors", ("E", "D")), ("parents_only", ("E", "D", "F"))):
        model = started(run, name)
        torch.testing.assert_close(model.D[:Q], real.D[:Q])
        torch.testing.assert_close(model.Up, baseline.Up)
        torch.testing.assert_close(model.Down, baseline.Down)
        assert not torch.equal(model.Up[:Q], real.Up[:Q])
        if "F" in same:
            torch.testing.assert_close(model.G, baseline.G)


def test_an_arms_seed_moves_its_start_and_nothing_else(run):
    one, other = started(run, "baseline", 0), started(run, "baseline", 1)
    assert not torch.equal(one.D, other.D)
    torch.testing.assert_close(one.data_mean, other.data_mean)
    again = started(run, "baseline_freeze", 0)  # the same start, another schedule
    assert torch.equal(one.D, again.D)


@pytest.mark.parametrize("init", ["teacher", "permuted_teacher"])
def test_a_threshold_lies_between_the_logits_of_own_and_other_tokens(run, init):
    arm = ArmConfig(name="threshold", init=init, teacher={"threshold": 0.25})
    model = initial_model(run, arm, run.store)
    initialize_teacher(run, arm, model, run.store)
    concepts = arm_concepts(run, arm)
    label_N = {"next_token": "next_token", "belief": "belief_token", "current_token": "token"}[run.label]
    token_N = run.store.column("train", label_N).long()
    carried_N = torch.full_like(token_N, -1)
    rows = labelled_rows(replace(concept_data(run, "val"), concepts=concepts), "train")
    carried_N[torch.from_numpy(rows.row_N)] = torch.from_numpy(rows.parent_N)
    with torch.no_grad():
        x_Nd = model.to_normalized(run.store.acts("train", torch.arange(len(token_N))))[0] - model.b_dec
        r_N = (x_Nd @ model.E[1]).double()  # without b_E
    mean = {}
    for parent in carried_N[carried_N >= 0].unique().tolist():
        tokens = token_N[carried_N == parent].unique().tolist()
        mean[parent] = torch.stack([r_N[(carried_N == parent) & (token_N == t)].mean() for t in tokens]).mean()
    others = torch.stack([value for parent, value in mean.items() if parent != 1]).mean()
    expected = -(0.75 * others + 0.25 * mean[1])
    torch.testing.assert_close(model.b_E[1].double().detach(), expected, rtol=1e-4, atol=1e-4)
    assert not model.b_E[run.concepts.n_parents :].any()
