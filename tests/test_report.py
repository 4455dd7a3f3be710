"""What the report says: numbers in words, targets and their bars, the summary, tables."""

import re

import pytest
from report_run import HOSTILE, config, hand_made, metric, norms, run_files, set_target, steered

from polytope_hsae.config import HSAEConfig
from polytope_hsae.report.advice import worse_than_flat
from polytope_hsae.report.build import sizes
from polytope_hsae.report.figures import curves, figures
from polytope_hsae.report.hierarchy import answers
from polytope_hsae.report.palette import arm_styles
from polytope_hsae.report.steering import interventions_table, steering_grid, steering_means, steering_table
from polytope_hsae.report.summary import massive_rows, summary
from polytope_hsae.report.tables import arms_table, concepts_table, differences_table, evidence_summary, parents_table
from polytope_hsae.report.targets import informative_passes, target_rows
from polytope_hsae.report.tree import tree_data
from polytope_hsae.report.words import (
    DASH,
    arm_meaning,
    arm_title,
    counted,
    hsae_size,
    interval,
    listed,
    number,
    percent,
)


@pytest.fixture
def files():
    return hand_made()


# -- words


def test_numbers_are_written_for_readers():
    assert number(-1234.5678, 1) == "−1,234.6"
    assert number(0.25, 2, sign=True) == "+0.25"
    assert number(-0.0001, 2) == "0.00"  # no minus in front of nothing
    assert number(None) == "–"
    assert interval([-0.1, 0.25], 1, 100, " %") == "−10.0 to 25.0 %"
    assert interval(None) == "–"
    assert percent(0.256) == "26\u00a0%"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert (counted(1, "concept"), counted(1600, "concept")) == ("1 concept", "1,600 concepts")


# -- targets


def test_target_rows_show_what_is_required_and_measured(files):
    rows = {row["key"]: row for row in target_rows(run_files(files))}
    purity = rows["purity_gain_pp"]
    assert (purity["required"], purity["measured"], purity["verdict"]) == ("at least 10 points", "30.0 points", "pass")
    assert purity["interval"] == "20.0 to 40.0 points"
    assert purity["n"] == "16 concepts"
    assert rows["leakage_reduction"]["measured"] == "50.0\u00a0%"
    assert rows["reconstruction_parity"]["required"] == "−5 to 5\u00a0%"
    assert rows["median_angle_deg"]["n"] == "16 parents"


def test_a_bar_places_values_on_one_axis(files):
    purity = next(row for row in target_rows(run_files(files)) if row["key"] == "purity_gain_pp")["bar"]
    # from 0 (the permuted teacher, and no gain) to 40, with 8 % of 40 free at both ends: 46.4 wide from -3.2
    assert purity["dot"] == pytest.approx(100 * 33.2 / 46.4, abs=0.01)
    assert purity["interval"] == pytest.approx((100 * 23.2 / 46.4, 100 * 20 / 46.4), abs=0.01)
    assert purity["band"] == pytest.approx((100 * 13.2 / 46.4, 100 * 33.2 / 46.4), abs=0.02)  # to the right end
    assert [label for _, label in purity["ticks"]] == ["0", "10 points"]
    assert purity["controls"] == [("permuted teacher", pytest.approx(100 * 3.2 / 46.4, abs=0.01), "0.0 points")]


