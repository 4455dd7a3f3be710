"""What the report shows: figures, the tree, the page itself, and which folders it refuses."""

import html
import json
import re

import pytest
from report_run import HOSTILE, hand_made, metric, norms, run_files, set_target, write

from polytope_hsae.fileio import read_json
from polytope_hsae.report.build import SECTIONS, render, write_report
from polytope_hsae.report.figures import curves, figures
from polytope_hsae.report.read import read_run
from polytope_hsae.report.tree import tree_data
from polytope_hsae.report.words import number


@pytest.fixture
def files():
    return hand_made()


# -- figures


def test_figures_have_words_and_follow_the_theme(files):
    drawn = figures(run_files(files))
    assert {"arms-purity", "curve-loss", "evidence-z", "usage"} <= set(drawn)
    purity = drawn["arms-purity"].inline
    assert "<title>Purity of every arm</title>" in purity
    assert "baseline 0.200; flat TopK 0.300; teacher 0.500; permuted teacher 0.200" in purity
    for drawing in drawn.values():
        assert 'role="img"' in drawing.inline
        assert "var(--ink)" in drawing.inline
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'href="[^"]*"|url\([^)]*\)', "", drawing.inline))
        assert "<style" not in drawing.inline
        assert "var(" not in drawing.standalone
        assert not re.search(r"dc:date|20\d\d-\d\d-\d\d", drawing.standalone)
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', drawing.inline)
        assert set(used) <= set(re.findall(r' id="([^"]+)"', drawing.inline))
    ids = [name for drawing in drawn.values() for name in re.findall(r' id="([^"]+)"', drawing.inline)]
    assert len(ids) == len(set(ids))
    summed = curves(run_files(files), "active_parents_per_sample", "active_children_per_sample")
    assert summed["teacher"] == ([4, 8], [8.0, 4.0])


def test_what_has_no_values_is_not_drawn(files):
    files["phase1/evidence.json"]["main"]["children"]["beta"] = [None] * 4
    for found in files["phase4/latents.json"]["arms"].values():
        found["usage"] = [0.0, 0.0]
    files["metrics.jsonl"] = ""
    drawn = figures(run_files(files))
    assert "evidence-z" in drawn
    assert not {"evidence-beta", "usage", "curve-loss"} & set(drawn)


# -- the tree


def test_tree_holds_every_token_once_and_mapped_parents_first(files):
    tree = tree_data(run_files(files))
    assert sorted(tree["tokens"]) == sorted(set(tree["tokens"]))
    teacher = tree["arms"]["teacher"]
    assert [parent["latent"] for parent in teacher["parents"]] == [9, 4]
    mapped, other = teacher["parents"]
    assert [tree["tokens"][token] for token, _ in mapped["reads"]] == [" cat", " bird"]
    context = other["contexts"][0]
    assert [tree["tokens"][token] for token in context["tokens"]] == [" dog", HOSTILE, "ing"]
    assert context["values"] == [[1, 2.5]]
    assert mapped["steering"]["leakage"] == 0.1
    assert other["steering"] is None
    assert tree["first_child"] == [0, 2]
    # the teacher's own slot of a concept that another parent was chosen for
    files["phase4/latents.json"]["arms"]["teacher"]["parents"][0].update(concept=0, mapped=False)
    parents = tree_data(run_files(files))["arms"]["teacher"]["parents"]
    assert [(parent["latent"], parent["steering"] is None) for parent in parents] == [(9, False), (4, True)]


def test_tree_keeps_within_its_budget(files):
    whole = tree_data(run_files(files))
    one = len(json.dumps(whole["arms"]["teacher"]["parents"][0], separators=(",", ":")))
    cut = tree_data(run_files(files), budget=4 * (one + 1))
    assert [parent["latent"] for parent in cut["arms"]["teacher"]["parents"]] == [9]
    assert cut["arms"]["teacher"]["n_parents"] == 32


# -- the page


def page_of(tmp_path, files) -> str:
    """The page without its figures, which take most of the time."""
    return render(read_run(write(tmp_path, files)), {})


def test_the_page_has_its_sections_and_needs_nothing_else(files, tmp_path):
    page = write_report(write(tmp_path, files)).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    links = set(re.findall(r'(?:href|src)="([^"#][^"]*)"', page))
    assert links == {"data:,"}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert re.findall(r"https?://[^\s\"'<]+", page) == re.findall(r"http://www\.w3\.org/[^\s\"'<]+", page)
    targets = re.findall(r'href="#([^"]+)"', page)
    assert set(targets) <= set(re.findall(r' id="([^"]+)"', page))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"arms-purity.svg", "evidence-z.svg"} <= names


def test_the_same_files_give_the_same_bytes(files, tmp_path):
    first, second = (write(tmp_path / name, files) for name in ("one", "two"))
    assert write_report(first).read_bytes() == write_report(second).read_bytes()
    for path in (first / "figures").iterdir():
        assert path.read_bytes() == (second / "figures" / path.name).read_bytes()


