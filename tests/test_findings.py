"""hsae findings: records, resuming, the aggregate over seeds, and a page whose words follow its numbers."""

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from running import Answer, files, hsae, refused
from tiny import packaged_texts, save_family

from polytope_hsae.config import ConfigError
from polytope_hsae.evaluation.bootstrap import Units, paired
from polytope_hsae.findings.plan import Key, load_findings, settings_hash
from polytope_hsae.findings.record import pack_units, short_evidence, unpack_units
from polytope_hsae.findings.summary import pooled, read_summary

HOOKS = ("final_residual_pre_unembed", "layers.1")
TINY: dict[str, Any] = {
    "name": "tiny",
    "config": "smoke",
    "set": {
        "run.threads": 1,
        "corpus.max_tokens": 6000,
        "data.bias_rows": 64,
        "training.batch_size": 64,
        "concepts.label": "current_token",
        "concepts.min_test_rows": 1,
        "eval.lm_contexts": 2,
        "eval.steering.contexts": 1,
        "eval.steering.max_concepts": 2,
        "training.baseline.stages": [{"name": "train", "steps": 4}],
        "training.teacher.stages": [{"name": "train", "steps": 4}],
        "hsae.causal_ortho_lambda": 0,
    },
    "seeds": [0, 1],
    "hooks": [{"hook": HOOKS[0]}, {"hook": HOOKS[1], "set": {"eval.steering.target_nats": 0.1}}],
    "arms": [
        {"name": "baseline"},
        {"name": "flat_topk", "kind": "topk", "match": {"l0": "baseline"}},
        {"name": "teacher", "init": "teacher"},
        {"name": "permuted_teacher", "init": "permuted_teacher"},
    ],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def run(path: Path, out: Path, fixtures: Path, *more: object) -> Answer:
    """`hsae findings run` with a tiny language model, on the CPU."""
    shared = ("--set", f"model.name={fixtures / 'lm'}", "--cache", fixtures / "cache", "--device", "cpu")
    return hsae("findings", "run", path, "--out", out, *shared, *more)


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fixtures")
    save_family(folder / "lm", "llama")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, fixtures) -> Path:
    """The folder of a finished tiny study with its page. Read only."""
    folder = tmp_path_factory.mktemp("findings")
    answer = run(written(folder), folder / "out", fixtures)
    assert answer.code == 0, answer.err
    answer = hsae("findings", "write", folder / "out")
    assert answer.code == 0, answer.err
    return folder / "out"


def record(folder: Path, hook: str, seed: int, arm: str) -> Any:
    return json.loads((folder / "runs" / f"{hook}-s{seed}" / f"{arm}.json").read_text())


def test_a_study_leaves_one_small_record_for_every_arm(done):
    study, _ = load_findings(done / "study.yaml")
    assert len(study.keys) == 16
    assert [key.seed for key in study.keys] == [0] * 8 + [1] * 8  # what is cut off has whole seeds
    for key in study.keys:
        found = record(done, *key)
        assert (done / "runs" / key.file).stat().st_size < 16_384
        assert found["steps"] == 4
        assert found["settings_sha256"] == settings_hash(study, key)
        assert {"ev", "purity", "steering_leakage"} <= set(found["val"]["metrics"])
        assert set(found["val"]["units"]) == {"purity", "leakage", "leakage_all_rows", "steering_leakage", "fvu"}
    for hook in HOOKS:
        kept = json.loads((done / "runs" / f"{hook}.json").read_text())
        assert kept["evidence"]["main"]["parents"]["z"]