def test_steering_is_compared_where_both_arms_reach(files):
    run = run_files(files)
    assert steering_means(run, "teacher") == (1, 0.4, 0.1)  # the baseline's 0.2 has no counterpart
    assert steering_means(run, "permuted_teacher") is None
    row = next(row for row in target_rows(run) if row["key"] == "steering_leakage_reduction")
    said = " ".join(row["evidence"])
    assert "baseline 2 of 2, teacher 1 of 2 and permuted teacher 0 of 2 concepts" in said
    assert "other words move by 0.100 (teacher) and 0.400 nats (baseline) on average" in said


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        ((0.1, 0.3), "+0.200 (0.100 to 0.300), so the words matter"),
        ((-0.1, 0.3), "do not show that the words matter"),
        ((-0.3, -0.1), "the control does better"),
    ],
)
def test_the_permuted_teacher_decides_whether_words_matter(files, lead, said):
    found = files["phase4/ablations.json"]["against_teacher"]["permuted_teacher"]["purity"]
    found.update(value=sum(lead) / 2, ci95=list(lead))
    rows = {row["key"]: row for row in target_rows(run_files(files))}
    assert said in " ".join(rows["purity_gain_pp"]["evidence"])


def test_purity_says_what_it_is_counted_on(files):
    said = " ".join(target_rows(run_files(files))[1]["evidence"])
    assert "Counted on 50 rows, of the 2 of 2 concepts" in said
    assert "(20 to 30 rows and 2 held-out words each)" in said
    assert "Teacher minus flat TopK: +0.200" in said


def test_a_pass_that_a_control_shares_is_not_informative(files):
    assert informative_passes(run_files(files)) == 4  # all but the angle; a control may reconstruct as well
    rows = {row["key"]: row["caveat"] for row in target_rows(run_files(files))}
    assert [key for key, caveat in rows.items() if caveat] == ["median_angle_deg"]
    files["phase4/results.json"]["arms"]["permuted_teacher"]["leakage"] = metric(0.2)
    row = target_rows(run_files(files))[2]
    assert row["caveat"]
    assert "gets 75.0\u00a0%, in the required range" in " ".join(row["evidence"])
    assert informative_passes(run_files(files)) == 3
    lead, *_ = summary(run_files(files))
    assert "Informative: 3 of the 5 that pass." in lead


def test_steering_names_the_concept_that_carries_a_mean(files):
    arms = files["phase4/steering.json"]["arms"]
    arms["baseline"] = [steered(0, 9, 0.4), steered(1, 3, 0.2)]
    arms["teacher"] = [steered(0, 9, 3.0), steered(1, 3, 0.1)]
    row = target_rows(run_files(files))[3]
    said = " ".join(row["evidence"])
    assert "by 1.550 (teacher) and 0.300 nats (baseline) on average; the medians are 1.550 and 0.300" in said
    assert "One concept carries the mean: animal (3.00 nats). Without it: 0.100 and 0.200." in said
    assert row["detail"]["rows"] == [("animal", ["0.400", "3.000", "–"]), ("tool", ["0.200", "0.100", "–"])]


def test_for_leakage_less_is_better(files):
    rows = {row["key"]: row for row in target_rows(run_files(files))}
    assert "so the words matter" in " ".join(rows["leakage_reduction"]["evidence"])


def test_the_angle_is_read_beside_its_controls(files):
    evidence = " ".join(target_rows(run_files(files))[0]["evidence"])
    assert "90.0° with shuffled rows and 92.0° with pseudo-parents" in evidence
    assert "decides nothing" in evidence
    set_target(files, "median_angle_deg", controls={"shuffled_rows": 60.0, "pseudo_parents": None})
    row = target_rows(run_files(files))[0]
    assert "decides nothing" not in " ".join(row["evidence"])
    assert row["bar"]["controls"] == [("shuffled rows", row["bar"]["controls"][0][1], "60.0°")]
    set_target(files, "median_angle_deg", controls={"shuffled_rows": None, "pseudo_parents": None})
    assert "too few parents for the controls" in " ".join(target_rows(run_files(files))[0]["evidence"])


def test_a_target_without_a_value_says_why(files):
    for arm in files["phase4/results.json"]["arms"].values():
        arm["purity"] = {**metric(None), "why": "no rows"}
    why = {"measured": None, "ci95": None, "n": 0, "verdict": "INCONCLUSIVE", "why": "no rows"}
    set_target(files, "purity_gain_pp", **why)
    row = target_rows(run_files(files))[1]
    assert (row["verdict"], row["measured"], row["why"], row["evidence"]) == ("undecided", "–", "no rows", [])
    assert row["bar"]["dot"] is None
    assert row["bar"]["interval"] is None


