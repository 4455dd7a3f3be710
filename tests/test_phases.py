"""The four phases on a real (packaged) language model: artifacts, skipping, killing, interrupting, forcing, seeds."""

import json
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from running import ARMS, SMOKE, TEACHER_ARMS, contents, copy, files, hsae, refused, start, without_cards

from polytope_hsae.config import HSAEConfig
from polytope_hsae.fileio import read_json, read_tensors
from polytope_hsae.geometry import controls
from polytope_hsae.lm import LanguageModel
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.phases.arms import initial_model, initialize_teacher
from polytope_hsae.phases.measure import SHOWN
from polytope_hsae.training.trainer import HSAETrainer

NAMES = [arm["name"] for arm in ARMS]
OF_CHILDREN = {
    "dead_children", "dead_children_routed", "atoms_in_use", "atom_norm", "edge_precision", "edge_recall",
    "parent_given_child", "child_given_parent", "child_given_parent_q25", "child_given_parent_q75",
    "probe_child", "probe_parent", "probe_min",
}  # fmt: skip
TARGETS = [
    "median_angle_deg", "purity_gain_pp", "leakage_reduction", "steering_leakage_reduction", "reconstruction_parity",
]  # fmt: skip


def folder_of(run: Path, arm: str) -> Path:
    return next(path for path in (run / "phase2" / arm, run / "phase3" / arm) if path.is_dir())


# -- an uninterrupted run


def test_phase_1_files_agree_with_each_other(finished):
    manifest = read_json(finished / "activations/manifest.json")
    assert manifest["complete"] is True
    assert min(manifest["rows"].values()) >= 1
    assert sum(shard["rows"] for shard in manifest["shards"]) == sum(manifest["rows"].values())

    parents = read_json(finished / "phase1/concepts.json")["parents"]
    Q, R, d = len(parents), sum(len(parent["children"]) for parent in parents), manifest["width"]
    teacher, metadata = read_tensors(finished / "phase1/teacher.safetensors")
    assert teacher["parent.read"].shape == teacher["parent.write"].shape == (Q, d)
    assert teacher["child.delta_write"].shape == (R, d)
    assert json.loads(metadata["parent_names"]) == [parent["name"] for parent in parents]
    assert metadata["source"] == "tokens"

    evidence = read_json(finished / "phase1/evidence.json")
    assert {"main", *controls.CONTROLS, *controls.METRICS} <= set(evidence)
    assert evidence["matched_by"] == "corpus counts"
    assert evidence["residual_covariance"]["signal"]["child_auroc"]["median"] > 0.5
    for table, size in (("parents", Q), ("children", R)):
        assert {len(column) for column in evidence["main"][table].values()} == {size}
    assert evidence["main"]["fraction_z_above_3"] >= 0.8
    assert evidence["shuffled_rows"]["fraction_z_above_3"] <= 0.1
    assert evidence["shuffled_rows"]["median_beta"] is None


def test_results_have_all_arms_and_all_five_targets(finished):
    results = read_json(finished / "phase4/results.json")
    assert list(results["arms"]) == NAMES
    for name, metrics in results["arms"].items():
        assert set(metrics) >= {*SHOWN, *OF_CHILDREN}
        assert ("purity_own_slots" in metrics) == (name in [arm["name"] for arm in TEACHER_ARMS])
        for key, metric in metrics.items():
            assert set(metric) - {"why"} == {"value", "ci95", "chance", "n"}, key
            if name == "flat_topk" and key in OF_CHILDREN:
                assert metric["why"] == "a flat model has no children"
            elif key in ("absorb", "absorb_with_children"):  # too few train rows for probes that hold elsewhere
                assert metric["value"] is not None or metric["why"] == "the probes find no concept in these rows"
            elif metric["value"] is None:  # a few steps of training reach few child concepts
                assert key.startswith("child_"), (name, key, metric)
                assert metric["why"] == "no units with a value"
            else:
                assert metric["value"] is not None, (name, key, metric)
    assert [target["name"] for target in results["targets"]] == TARGETS
    for target in results["targets"]:
        assert set(target) >= {"name", "required", "measured", "ci95", "n", "verdict"}
        assert target["measured"] is not None
        assert target["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE")


