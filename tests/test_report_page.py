"""What the report shows: figures, the tree, the page itself, and which folders it refuses."""

import html
import json
import re

import pytest
from report_run import HOSTILE, hand_made, keep_arms, metric, norms, run_files, set_target, write

from polytope_hsae.config import load_config
from polytope_hsae.fileio import read_json
from polytope_hsae.report.build import render, write_report
from polytope_hsae.report.figures import curves, figures
from polytope_hsae.report.palette import INKS, LIGHT, PAGE, SERIES, arm_styles
from polytope_hsae.report.read import read_run
from polytope_hsae.report.tree import tree_data
from polytope_hsae.report.words import number

SECTIONS = ["summary", "targets", "tree", "arms", "training", "hierarchy", "config", "glossary"]


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
    ids = [name for drawing in drawn.values() for name in re.findall(r' id="([^"]+)"', drawing.inline)]
    assert len(ids) == len(set(ids))
    for drawing in drawn.values():
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', drawing.inline)
        assert set(used) <= set(re.findall(r' id="([^"]+)"', drawing.inline))


def test_what_has_no_values_is_not_drawn(files):
    files["phase1/evidence.json"]["main"]["children"]["beta"] = [None] * 4
    for found in files["phase4/latents.json"]["arms"].values():
        found["usage"] = [0.0, 0.0]
    files["metrics.jsonl"] = ""
    drawn = figures(run_files(files))
    assert "evidence-z" in drawn
    assert not {"evidence-beta", "usage", "curve-loss"} & set(drawn)


def test_curves_add_parents_and_children(files):
    found = curves(run_files(files), "active_parents_per_sample", "active_children_per_sample")
    assert found["teacher"] == ([4, 8], [8.0, 4.0])


def test_colours_differ_and_arms_keep_theirs():
    light = [pair[0] for pair in (INKS | SERIES).values()]
    assert len(set(light)) == len(light)  # else one variable would replace another's colour
    config = load_config("smoke")
    styles = arm_styles(config)
    assert styles["teacher"] == ("s1", 0)
    many = [arm.model_copy(update={"name": f"{arm.name}{i}"}) for i in range(3) for arm in config.arms]
    assert len(set(arm_styles(config.model_copy(update={"arms": many})).values())) == 12
    assert set(LIGHT) >= {colour for colour, _ in styles.values()}