def test_the_summary_counts_verdicts_and_names_what_passed(files):
    set_target(files, "leakage_reduction", verdict="FAIL")
    set_target(files, "reconstruction_parity", verdict="INCONCLUSIVE")
    lead, *rest = summary(run_files(files))
    over = "angle of the hierarchy over 16 parents, gain of purity over 16 concepts and"
    assert lead.startswith(f"Of 5 targets, 3 pass ({over}")
    assert "1 fails (fall of leakage over 16 concepts)" in lead
    assert "1 is undecided (change of reconstruction error over 16 documents)" in lead
    assert "decide nothing" not in lead
    said = " ".join(rest)
    assert "children of 50\u00a0% of 2 parents share a direction" in said
    assert "purity is 0.20 (baseline), 0.30 (flat TopK), 0.50 (teacher) and 0.20 (permuted teacher)" in said
    assert "+20.0 points over flat TopK (18.0 to 22.0)" in said
    assert "The angle decides nothing" in said


def test_a_handful_is_said_in_the_headline(files):
    why = "6 concepts, 8 are needed for a verdict: 2 of 8 parents have fewer than 20 labelled rows in train or test"
    set_target(files, "purity_gain_pp", n=6, verdict="INCONCLUSIVE", why=why)
    set_target(
        files, "steering_leakage_reduction", n=0, measured=None, ci95=None, verdict="INCONCLUSIVE", why="no head"
    )
    lead, *_ = summary(run_files(files))
    assert "gain of purity over 6 concepts and fall of steering side effects over 0 reached concepts" in lead
    assert "Fewer than 8 decide nothing." in lead
    assert target_rows(run_files(files))[1]["why"] == why


# -- arms of every kind, in one order

KINDS = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
FLAT = "arms=[{{name: baseline}}, {{name: flat_topk, kind: {kind}, match: {{l0: baseline, params: baseline}}}}, "
FLAT += "{{name: teacher, init: teacher}}, {{name: permuted_teacher, init: permuted_teacher}}]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_arm_of_any_kind_is_compared(files, kind):
    run = run_files(files, FLAT.format(kind=kind))
    said = " ".join(summary(run))
    assert "0.30 (flat TopK)" in said
    assert "0.700 (flat TopK)" in said
    assert "+20.0 points over flat TopK" in said
    rows = {row["key"]: " ".join(row["evidence"]) for row in target_rows(run)}
    assert "Teacher minus flat TopK" in rows["purity_gain_pp"]
    assert "With flat TopK: 0.300" in rows["reconstruction_parity"]
    assert "The arm flat TopK explains more" in worse_than_flat(run).sentence
    meaning = f"one flat {KINDS[kind]} dictionary without a hierarchy, with as many active latents and parameters as"
    assert arm_meaning(run.config, "flat_topk") == f"{meaning} baseline"
    assert arm_styles(run.config)["flat_topk"][0] == "s4"
    assert dict(sizes(run))["flat TopK"] == "32 latents, on average 8.0 active in a row"


def test_of_several_flat_arms_all_are_named_and_the_best_is_the_advice(files):
    files["phase4/results.json"]["arms"]["permuted_teacher"]["ev"] = metric(0.9)
    files["phase4/ablations.json"]["differences"]["permuted_teacher"]["ev"] = metric(0.3)
    arms = "arms=[{name: baseline}, {name: flat_topk, kind: topk}, {name: teacher, init: teacher}, "
    run = run_files(files, arms + "{name: permuted_teacher, kind: jumprelu}]")
    assert "0.700 (flat TopK), 0.600 (teacher) and 0.900" in " ".join(summary(run)).replace("0.580", "0.600")
    assert "The arm permuted teacher explains more (0.900" in worse_than_flat(run).sentence


