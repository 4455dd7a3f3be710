"""What the report advises: every rule speaks on its numbers only, and proposes a config that is valid."""

import dataclasses
import shlex
from itertools import pairwise

import pytest
from report_run import hand_made, metric, run_files, set_target, write
from safetensors import safe_open

from polytope_hsae.config import load_config
from polytope_hsae.data.corpus import PACKAGED_TOKENS
from polytope_hsae.report import advice


@pytest.fixture
def files():
    return hand_made()


def failed(files, name, **fields):
    set_target(files, name, verdict="FAIL", **fields)


def open_leakage(files, n=4):
    set_target(files, "leakage_reduction", verdict="INCONCLUSIVE", measured=0.25, ci95=[0.1, 0.4], n=n)


def no_evidence(files):
    files["phase1/evidence.json"]["main"].update(fraction_z_above_3=0.0)


def like_controls(files):
    files["phase1/evidence.json"]["pseudo_parents"].update(fraction_z_above_3=0.5)


def unmeasured(files):
    set_target(files, "purity_gain_pp", verdict="INCONCLUSIVE", measured=None, ci95=None, n=0, why="no rows")


def unreached(files):
    files["phase4/results.json"]["arms"]["teacher"]["steering_unreached"] = metric(0.5)


def words_alike(files):
    files["phase4/ablations.json"]["against_teacher"]["permuted_teacher"]["purity"]["ci95"] = [-0.1, 0.3]


def many_dead(files):
    files["phase4/results.json"]["arms"]["baseline"]["dead_parents"] = metric(0.4)


CASES = {
    "no_hierarchy": (no_evidence, "nothing to hand over", None),
    "hierarchy_like_controls": (like_controls, "Made-up parents", None),
    "nothing_measured": (unmeasured, "no rows", "corpus.max_tokens=12000"),
    "more_concepts": (open_leakage, "10.0 to 40.0", "concepts.max_parents=16"),
    "steer_at_the_end": (
        lambda files: failed(files, "steering_leakage_reduction"),
        "did not measure that",
        "concepts.label=next_token",
    ),
    "smaller_push": (unreached, "50\u00a0% of the concepts in the teacher arm", "eval.steering.target_nats=0.25"),
    "words_do_not_matter": (words_alike, "any fixed direction", "run.seed=1"),
    "costs_reconstruction": (
        lambda files: failed(files, "reconstruction_parity", measured=0.1, ci95=[0.08, 0.12]),
        "10.0\u00a0% more variance unexplained",
        None,
    ),
    "worse_than_flat": (lambda files: None, "0.700 with 8.0 active latents", "hsae.subspace_dim=8"),
    "dead_parents": (many_dead, "40\u00a0% (baseline)", "hsae.n_parents=16"),
    "repeat": (lambda files: None, "All targets pass", "run.seed=1"),
}


def test_every_rule_has_a_case():
    assert [rule.__name__ for rule in advice.RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_when_its_numbers_are_there(files, name):
    change, words, override = CASES[name]
    change(files)
    said = getattr(advice, name)(run_files(files))
    assert words in said.sentence
    assert override in said.command if override else said.command is None


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("worse_than_flat", "repeat")])
def test_a_rule_is_silent_otherwise(files, name):
    assert getattr(advice, name)(run_files(files)) is None


def test_the_flat_rule_needs_a_clear_difference(files):
    files["phase4/ablations.json"]["differences"]["flat_topk"]["ev"]["ci95"] = [-0.01, 0.2]
    assert advice.worse_than_flat(run_files(files)) is None


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_proposes_is_a_valid_config(files, name, tmp_path):
    CASES[name][0](files)
    said = getattr(advice, name)(run_files(files))
    if said.command is None:
        return
    words = shlex.split(said.command)
    assert words[:3] == ["hsae", "run", "config.yaml"]
    path = write(tmp_path, {"config.yaml": files["config.yaml"]}) / "config.yaml"
    overrides = [value for option, value in pairwise(words) if option == "--set"]
    assert load_config(str(path), overrides) != load_config(str(path))


def test_more_text_goes_as_far_as_the_corpus(files):
    run = run_files(files)

    def advised(max_tokens, **corpus):
        new = run.config.corpus.model_copy(update={"max_tokens": max_tokens, **corpus})
        config = run.config.model_copy(update={"corpus": new})
        return advice._more_text(dataclasses.replace(run, config=config), "Said.")

    with safe_open(PACKAGED_TOKENS, "np") as stored:
        assert stored.get_slice("tokens").get_shape() == [advice.PACKAGED_TOKENS]
    assert f"max_tokens={advice.PACKAGED_TOKENS}" in advised(400_000).command
    assert advised(550_000).command is None
    assert "max_tokens=12000" in advised(6_000, source="text", path="x").command  # 5,608 rows were read
    assert advised(9_000, source="text", path="x").command is None


def test_training_longer_is_a_valid_config(files, tmp_path):
    path = write(tmp_path, {"config.yaml": files["config.yaml"]}) / "config.yaml"
    words = shlex.split(advice.longer(run_files(files)))
    before = load_config(str(path))
    after = load_config(str(path), [value for option, value in pairwise(words) if option == "--set"])
    for arm in before.arms:
        steps = [sum(stage.steps for stage in config.arm_stages(arm)) for config in (before, after)]
        assert steps[1] == 2 * steps[0]


def test_advice_follows_the_numbers_in_the_rules_order(files):
    failed(files, "steering_leakage_reduction")
    open_leakage(files)
    sentences = [said.sentence for said in advice.advise(run_files(files))]
    assert [sentence.split()[0] for sentence in sentences] == ["Undecided", "Steering", "The", "Every"]