def test_ablations_are_differences_of_the_results(finished):
    values = {
        name: {key: metric["value"] for key, metric in metrics.items()}
        for name, metrics in read_json(finished / "phase4/results.json")["arms"].items()
    }
    ablations = read_json(finished / "phase4/ablations.json")
    assert ablations["reference"] == "baseline"
    assert list(ablations["differences"]) == NAMES[1:]
    assert set(ablations["against_teacher"]) == set(NAMES) - {"teacher"}
    for name in NAMES[1:]:
        found = ablations["differences"][name]["ev"]["value"]
        assert found == pytest.approx(values[name]["ev"] - values["baseline"]["ev"], abs=1e-9)
    for name, differences in ablations["against_teacher"].items():  # the teacher minus the arm
        for key in ("ev", "purity"):
            assert differences[key]["value"] == pytest.approx(values["teacher"][key] - values[name][key], abs=1e-9)


def test_steering_reaches_its_dose(finished):
    results = read_json(finished / "phase4/results.json")
    steering = read_json(finished / "phase4/steering.json")
    assert set(steering["arms"]) == set(steering["children"]) == set(steering["grid"]) == set(NAMES)
    for name, records in steering["arms"].items():
        assert 0 < len(records) <= 6
        effects = [record["effect"] for record in records if record["effect"] is not None]
        assert effects == pytest.approx([0.3] * len(effects), abs=0.005)
        leakage = steering["grid"][name][0]["steering_leakage"]["value"]
        assert leakage == results["arms"][name]["steering_leakage"]["value"]
    interventions = read_json(finished / "phase4/interventions.json")
    assert interventions["ratio_invariance"]["own"]["median"]["value"] < 0.1
    cosine = interventions["agreement"]["same_words"]
    assert cosine["cosine"]["value"] > cosine["other_parents"]["value"] > cosine["random"]["value"]


def test_the_flat_model_has_the_baselines_l0_and_atoms(finished):
    arms = read_json(finished / "phase4/results.json")["arms"]
    assert arms["flat_topk"]["l0"]["value"] == pytest.approx(arms["baseline"]["l0"]["value"], rel=0.02)
    flat = SparseAutoencoder.from_pretrained(finished / "phase2/flat_topk/model")
    hierarchical = SparseAutoencoder.from_pretrained(finished / "phase2/baseline/model")
    assert flat.n_parents == hierarchical.n_parents * (1 + hierarchical.n_children)


def test_metrics_jsonl_has_every_value(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        assert line["tokens"] == 256 * line["step"]
        steps.setdefault((line["arm"], line["name"]), []).append(line["step"])
    for name in NAMES:
        for key in ("loss", "recon", "lr", "active_parents_per_sample", "dead_parents"):
            assert steps[name, key] == [4, 8, 12, 16, 20, 24], (name, key)
        assert steps[name, "val_ev"] == [12, 24]
    assert steps["baseline", "causal_orth"] == [4, 8, 12, 16, 20, 24]
    assert steps["teacher", "causal_orth"] == [4, 8]  # its second stage turns it off
    assert {"l1_parent", "l1_child", "biorth_router", "biorth_child"} <= {key for arm, key in steps if arm == "frozen"}
    last = {line["arm"]: line["value"] for line in lines if line["name"] == "val_ev"}
    trained = {name: read_json(folder_of(finished, name) / "train.json") for name in NAMES}
    assert last == {name: record["validation"]["val_ev"] for name, record in trained.items()}


def test_files_hold_no_path_host_or_time(finished):
    provenance = read_json(finished / "provenance.json")["phases"]
    assert list(provenance) == ["phase1", "phase2", "phase3", "phase4"]
    for record in provenance.values():
        assert set(record) == {"config", "inputs", "environment", "seconds"}
    made = [path for path in sorted(finished.rglob("*")) if path.suffix in (".json", ".jsonl")]
    text = [path for path in made if path.name != "provenance.json"]
    assert len(text) > 10
    words = [str(finished), str(Path.home()), str(Path(__file__).parents[1]), "/tmp", time.strftime("%Y-%m"), "seconds"]
    for path in text:
        content = path.read_text()
        found = [word for word in (*words, socket.gethostname()) if word in content]
        assert not found, (path, found)


def test_a_frozen_anchor_holds_the_teachers_rows_bit_for_bit(run, finished):
    """Those that the arm starts from, made here once more: the teacher's file has the same in float64."""
    arm = run.config.arm("frozen")
    start = initial_model(run, arm, run.store)
    initialize_teacher(run, arm, start, run.store)
    teacher, _ = read_tensors(finished / "phase1/teacher.safetensors")
    model, _ = read_tensors(finished / "phase3/frozen/model/model.safetensors")
    adapted, _ = read_tensors(finished / "phase3/teacher/model/model.safetensors")
    rows = len(teacher["parent.write"])
    for name, tensor, of_teacher in (("D", start.D, "parent.write"), ("E", start.E, "parent.read")):
        assert torch.equal(model[name][:rows], tensor[:rows])
        assert not torch.equal(adapted[name][:rows], tensor[:rows])
        cosine = torch.nn.functional.cosine_similarity(model[name][:rows].double(), teacher[of_teacher])
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)