def test_what_is_written_lies_beside_the_studys_file(tmp_path, fixtures, monkeypatch):
    here, folder = tmp_path / "here", tmp_path / "studies"
    here.mkdir(), folder.mkdir()
    path = written(folder)
    monkeypatch.chdir(here)
    model = ("--set", f"model.name={fixtures / 'lm'}", "--device", "cpu")
    answer = hsae("findings", "run", path, *model, "--limit", 1)
    assert answer.code == 0, answer.err
    assert f"records in {folder / 'tiny'}, activations and models in {folder / 'tiny' / 'cache'}" in answer.out
    assert {made.name for made in (folder / "tiny").iterdir()} == {"study.yaml", "runs", "cache"}
    assert not list(here.iterdir())


def test_the_page_calls_a_model_in_a_folder_by_the_folders_name(done, fixtures):
    assert json.loads((done / "results.json").read_text())["model"] == "textbook-lm-9m"
    _, configs = load_findings(done / "study.yaml", [f"model.name={fixtures / 'lm'}"])
    assert next(iter(configs.values())).model.title == "lm"


def test_seeds_change_the_models_and_not_the_data(done):
    one, other = (record(done, HOOKS[0], seed, "baseline") for seed in (0, 1))
    assert one["data_sha256"] == other["data_sha256"]
    assert one["settings_sha256"] != other["settings_sha256"]
    metrics = [found["val"]["metrics"] for found in (one, other)]
    assert metrics[0]["ce_clean"] == metrics[1]["ce_clean"]  # the same documents
    assert metrics[0]["ev"] != metrics[1]["ev"]
    keys = [found["val"]["units"]["purity"]["keys"] for found in (one, other)]
    assert keys[0] == keys[1]  # the same concepts


def test_a_finished_study_is_not_made_again_and_a_stopped_one_goes_on(done, fixtures, tmp_path):
    before = files(done)
    answer = run(done / "study.yaml", done, fixtures)
    assert (answer.code, files(done)) == (0, before), answer.err
    assert "16 of 16 records are there" in answer.out
    copy = shutil.copytree(done, tmp_path / "copy")
    gone = copy / "runs" / Key(HOOKS[1], 1, "flat_topk").file
    text = gone.read_text()
    gone.unlink()
    answer = run(copy / "study.yaml", copy, fixtures)
    assert answer.code == 0, answer.err
    assert "15 of 16 records are there" in answer.out
    assert json.loads(gone.read_text())["val"] == json.loads(text)["val"]


def test_workers_make_the_same_records(done, fixtures, tmp_path):
    more = ("--workers", 2, "--only", f"{HOOKS[1]}-s1/*")
    answer = run(done.parent / "tiny.yaml", tmp_path / "out", fixtures, *more, "--cache", tmp_path / "cache")
    assert answer.code == 0, answer.err
    for arm in ("baseline", "flat_topk", "teacher", "permuted_teacher"):
        one, other = (record(folder, HOOKS[1], 1, arm)["val"]["metrics"] for folder in (tmp_path / "out", done))
        for name in ("ev", "l0", "ce_spliced", "purity"):  # run.threads is 1 in both
            assert one[name]["value"] == pytest.approx(other[name]["value"], rel=1e-3), (arm, name)