def test_titles_and_meanings_of_arms():
    assert [arm_title(name) for name in ("flat_batchtopk", "flat_topk", "jumprelu", "permuted_teacher")] == [
        "flat BatchTopK", "flat TopK", "JumpReLU", "permuted teacher"
    ]  # fmt: skip
    assert arm_meaning(config(), "permuted_teacher").startswith("H-SAE that starts from such directions")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "at most 28 parents and 56 children active in a row"),
        ({"child_budget": "shared", "topk_child_total": 4}, "at most 28 parents and 4 children active in a row"),
        (
            {"child_budget": "batch", "topk_child_total": 4},
            "at most 28 parents and 8 children active in a row, on average 4 children",
        ),
        (
            {"child_budget": "batch", "topk_child_total": 4, "parent_budget": "batch"},
            "at most 56 parents and 8 children active in a row, on average 28 parents and 4 children",
        ),
        (
            {"parent_budget": "batch"},
            "at most 56 parents and 112 children active in a row, on average 28 parents and 56 children",
        ),
        (
            {"child_budget": "batch", "topk_child_total": 4, "parent_budget": "joint"},
            "at most 56 parents and 8 children active in a row, on average 32 parents and children together",
        ),
    ],
)
def test_what_rows_share_is_an_average(fields, said):
    sizes = {"n_parents": 1022, "topk_parent": 28, "n_children_per_parent": 7, "topk_child": 2, "gate": "hard"}
    budgets = {"parent_budget": "per_row", "child_budget": "per_parent", "topk_child_total": None}
    budgets["balance_rate"] = 0
    assert hsae_size(HSAEConfig(**sizes | budgets | fields)) == f"1,022 parents with 7 children each; {said}"


def test_arms_stand_in_the_configs_order_everywhere(files):
    arms = "arms=[{name: permuted_teacher, init: permuted_teacher}, {name: teacher, init: teacher}, {name: baseline}, "
    run = run_files(files, arms + "{name: flat_topk, kind: topk}]")
    names = ["permuted_teacher", "teacher", "baseline", "flat_topk"]
    titles = ["permuted teacher", "teacher", "baseline", "flat TopK"]
    assert (
        run.arms == list(arm_styles(run.config)) == list(curves(run, "loss")) == list(tree_data(run)["arms"]) == names
    )
    assert arms_table(run)["arms"] == concepts_table(run)["arms"] == titles
    assert steering_grid(run)["heads"] == steering_table(run)["heads"] == titles[:3]
    purity = next(sentence for sentence in summary(run) if sentence.startswith("On held-out words"))
    assert [title for title in re.findall(r"\((.*?)\)", purity)] == titles
    legend = figures(run)["curve-loss"].inline.split("legend_1", 1)[1]
    entries = re.findall(r' x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', legend)
    assert [title for _, _, title in sorted(entries, key=lambda entry: (float(entry[1]), float(entry[0])))] == titles


# -- rows of massive norm


def test_rows_of_massive_norm_are_told_where_there_are_any(files):
    assert massive_rows(run_files(files)) == []  # runs of earlier versions
    files["phase1/norms.json"] = norms(massive=0)
    assert massive_rows(run_files(files)) == []
    files["phase1/norms.json"] = norms()
    said = massive_rows(run_files(files))
    assert said[0].startswith(
        "12 of 100,000 train rows (0.012\u00a0%) and 1 of 2,000 test rows (0.050\u00a0%) have a norm above 10 times "
        "the median of 151.0, up to 15,464."
    )
    assert f"“The” (7) and “{HOSTILE}” (5)" in said[0]
    assert said[1].startswith("They hold 91\u00a0% of the squared deviation from the mean")
    assert said[1].endswith("about all other rows.")
    files["phase4/results.json"]["arms"]["baseline"]["ev_all_rows"] = metric(0.954)
    assert "with them it would be 0.954 (baseline)" in massive_rows(run_files(files))[1]
    assert said[2].startswith("They are left out of training and of every metric below")
    files["phase1/norms.json"] = norms(limit=None)
    said = massive_rows(run_files(files))
    assert "above 10 times" in said[0]
    assert "explained variance rests on a handful of rows" in said[2]
    assert "data.max_norm_multiple=10" in said[2]