# -- skipping, killing, interrupting


def test_a_second_run_rewrites_nothing(finished):
    before = files(finished)
    answer = hsae("run", *SMOKE, "--out", finished)
    assert answer.code == 0
    assert [line for line in answer.out.splitlines() if line.startswith("phase")] == [
        f"phase {phase}: done before" for phase in (1, 2, 3, 4)
    ]
    assert "Targets" in answer.out
    for name in (*NAMES, *TARGETS):
        assert name in answer.out
    assert hsae("run", *SMOKE, "--out", finished, "--quiet") == (0, "", "")
    assert files(finished) == before


def test_a_run_killed_five_times_leaves_the_same_bytes(finished, tmp_path):
    """kill -9 at five seeded random moments spread over the run, each shortly after a file appears.

    Files mark the moments because seconds do not: the machine may be busier in one run than in the next.
    """
    draw = random.Random(29)
    made = _files_in_order(finished)
    moments = [(made[int((number + draw.random()) / 5 * len(made))], draw.random() / 2) for number in range(5)]
    run, codes = tmp_path / "run", []
    for marker, seconds in moments:
        process = start(tmp_path / "log", "run", *SMOKE, "--out", run)
        while process.is_alive() and not (run / marker).exists():
            time.sleep(0.002)
        process.join(seconds)
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert set(codes) <= {0, -signal.SIGKILL}, (tmp_path / "log").read_text()
    assert codes.count(-signal.SIGKILL) >= 3, (codes, moments)
    process = start(tmp_path / "log", "run", *SMOKE, "--out", run)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert contents(run) == contents(finished)


def _files_in_order(run: Path) -> list[str]:
    """A run's files in the order in which they were made, but for those that are written again and again."""
    line = sorted((path.stat().st_mtime, path.relative_to(run).as_posix()) for path in run.rglob("*") if path.is_file())
    return [name for _, name in line if name not in ("metrics.jsonl", "provenance.json")]