def contrast(one, other):
    """WCAG's ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out(theme):
    background = PAGE["bg"][theme]
    text = [INKS[name][theme] for name in ("ink", "muted")]
    text += [PAGE[name][theme] for name in ("link", "pass", "fail", "undecided")]
    assert min(contrast(colour, background) for colour in text) >= 4.5
    assert min(contrast(pair[theme], background) for pair in SERIES.values()) >= 3


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


def test_steering_belongs_to_the_mapped_parent_only(files):
    found = files["phase4/latents.json"]["arms"]["teacher"]["parents"][0]
    found.update(concept=0, mapped=False)  # the teacher's own slot of a concept that another parent was chosen for
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
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
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


def test_absent_evidence_is_said_plainly(files, tmp_path):
    main = files["phase1/evidence.json"]["main"]
    main.update(dict.fromkeys(("median_beta", "beta_ci95", "omega", "omega_ci95")), fraction_z_above_3=0.0, why="none")
    main["children"]["beta"] = [None] * 4
    assert "No evidence of a hierarchy." in page_of(tmp_path, files)


def test_a_control_that_few_parents_do_not_allow(files, tmp_path):
    keys = ("fraction_z_above_3", "median_z", "fraction_q_below_05", "median_beta", "omega")
    files["phase1/evidence.json"]["pseudo_parents"] = {**dict.fromkeys(keys), "why": "needs more parents"}
    set_target(files, "median_angle_deg", controls={"shuffled_rows": 90.0, "pseudo_parents": None})
    assert "needs more parents" in page_of(tmp_path, files)


def test_a_model_without_an_output_head(files, tmp_path):
    why = {**metric(None), "n": 0, "why": "the model has no output head"}
    for arm in files["phase4/results.json"]["arms"].values():
        arm.update(steering_leakage=why, steering_unreached=why)
    found = {"measured": None, "ci95": None, "n": 0, "verdict": "INCONCLUSIVE", "why": why["why"]}
    set_target(files, "steering_leakage_reduction", **found)
    files["phase4/steering.json"]["arms"] = {arm: [] for arm in files["phase4/steering.json"]["arms"]}
    for arm in files["phase4/latents.json"]["arms"].values():
        for parent in arm["parents"]:
            parent["writes"] = None
    page = page_of(tmp_path, files)
    assert "Inconclusive: the model has no output head." in page


RANDOM, FLAT = "{name: solo}", "{name: wide, kind: batchtopk, flat: {n_latents: 64}}"


@pytest.mark.parametrize(
    ("kept", "arms"),
    [
        ({"solo": "baseline"}, f"[{RANDOM}]"),
        ({"wide": "flat_topk"}, f"[{FLAT}]"),
        ({"wide": "flat_topk", "other": "flat_topk"}, f"[{FLAT}, {{name: other, kind: jumprelu}}]"),
        ({"baseline": "baseline", "wide": "flat_topk"}, f"[{{name: baseline}}, {FLAT}]"),  # no teacher
        ({"a_teacher": "teacher"}, "[{name: a_teacher, init: teacher}]"),
    ],
)
def test_other_arms_than_the_usual(files, tmp_path, kept, arms):
    """Nothing to compare with: the page says so, and shows what there is."""
    keep_arms(files, kept, arms)
    run = read_run(write(tmp_path, files))
    page = render(run, figures(run))
    assert "there is no baseline arm" in page
    assert "The teacher minus each arm" not in page
    assert page.count('name="arm"') == len(kept)
    assert page.count(" checked>") == 1
    assert ("with 2 children each" in page) == bool({"solo", "baseline", "a_teacher"} & set(kept))
    assert "Purity on held-out words" in page


def test_no_concept_is_mapped(files, tmp_path):
    why = "2 concepts are needed, 0 have enough rows: 2 of 2 parents have fewer than 20 labelled rows in train or test"
    for arm in files["phase4/results.json"]["arms"].values():
        arm.update({name: {**metric(None), "why": why} for name in ("purity", "leakage", "recall", "edge_recall")})
    files["phase4/ablations.json"].update(
        concepts={arm: [] for arm in files["phase4/ablations.json"]["concepts"]}, differences={}, against_teacher={}
    )
    for arm in files["phase4/latents.json"]["arms"].values():
        for parent in arm["parents"]:
            parent.update(concept=None, mapped=False, purity=None, leakage=None, recall=None)
    for name in ("purity_gain_pp", "leakage_reduction"):
        set_target(files, name, measured=None, ci95=None, n=0, verdict="INCONCLUSIVE", why=f"purity: {why}")
    page = page_of(tmp_path, files)
    assert f"Inconclusive: purity: {why}." in page
    assert why in page[page.index('aria-label="Notes"') :]
    assert "gain of purity over 0 concepts" in page


def test_rows_of_massive_norm_are_told_near_the_headline(files, tmp_path):
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
    ("name", "change", "words"),
    [
        ("phase4/ablations.json", lambda found: found.pop("against_teacher"), r"ablations\.json.*against_teacher"),
        ("provenance.json", lambda found: found["phases"].pop("phase4"), "phase 4 is not finished"),
        ("phase1/norms.json", lambda found: found["splits"]["train"].update(massive=-1), r"norms\.json.*massive"),
    ],
)
def test_files_of_another_form_are_refused(files, tmp_path, name, change, words):
    files["phase1/norms.json"] = norms()
    change(files[name])
    with pytest.raises(ValueError, match=words):
        write_report(write(tmp_path, files))


def test_the_page_says_what_a_run_read(files, tmp_path):
    page = page_of(tmp_path / "one", files)
    assert "the packaged sample, which textbook-lm-9m wrote itself" in page
    assert "24 steps, 6,144 rows (1.5 epochs)" in page
    del files["activations/manifest.json"]  # the activations may be deleted after a run
    assert "24 steps, 6,144 rows." in page_of(tmp_path / "two", files)


def test_a_broken_file_is_refused(files, tmp_path):
    files["phase4/steering.json"] = "{"
    with pytest.raises(ValueError, match=r"steering\.json"):
        write_report(write(tmp_path, files))


def test_the_report_of_a_real_run(finished, tmp_path):
    """Every number of the targets stands on the page of a finished smoke run, which is small and whole."""
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert len(page) < 8_000_000
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    results = read_json(finished / "phase4" / "results.json")
    for name in results["arms"]:
        assert f'value="{name}"' in page
    for name, value in (("ev", results["arms"]["teacher"]["ev"]), ("purity", results["arms"]["teacher"]["purity"])):
        assert value["value"] is None or number(value["value"]) in page, name
    for reason in {found["why"] for arm in results["arms"].values() for found in arm.values() if "why" in found}:
        assert html.escape(reason) in page