def test_changed_settings_are_made_again_and_left_out_of_the_page(done, fixtures, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    study = yaml.safe_load((copy / "study.yaml").read_text())
    study["arms"][2]["teacher"] = {"anchor": "frozen"}
    (copy / "study.yaml").write_text(yaml.safe_dump(study))
    found = read_summary(copy, "val")
    assert sorted(found.left_out) == [f"{hook}-s{seed}/teacher.json" for hook in sorted(HOOKS) for seed in (0, 1)]
    assert found.arms(HOOKS[0]) == ["baseline", "flat_topk", "permuted_teacher"]
    answer = run(copy / "study.yaml", copy, fixtures, "--only", "baseline")
    assert "teacher.json: made with other settings, is made again" in answer.out
    assert answer.code == 0, answer.err


def test_the_page_needs_the_files_alone_and_is_deterministic(done, tmp_path):
    assert (done / "results.md").is_file()
    copy = shutil.copytree(done, tmp_path / "copy")
    for path in (copy / "results.md", copy / "results.json"):
        path.unlink()
    answer = hsae("findings", "write", copy)
    assert answer.code == 0, answer.err
    for name in ("results.md", "results.json"):
        assert (copy / name).read_bytes() == (done / name).read_bytes()
    page = (done / "results.md").read_text()
    for figure in sorted((done / "results").glob("*.svg")):
        assert f"](results/{figure.name})" in page
        assert figure.stat().st_size < 100_000
    results = json.loads((done / "results.json").read_text())
    assert [(one["hook"], one["seeds"]) for one in results["runs"]] == [(hook, [s]) for hook in HOOKS for s in (0, 1)]
    assert len(results["runs"][0]["targets"]) == 5
    answer = hsae("findings", "write", copy, "--page", tmp_path / "docs" / "found.md")
    assert answer.code == 0, answer.err
    assert "](found/evidence-z.svg)" in (tmp_path / "docs" / "found.md").read_text()
    refused(hsae("findings", "write", copy, "--test"), "found no test values", "hsae findings run --test")


def planted(folder: Path, purity: dict[str, float], leakage: float = 0.5, units: int = 8) -> None:
    """Give every record of a copy these purities by arm, and values that meet the other targets but for the control."""
    for path in (folder / "runs").glob("*/*.json"):
        found = json.loads(path.read_text())
        good = found["arm"] == "teacher"
        value = {
            "purity": purity.get(found["arm"], 0.2),
            "leakage": leakage if good else 0.9,
            "leakage_all_rows": 0.6 if good else 0.9,
            "steering_leakage": 0.1 if good else 0.4,
            "fvu": 0.3,
        }
        for name, number in value.items():
            jitter = 1e-3 * np.arange(units)
            found["val"]["units"][name] = {"keys": list(range(units)), "numerator": (number + jitter).tolist()}
        path.write_text(json.dumps(found))


def test_the_words_follow_the_numbers(done, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")

    def page() -> str:
        assert hsae("findings", "write", copy).code == 0
        return (copy / "results.md").read_text()

    planted(copy, {"teacher": 0.6})
    good = page()
    assert f"at 2 of 2 hooks: {HOOKS[0]} and {HOOKS[1]}; the aim is 2, which is met" in good
    assert f"Permuted control (permuted_teacher) at {HOOKS[0]}: passes none of the targets" in good
    assert "**40.0 [40.0, 40.0] PASS**" in good
    assert f"counted as leaked, over seeds: {HOOKS[0]} 33.2 [33.2, 33.2] %; {HOOKS[1]} 33.2" in good
    assert "Gain of purity at" not in good  # nothing of it is missed
    assert f"Gain of purity: seeds that pass at {HOOKS[0]} 2 of 2 (8 concepts)" in good
    assert "PASS** | 8 groups of documents |" in good
    planted(copy, {"teacher": 0.6}, units=7)
    few = page()
    assert "at 0 of 2 hooks; the aim is 2, which is missed" in few
    assert "**40.0 [40.0, 40.0] INCONCLUSIVE** | 7 concepts |" in few
    assert "Not decided: 7 concepts, 8 are needed for a verdict." in few
    planted(copy, {"teacher": 0.25, "permuted_teacher": 0.6})
    bad = page()
    assert "at 0 of 2 hooks; the aim is 2, which is missed" in bad
    assert "passes gain of purity in 2 of 2 seeds, which it should not" in bad
    assert f"**Gain of purity at {HOOKS[0]}**: PASS in 0 of 2 seeds; over seeds 5.0 [5.0, 5.0] FAIL" in bad
    assert "The estimate itself falls short." in bad


def test_arms_that_are_not_at_matched_l0_are_marked(done, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    l0 = {"baseline": 32.0, "flat_topk": 36.0, "teacher": 32.6, "permuted_teacher": 31.0}
    for path in (copy / "runs").glob("*/*.json"):
        found = json.loads(path.read_text())
        found["val"]["metrics"]["l0"]["value"] = l0[found["arm"]]
        path.write_text(json.dumps(found))
    assert hsae("findings", "write", copy).code == 0
    page = (copy / "results.md").read_text()
    assert page.count("| flat_topk | baseline † |") == len(HOOKS)
    assert page.count("| teacher | baseline |") == len(HOOKS)
    assert page.count("| permuted_teacher − baseline † |") == len(HOOKS)
    assert "| teacher − baseline |" in page
    said = "Not at matched L0: flat_topk 36.0 against 32.0 (+12 %); permuted_teacher 31.0 against 32.0 (−3 %)."
    assert page.count(said) == len(HOOKS)


def test_n_is_of_the_value_over_seeds_and_each_seed_stands_beside(done, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    planted(copy, {"teacher": 0.6})
    for path in (copy / "runs").glob(f"{HOOKS[0]}-s1/*.json"):
        found = json.loads(path.read_text())
        found["val"]["units"]["purity"]["numerator"][5:] = [None] * 3
        path.write_text(json.dumps(found))
    assert hsae("findings", "write", copy).code == 0
    rows = [line for line in (copy / "results.md").read_text().splitlines() if line.startswith("| Gain of purity")]
    assert [row.split("|")[-2].strip() for row in rows] == ["8 concepts (8 and 5)"] * 2 + ["8 concepts"] * 2
    assert "over seeds | n over seeds |" in (copy / "results.md").read_text()


def test_over_seeds_a_concept_counts_with_its_sum():
    first = [Units.mean([0.1, 0.3, np.nan], [2, 5, 7]), Units.mean([0.2, 0.5, 0.4], [2, 5, 7])]
    second = [Units.mean([0.4, np.nan, 0.5], [2, 5, 7]), Units.mean([0.6, 0.7, np.nan], [2, 5, 7])]
    one, other = pooled(list(zip(first, second, strict=True)))
    np.testing.assert_allclose(one.numerator_U, [0.3, 0.5, np.nan])  # concept 7 never has a value in both arms
    np.testing.assert_allclose(other.numerator_U, [1.0, 0.7, np.nan])
    np.testing.assert_allclose(one.denominator_U, [2, 1, np.nan])
    assert paired(one, other).value == pytest.approx(1.7 / 3 - 0.8 / 3)
    with pytest.raises(ValueError, match="found different ones in two arms of one seed"):
        pooled([(first[0], Units.mean([0.1], [2]))])


def test_units_come_back_and_many_are_added_in_groups():
    few = Units.mean([0.123456789, np.nan, 3.0], [4, 9, 11])
    packed = pack_units(few)
    assert packed == {"keys": [4, 9, 11], "numerator": [0.12346, None, 3.0]}
    np.testing.assert_allclose(unpack_units(packed).numerator_U, [0.12346, np.nan, 3.0])
    numerator, denominator = np.arange(250.0), np.full(250, 2.0)
    numerator[3] = np.nan
    many = unpack_units(pack_units(Units.ratio(numerator, denominator)))
    assert len(many.keys_U) == 100
    assert many.numerator_U.sum() == pytest.approx(np.nansum(numerator))
    assert many.denominator_U.sum() == 2.0 * 249
    parents = {"z": [1.0] * 57, "q": [0.0] * 57}
    tree = {"main": {"parents": parents, "children": {"beta": [1.0] * 257}, "beta_ci95": [0.1, 0.2]}, "why": None}
    assert short_evidence(tree) == {"main": {"parents": {"z": [1.0] * 57}, "beta_ci95": [0.1, 0.2]}, "why": None}


def test_packed_records_are_the_same_files_again(done, tmp_path):
    assert hsae("findings", "pack", done, tmp_path / "all.jsonl").out.endswith("18 records\n")
    assert hsae("findings", "unpack", tmp_path / "all.jsonl", tmp_path / "again").code == 0
    for path in (done / "runs").rglob("*.json"):
        assert (tmp_path / "again" / path.relative_to(done)).read_bytes() == path.read_bytes()
    line = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[-1])
    line["content"]["arm"] = "../../escape"
    (tmp_path / "bad.jsonl").write_text(json.dumps(line) + "\n")
    refused(hsae("findings", "unpack", tmp_path / "bad.jsonl", tmp_path / "again"), "line 1", "own name")


def test_text_from_a_folder_is_held_out_by_file(fixtures, tmp_path):
    texts = packaged_texts(60)
    for name, part in (("train", texts[:40]), ("heldout", texts[40:])):
        with lzma.open(tmp_path / f"{name}.txt.xz", "wt", encoding="utf-8") as stream:
            stream.write("\n\n".join(part))
    out = tmp_path / "out"
    more = ("--set", f"text={tmp_path}", "--only", f"{HOOKS[0]}-s0/baseline", "--set", "corpus.heldout_tokens=3000")
    answer = run(written(tmp_path), out, fixtures, *more)
    assert answer.code == 0, answer.err
    found = record(out, HOOKS[0], 0, "baseline")
    assert set(found["text_sha256"]) == {"train", "heldout"}
    assert all(len(digest) == 64 for digest in found["text_sha256"].values())
    assert 500 < found["val"]["rows"] < 1500  # half of the held-out tokens, without the start tokens
    saved = yaml.safe_load((out / "study.yaml").read_text())
    assert "text" not in saved  # a place
    assert saved["set"]["corpus.heldout_tokens"] == 3000
    answer = run(written(tmp_path), out, fixtures, *more, "--test")  # the model is there: it is only measured
    assert "has no test values, is measured again" in answer.out
    assert set(record(out, HOOKS[0], 0, "baseline")["test"]["metrics"]) == set(found["val"]["metrics"])
    refused(run(written(tmp_path), out, fixtures, "--set", "text=nowhere"), "text", "nowhere", "train.txt.xz")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0, 0]}, ["seeds", "values that differ"]),
        (
            {"hooks": [{"hook": "layers.1", "teacher": "nobody"}]},
            ["hooks.layers.1.teacher", "nobody", "permuted_teacher"],
        ),
        ({"arms": [*TINY["arms"], {"name": "more", "against": "nobody"}]}, ["arms.more.against", "'nobody'"]),
        ({"arms": [*TINY["arms"], {"name": "more", "seed": 3}]}, ["arms.more.seed", "null"]),
        ({"unknown": 1}, ["unknown", "allowed: name"]),
        ({"set": {"hsae.n_parents": 0}}, ["hsae.n_parents"]),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, changes, words):
    refused(hsae("findings", "run", written(tmp_path, **changes)), *words)


def test_options_that_cannot_be_are_refused_in_one_line(done, fixtures, tmp_path):
    refused(run(done / "study.yaml", done, fixtures, "--only", "nobody"), "--only", "nobody", "baseline")
    refused(hsae("findings", "write", tmp_path), "study.yaml")
    with pytest.raises(ConfigError, match="allowed: a YAML file"):
        load_findings(tmp_path / "none.yaml")


@pytest.mark.parametrize(("name", "records"), [("evidence", 45 * 9), ("evidence-small", 60)])
def test_the_studies_of_the_repository_are_some(name, records):
    study, configs = load_findings(Path(__file__).parents[1] / "studies" / name / "study.yaml")
    assert (study.name, len(study.keys)) == (name, records)
    assert len(study.seeds) >= 3
    for plan in study.hooks:
        assert study.arm(plan.teacher).init == "teacher"
        assert study.arm(plan.control).init == "permuted_teacher"
        final = plan.hook == HOOKS[0]
        assert configs[plan.hook].concepts.label == ("next_token" if final else "current_token")
        assert configs[plan.hook].concepts.max_parents >= 50