def test_what_a_kill_left_half_written_is_removed(finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    parts = ["", "activations", "phase1", "phase2/baseline", "phase2/baseline/checkpoints", "phase3/teacher", "phase4"]
    for part in parts:
        (run / part / ".results.json.0a1b2c3d.tmp").write_text("half")
    (run / "phase3/teacher/.model.0a1b2c3d.tmp").mkdir()
    (run / "phase3/teacher/.model.0a1b2c3d.tmp/.config.json.0a1b2c3d.tmp").write_text("half")
    (run / "mine.tmp").touch()
    assert hsae("run", *SMOKE, "--out", run, "--quiet").code == 0
    (run / "mine.tmp").unlink()
    assert list(run.rglob("*.tmp")) == []
    assert contents(run) == contents(finished)


def interrupt(monkeypatch, owner, name: str, call: int, number: signal.Signals) -> None:
    """Let a method raise a signal in this process at its n-th call."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def test_signals_during_training_leave_a_checkpoint(finished, tmp_path):
    run = copy(finished, tmp_path / "run", phases=1)
    command = ("phase2", *SMOKE, "--out", run)
    for number, call, arm, step in ((signal.SIGINT, 11, "baseline", 11), (signal.SIGTERM, 18, "flat_topk", 5)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, HSAETrainer, "train_step", call, number)
            answer = hsae(*command)
        assert answer.code == 130
        assert answer.err == f"interrupted: {number.name} at step {step} of 24; checkpoint written\n"
        assert (run / f"phase2/{arm}/checkpoints/step-{step:08d}.safetensors").is_file()
        assert not (run / f"phase2/{arm}/train.json").exists()
    answer = hsae(*command)
    assert answer.code == 0
    assert "flat_topk resumes at step 5" in answer.out
    assert without_cards(contents(run, "phase2")) == without_cards(contents(finished, "phase2"))
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert (run / "metrics.jsonl").read_text().splitlines() == [line for line in lines if '"phase": 2' in line]


# -- other configs: an inner hook, beliefs

SMALL = [
    "run.threads=1",
    "corpus.max_tokens=3000", "concepts.max_parents=4", "concepts.min_test_rows=1", "training.val_every=2",
    "training.checkpoint_every=2", "training.log_every=1", "training.batch_size=128",
    "training.baseline.stages=[{name: train, steps: 4}]",
    "training.teacher.stages=[{name: stabilise, steps: 2, freeze: [D, G]}, {name: adapt, steps: 2}]",
    "eval.lm_contexts=2", "eval.steering.max_concepts=1", "eval.steering.contexts=2",
    'arms=[{name: baseline}, {name: teacher, init: teacher}, {name: permuted, init: permuted_teacher}]',
]  # fmt: skip


def small(*settings: str) -> list[str]:
    return ["smoke", *(part for setting in (*SMALL, *settings) for part in ("--set", setting))]


def test_an_inner_hook_has_a_teacher_from_activations(tmp_path):
    run, config = tmp_path / "run", small("model.hook=model.layers.2", "concepts.label=current_token")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, LanguageModel, "capture", 6, signal.SIGINT)
        answer = hsae("run", *config, "--out", run)
    assert answer.code == 130
    assert answer.err == "interrupted\n"
    assert len(list((run / "activations").glob("*.safetensors"))) >= 1
    assert not (run / "phase1/teacher.safetensors").exists()
    answer = hsae("run", *config, "--out", run)
    assert answer.code == 0, answer.err
    _, metadata = read_tensors(run / "phase1/teacher.safetensors")
    assert metadata["source"] == "activations"
    assert read_json(run / "phase1/evidence.json")["pseudo_parents"]["why"]  # too few parents for this control
    results = read_json(run / "phase4/results.json")
    controls = results["targets"][0]["controls"]
    assert controls["shuffled_rows"] > 0
    assert controls["pseudo_parents"] is None
    assert results["arms"]["teacher"]["ce_recovered"]["value"] is not None
    assert results["arms"]["teacher"]["purity"]["value"] is not None


def test_beliefs_label_rows_at_the_final_residual(tmp_path):
    config = small("concepts.label=belief", "concepts.belief_threshold=0.1")
    answer = hsae("run", *config, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    manifest = read_json(tmp_path / "run/activations/manifest.json")
    assert manifest["belief"] is True
    assert manifest["concepts_sha256"] is not None
    columns, _ = read_tensors(tmp_path / "run/activations/test-00000.safetensors")
    assert (columns["belief_concept"] >= 0).any()
    assert (columns["belief_prob"][columns["belief_concept"] >= 0] >= 0.1).all()
    results = read_json(tmp_path / "run/phase4/results.json")
    assert results["label"] == "belief"
    assert results["arms"]["teacher"]["purity"]["value"] is not None


# -- folders of another config


def test_a_folder_of_another_config_is_refused_and_left_alone(finished):
    before = files(finished)
    changes = (("eval.bootstrap", 101, 4), ("training.lr", 0.001, 2), ("geometry.shrinkage", 0.1, 1))
    for setting, value, phase in changes:
        for command in ("run", f"phase{phase}"):
            answer = hsae(command, *SMOKE, "--set", f"{setting}={value}", "--out", finished)
            refused(answer, f"{setting}: found {value}", "--force", "--out")
    refused(hsae("run", *SMOKE, "--seed", 3, "--out", finished), "run.seed: found 3", "made with 0")
    assert files(finished) == before


def test_force_makes_only_what_depends_on_the_change(finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    before = files(run)
    changed = [*SMOKE, "--set", "eval.bootstrap=101"]
    answer = hsae("run", *changed, "--out", run, "--force")
    assert answer.code == 0, answer.err
    assert [line for line in answer.out.splitlines() if "done before" in line] == [
        f"phase {phase}: done before" for phase in (1, 2, 3)
    ]
    kept = ("activations", "phase1", "phase2", "phase3", "metrics")
    kept = [name for name in without_cards(before) if name.startswith(kept)]
    after = files(run)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["phase4/results.json"] != before["phase4/results.json"]
    assert after["phase4/latents.json"][0] == before["phase4/latents.json"][0]  # it has no intervals
    assert hsae("run", *changed, "--out", run).code == 0  # the folder is now this config's
    assert files(run) == after

    answer = hsae("phase2", *changed, "--set", "training.lr=0.001", "--out", run, "--force")
    assert answer.code == 0, answer.err
    answer = hsae("phase4", *changed, "--set", "training.lr=0.001", "--out", run, "--force")
    refused(answer, "training.lr: found 0.001, but phase 3 was made with 0.003", "run phase 3 again first")
    config = [*changed, "--set", "training.lr=0.001", "--seed", "1"]
    assert hsae("run", *config, "--out", run, "--force", "--quiet").code == 0
    again = files(run)
    same = [name for name in after if again[name][0] == after[name][0] and not name.startswith("figures/")]
    assert all(name.endswith(("model/config.json", "geometry.safetensors")) for name in same), same
    assert read_json(run / "phase4/results.json")["seeds"] == [1]


def test_an_arm_whose_model_is_gone_is_finished_from_its_checkpoint(finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    (run / "phase2/baseline/model/model.safetensors").unlink()
    before = files(run, "phase2/flat_topk", "phase3")
    refused(hsae("phase4", *SMOKE, "--out", run), "phase2/baseline/model/model.safetensors: missing")
    answer = hsae("phase2", *SMOKE, "--out", run)
    assert answer.code == 0, answer.err
    assert "baseline resumes at step 24" in answer.out
    assert without_cards(contents(run)) == without_cards(contents(finished))
    assert files(run, "phase2/flat_topk", "phase3") == before
    assert hsae("phase4", *SMOKE, "--out", run).code == 0
    assert contents(run) == contents(finished)


def test_settings_of_phases_that_have_not_begun_may_change(finished, tmp_path):
    run = copy(finished, tmp_path / "run", phases=1)
    arms = json.dumps(ARMS[:1])
    config = ["smoke", "--set", f"arms={arms}", "--set", "training.baseline.stages=[{name: train, steps: 2}]"]
    answer = hsae("phase2", *config, "--out", run)
    assert answer.code == 0, answer.err
    assert read_json(run / "phase2/baseline/train.json")["steps"] == 2
    refused(hsae("phase2", *SMOKE, "--out", run), "arms.", "--force")


# -- bad inputs


def test_phases_need_the_earlier_ones(finished, tmp_path):
    for phase in (2, 3, 4):
        answer = hsae(f"phase{phase}", "smoke", "--out", tmp_path / "new")
        refused(answer, "new/activations/manifest.json: missing; run the earlier phases first")
    assert list(files(tmp_path / "new")) == ["config.yaml"]
    run = copy(finished, tmp_path / "run", phases=2)
    refused(hsae("phase4", *SMOKE, "--out", run), "phase3/teacher/model/model.safetensors: missing")


def test_the_default_form_of_an_hsae_goes_through_all_phases(tmp_path):
    defaults = HSAEConfig(n_parents=32, topk_parent=4, n_children_per_parent=6, topk_child_total=4)
    form = {name: value for name, value in defaults.model_dump(mode="json").items() if name != "causal_ortho_lambda"}
    arms = [{"name": "baseline"}, {"name": "teacher", "init": "teacher"}]
    sets = {"run.threads": 1, "arms": arms, "teacher.init": "literal"} | {f"hsae.{name}": form[name] for name in form}
    overrides = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    answer = hsae("run", "smoke", *overrides, "--out", tmp_path / "run", "--quiet")
    assert answer.code == 0, answer.err
    values = read_json(tmp_path / "run" / "phase4" / "results.json")["arms"]
    teacher = SparseAutoencoder.from_pretrained(tmp_path / "run" / "phase3" / "teacher" / "model")
    assert teacher.config == HSAEConfig(**{**form, "causal_ortho_lambda": 100.0})
    for name in ("baseline", "teacher"):
        assert values[name]["parent_given_child"]["value"] == 1.0
        assert values[name]["l0"]["value"] == pytest.approx(8, rel=0.2)