def test_metrics_with_and_without_massive_rows_stand_beside_each_other(files):
    def names():
        return {row["words"].name for group in arms_table(run_files(files))["groups"] for row in group["rows"]}

    new = {"ev_all_rows": "Explained variance, all rows", "ev_row_mean": "Explained variance of a row"}
    new |= {
        "ce_recovered_massive_kept": "Loss recovered, massive rows kept",
        "kl_massive_kept": "KL, massive rows kept",
    }
    assert not set(new.values()) & names()
    for arm in files["phase4/results.json"]["arms"].values():
        arm.update(dict.fromkeys(new, metric(0.5)))
    for none in (norms(massive=0), norms(limit=None)):
        files["phase1/norms.json"] = none
        assert set(new.values()) & names() == {new["ev_row_mean"]}  # the others are the same as without
    files["phase1/norms.json"] = norms()
    assert set(new.values()) <= names()


# -- tables


def test_arms_table_has_chance_once_where_it_is_the_same_and_reasons_once(files):
    del files["phase4/results.json"]["arms"]["baseline"]["dead_children"]
    table = arms_table(run_files(files))
    assert table["arms"] == ["baseline", "flat TopK", "teacher", "permuted teacher"]
    rows = {row["words"].name: row for group in table["groups"] for row in group["rows"]}
    assert rows["Purity"]["chance"] == "0.250"
    assert [cell["chance"] for cell in rows["Purity"]["cells"]] == [None] * 4
    assert rows["Recall"]["chance"] is None
    assert [cell["chance"] for cell in rows["Recall"]["cells"]] == ["0.000", "0.100", "0.200", "0.300"]
    cells = rows["Dead children"]["cells"]
    assert (cells[0]["value"], cells[0]["note"]) == (None, None)  # the baseline has no such metric
    assert (cells[1]["value"], cells[1]["note"]) == (None, 1)
    assert table["notes"] == ["a flat model has no children"]


def test_differences_mark_intervals_without_zero(files):
    table = differences_table(run_files(files), files["phase4/ablations.json"]["differences"])
    rows = {row["words"].name: row for group in table["groups"] for row in group["rows"]}
    assert [(cell["value"], cell["excludes_zero"]) for cell in rows["Purity"]["cells"]] == [
        ("+0.100", True),
        ("+0.300", True),
        ("0.000", False),
    ]


def test_concepts_are_listed_with_rows_and_words(files):
    table = concepts_table(run_files(files))
    assert table["rows"][0] == {"name": "animal", "rows": 30, "n_words": 2, "purity": ["0.20", "0.60", "0.50", "0.10"]}


def test_a_concept_by_itself_has_no_purity(files):
    concepts = files["phase4/ablations.json"]["concepts"]
    for arm, measured in concepts.items():
        concepts[arm] = [{key: value for key, value in one.items() if key != "purity"} for one in measured[:1]]
    table = concepts_table(run_files(files))
    assert [row["purity"] for row in table["rows"]] == [[DASH] * 4]