def test_text_from_corpus_and_ontology_stays_text(files, tmp_path):
    files["phase1/evidence.json"]["main"]["parents"]["name"][0] = HOSTILE
    files["phase1/concepts.json"]["parents"][0]["name"] = HOSTILE
    files["phase4/latents.json"]["reads"] = HOSTILE
    files["config.yaml"] = files["config.yaml"].replace(
        "source: null\n  path: null", f"source: text\n  path: '{HOSTILE}'"
    )
    page = page_of(tmp_path, files)
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    data = json.loads(re.search(r'id="tree-data">(.*?)</script>', page, re.DOTALL).group(1))
    assert HOSTILE in data["tokens"]
    assert data["concepts"][0]["name"] == HOSTILE
    assert html.escape(HOSTILE) in page


def without_value(files, metrics, targets, why):
    for arm in files["phase4/results.json"]["arms"].values():
        arm.update({name: {**metric(None), "n": 0, "why": why} for name in metrics})
    for name in targets:
        set_target(files, name, measured=None, ci95=None, n=0, verdict="INCONCLUSIVE", why=why)
    return [f"Inconclusive: {why}.", f">{why}</li>"]


def no_output_head(files):
    files["phase4/steering.json"]["arms"] = {arm: [] for arm in files["phase4/steering.json"]["arms"]}
    for arm in files["phase4/latents.json"]["arms"].values():
        for parent in arm["parents"]:
            parent["writes"] = None
    metrics = ("steering_leakage", "steering_unreached")
    return without_value(files, metrics, ["steering_leakage_reduction"], "the model has no output head")


def no_concept_is_mapped(files):
    files["phase4/ablations.json"].update(
        concepts={arm: [] for arm in files["phase4/ablations.json"]["concepts"]}, differences={}, against_teacher={}
    )
    for arm in files["phase4/latents.json"]["arms"].values():
        for parent in arm["parents"]:
            parent.update(concept=None, mapped=False, purity=None, leakage=None, recall=None)
    metrics = ("purity", "leakage", "recall", "edge_recall")
    said = without_value(files, metrics, ("purity_gain_pp", "leakage_reduction"), "2 concepts are needed")
    return [*said, "purity gain over 0 concepts"]


@pytest.mark.parametrize("missing", [no_output_head, no_concept_is_mapped])
def test_what_was_not_measured_is_said_with_its_reason(files, tmp_path, missing):
    said = missing(files)
    page = page_of(tmp_path, files)
    assert [words for words in said if words not in page] == []


@pytest.mark.parametrize(
    "arms",
    [
        "{name: baseline}",
        "{name: teacher, init: teacher}",
        "{name: flat_topk, kind: batchtopk, flat: {n_latents: 64}}",
        "{name: baseline}, {name: flat_topk, kind: jumprelu}",
    ],
)
def test_other_arms_than_the_usual(files, arms):
    """Nothing to compare with: the page says so, and shows what there is."""
    kept = re.findall(r"name: (\w+)", arms)
    for name in ("phase4/results.json", "phase4/steering.json", "phase4/latents.json"):
        files[name]["arms"] = {arm: files[name]["arms"][arm] for arm in kept}
    files["phase4/ablations.json"].update(reference=kept[0], differences={}, against_teacher={})
    why = "there is no teacher arm"
    for target in files["phase4/results.json"]["targets"][1:]:
        target.update(measured=None, ci95=None, n=0, verdict="INCONCLUSIVE", why=why)
    run = run_files(files, f"arms=[{arms}]")
    page = render(run, figures(run))
    assert why in page
    assert "The teacher minus each arm" not in page
    assert (page.count('name="arm"'), page.count(" checked>")) == (len(kept), 1)
    assert ("with 2 children each" in page) == (kept != ["flat_topk"])
    assert "Purity on held-out words" in page


def test_massive_activations_are_told_near_the_headline(files, tmp_path):
    assert "Massive activations" not in page_of(tmp_path / "old", files)
    files["phase1/norms.json"] = norms()
    page = page_of(tmp_path / "new", files)
    assert page.index("Massive activations") < page.index('id="targets"')
    assert html.escape(HOSTILE) in page


@pytest.mark.parametrize("lost", ["config.yaml", "metrics.jsonl", "phase4/latents.json", "phase3/teacher/train.json"])
def test_a_run_that_is_not_finished_is_refused(files, tmp_path, lost):
    del files[lost]
    with pytest.raises(ValueError, match=re.escape(lost)) as error:
        write_report(write(tmp_path, files))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("phase4/ablations.json", {"reference": "baseline"}, r"ablations\.json"),
        ("provenance.json", {"phases": {}}, "phase 4 is not finished"),
        ("phase1/norms.json", norms(massive=-1), r"norms\.json.*massive"),
        ("phase4/steering.json", "{", r"steering\.json"),
    ],
)
def test_files_of_another_form_are_refused(files, tmp_path, name, content, words):
    files[name] = content
    with pytest.raises(ValueError, match=words):
        write_report(write(tmp_path, files))


def test_the_report_of_a_real_run(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert len(page) < 8_000_000
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    arms = read_json(finished / "phase4" / "results.json")["arms"]
    assert [name for name in arms if f'value="{name}"' not in page] == []
    assert number(arms["teacher"]["ev"]["value"]) in page
    reasons = {found["why"] for arm in arms.values() for found in arm.values() if "why" in found}
    assert [reason for reason in reasons if html.escape(reason) not in page] == []