def test_the_hierarchy_is_answered_part_by_part(files):
    files["phase4/results.json"]["arms"]["teacher"]["edge_recall"] = metric(0.8, chance=0.1)
    siblings, angles, trained = answers(run_files(files))
    assert siblings.answer == "for some parents"
    assert angles.answer == "it fits, but is not shown"
    assert "90.0° (shuffled rows)" in angles.why
    assert trained.answer == "80\u00a0% at most"
    assert "0\u00a0% (baseline), 80\u00a0% (teacher)" in trained.why
    evidence = files["phase1/evidence.json"]
    evidence["main"]["beta_ci95"] = [0.5, 1.1]
    assert answers(run_files(files))[1].answer == "no"
    evidence["main"].update(median_beta=None, fraction_z_above_3=0.0, why="too few")
    assert [one.answer for one in answers(run_files(files))] == ["no", "not testable", "80\u00a0% at most"]


def test_the_decision_says_what_failed(files):
    tests = {"shared_parent": {"passes": True}, "omega": {"passes": False}, "kappa": {"passes": False, "why": "few"}}
    found = {"hierarchy": False, "alpha": 0.01, "tests": tests, "why": "kappa: few"}
    files["phase1/evidence.json"]["main"]["decision"] = found
    said = answers(run_files(files))[2]
    assert (said.question, said.answer) == ("Is a hierarchy with orthogonal differences shown at level 0.01?", "no")
    assert said.why == "Passed: shared parent. Not passed: ω and κ. Not tested: kappa: few."
    found.update(hierarchy=True, tests={"omega": {"passes": True}})
    assert answers(run_files(files))[2].answer == "yes"


def test_a_control_with_another_beta_supports_right_angles(files):
    children = {"parent": [0, 1, 2, 3, 4], "beta": [2.0] * 5}
    control = {"children": children, "median_beta": 2.0, "beta_ci95": [1.9, 2.1]}
    for name in ("pseudo_parents", "shuffled_rows"):
        files["phase1/evidence.json"][name].update(control)
    assert answers(run_files(files))[1].answer == "supported"
    children["parent"] = [0, 0, 0, 1, 1]
    assert answers(run_files(files))[1].answer == "it fits, but is not shown"


def test_evidence_tables(files):
    found = evidence_summary(run_files(files))
    assert [row["share"] for row in found["rows"]] == ["50\u00a0%", "0\u00a0%", "0\u00a0%"]
    assert [row["note"] for row in found["rows"]] == [None, 1, 1]
    few = {**dict.fromkeys(("fraction_z_above_3", "median_z", "median_beta", "omega")), "why": "too few parents"}
    files["phase1/evidence.json"]["residual_covariance"] = few
    assert evidence_summary(run_files(files))["rows"][-1]["title"] == "covariance of activations"
    animal, tool = parents_table(run_files(files))
    assert dict(zip(("children", "s", "z", "q", "beta", "omega", "angle"), animal["cells"], strict=True))["beta"] == (
        1.0,
        "1.00",
    )
    assert animal["above"]
    assert not tool["above"]
    assert tool["cells"][4] == (None, "–")


def test_steering_and_interventions_are_shown_beside_other_directions(files):
    run = run_files(files)
    grid = steering_grid(run)
    assert grid["heads"] == ["baseline", "teacher", "permuted teacher"]
    assert [name for name, _ in grid["rows"]] == [
        "parent, direction added, +0.5 nats", "child, direction added, +0.5 nats"
    ]  # fmt: skip
    assert grid["rows"][0][1][:2] == ["0.400 (0.500); 0 of 2 not reached", "0.100 (0.500); 0 of 2 not reached"]
    assert grid["rows"][1][1][1:] == ["– (0.500); 2 of 2 not reached", "–"]
    table = dict(interventions_table(run)["rows"])
    assert table["KL among a parent's words, median (published: below 0.1)"][0] == "0.050 (0.040 to 0.060)"
    assert table["parents not reached"] == ["1 of 5"] * 3
    assert table["children: share at 3 times or more"][0] == "100\u00a0%"
    files["phase4/interventions.json"] = {"why": "no head", "agreement": {"why": "no head"}}
    files["phase4/steering.json"]["grid"] = {}
    assert interventions_table(run_files(files))["rows"] == []
    assert steering_grid(run_files(files)) is None
