"""What the report says: numbers in words, targets and their bars, the summary, tables."""

import re

import pytest
from report_run import HOSTILE, hand_made, metric, norms, run_files, set_target

from polytope_hsae.report.figures import curves
from polytope_hsae.report.palette import arm_styles
from polytope_hsae.report.summary import massive_rows, summary
from polytope_hsae.report.tables import (
    arm_tables,
    concepts_table,
    difference_tables,
    evidence_table,
    interventions_table,
    parents_table,
    steering_table,
)
from polytope_hsae.report.targets import informative_passes, steering_means, target_rows
from polytope_hsae.report.tree import tree_data
from polytope_hsae.report.words import DASH, counted, interval, listed, number, percent


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
    assert steering_means(run, "teacher") == (0.4, 0.1)  # the baseline's 0.2 has no counterpart
    assert steering_means(run, "permuted_teacher") is None
    files["phase4/steering.json"]["arms"]["permuted_teacher"] = files["phase4/steering.json"]["arms"]["teacher"]
    rows = {row["key"]: row["bar"]["controls"] for row in target_rows(run_files(files))}
    assert [(name, value) for name, _, value in rows["steering_leakage_reduction"]] == [
        ("permuted teacher", "75.0\u00a0%")
    ]


def test_a_pass_that_a_control_shares_is_not_informative(files):
    assert informative_passes(run_files(files)) == 4  # all but the angle; a control may reconstruct as well
    rows = {row["key"]: row["control_passes"] for row in target_rows(run_files(files))}
    assert [key for key, passes in rows.items() if passes] == ["median_angle_deg"]
    files["phase4/results.json"]["arms"]["permuted_teacher"]["leakage"] = metric(0.2)
    assert target_rows(run_files(files))[2]["bar"]["controls"][0][2] == "75.0\u00a0%"
    assert informative_passes(run_files(files)) == 3
    assert "Informative: 3 of the 5 that pass." in summary(run_files(files))[0]
    set_target(files, "median_angle_deg", controls={"shuffled_rows": 60.0, "pseudo_parents": None})
    row = target_rows(run_files(files))[0]
    assert not row["control_passes"]
    assert row["bar"]["controls"] == [("shuffled rows", row["bar"]["controls"][0][1], "60.0°")]
    set_target(files, "median_angle_deg", controls={"shuffled_rows": None, "pseudo_parents": None})
    assert target_rows(run_files(files))[0]["bar"]["controls"] == []


def test_a_target_without_a_value_says_why(files):
    why = {"measured": None, "ci95": None, "n": 0, "verdict": "INCONCLUSIVE", "why": "no rows"}
    set_target(files, "purity_gain_pp", **why)
    row = target_rows(run_files(files))[1]
    assert (row["verdict"], row["measured"], row["why"]) == ("inconclusive", "–", "no rows")
    assert (row["bar"]["dot"], row["bar"]["interval"]) == (None, None)


def test_the_summary_counts_verdicts_and_names_what_passed(files):
    set_target(files, "leakage_reduction", verdict="FAIL")
    set_target(files, "reconstruction_parity", verdict="INCONCLUSIVE")
    lead, *rest = summary(run_files(files))
    over = "hierarchy angle over 16 parents, purity gain over 16 concepts and"
    assert lead.startswith(f"Of 5 targets, 3 pass ({over}")
    assert "1 fails (leakage reduction over 16 concepts)" in lead
    assert "1 is inconclusive (FVU change over 16 documents)" in lead
    assert "no verdict" not in lead
    said = " ".join(rest)
    assert "words: 0.20 (baseline), 0.30 (flat TopK), 0.50 (teacher) and 0.20 (permuted teacher)" in said
    assert "+20.0 points over flat TopK (18.0 to 22.0)" in said


# -- arms in one order


def test_arms_stand_in_the_configs_order_everywhere(files):
    arms = "arms=[{name: permuted_teacher, init: permuted_teacher}, {name: teacher, init: teacher}, {name: baseline}, "
    run = run_files(files, arms + "{name: flat_topk, kind: topk}]")
    names = ["permuted_teacher", "teacher", "baseline", "flat_topk"]
    titles = ["permuted teacher", "teacher", "baseline", "flat TopK"]
    assert (
        run.arms == list(arm_styles(run.config)) == list(curves(run, "loss")) == list(tree_data(run)["arms"]) == names
    )
    assert arm_tables(run)[0].heads[1:-2] == concepts_table(run).heads[1:-2] == titles
    assert steering_table(run).heads[1:] == titles[:3]
    purity = next(sentence for sentence in summary(run) if sentence.startswith("Purity on held-out words"))
    assert re.findall(r"\((.*?)\)", purity) == titles


# -- rows of massive norm


def test_rows_of_massive_norm_are_told_where_there_are_any(files):
    assert massive_rows(run_files(files)) == []  # runs of earlier versions
    files["phase1/norms.json"] = norms(massive=0)
    assert massive_rows(run_files(files)) == []
    files["phase1/norms.json"] = norms()
    said = massive_rows(run_files(files))
    assert said[0].startswith("12 of 100,000 train rows (0.012\u00a0%) and 1 of 2,000 test rows (0.050\u00a0%) ")
    assert f"“The” (7) and “{HOSTILE}” (5)" in said[0]
    assert "91\u00a0%" in said[1]
    files["phase1/norms.json"] = norms(limit=None)
    assert "data.max_norm_multiple=10" in massive_rows(run_files(files))[2]


def test_metrics_without_massive_rows_are_shown_only_where_they_differ(files):
    def names():
        return {row for table in arm_tables(run_files(files)) for row in rows_of([table], "")} & new

    new = {"EV, all rows ↑", "EV, mean over rows ↑", "Loss recovered, massive rows kept ↑", "KL, massive rows kept ↓"}
    keys = ("ev_all_rows", "ev_row_mean", "ce_recovered_massive_kept", "kl_massive_kept")
    for arm in files["phase4/results.json"]["arms"].values():
        arm.update(dict.fromkeys(keys, metric(0.5)))
    for none in (norms(massive=0), norms(limit=None)):
        files["phase1/norms.json"] = none
        assert names() == {"EV, mean over rows ↑"}
    files["phase1/norms.json"] = norms()
    assert names() == new


# -- tables


def rows_of(tables, group):
    """{name of a row: its cells}, over tables."""
    return {row.name: row.cells for table in tables for row in table.groups.get(group, [])}


def test_arm_tables_have_chance_once_where_it_is_the_same_and_reasons_once(files):
    del files["phase4/results.json"]["arms"]["baseline"]["fvu"]
    tables = arm_tables(run_files(files))
    rows = rows_of(tables, "")
    *cells, chance, n = rows["Purity ↑"]
    assert (chance.value, n.value, [cell.chance for cell in cells]) == ("0.250", "4", [None] * 4)
    *cells, chance, _ = rows["Recall ↑"]
    assert (chance.value, [cell.chance for cell in cells]) == (DASH, ["0.000", "0.100", "0.200", "0.300"])
    assert rows["Unexplained variance ↓"][0][:4] == (DASH, None, None, None)  # the baseline has no such metric
    assert rows["Dead children ↓"][1][:4] == (DASH, None, None, 1)
    assert {reason for table in tables for reason in table.notes} == {"a flat model has no children"}


def test_differences_are_bold_where_the_interval_excludes_0(files):
    leads, differences = difference_tables(run_files(files))
    cells = rows_of([differences], "Concepts on held-out documents and words")["Purity ↑"]
    assert [(cell.value, cell.bold) for cell in cells] == [("+0.100", True), ("+0.300", True), ("0.000", False)]
    assert leads.heads == ["Metric", "baseline", "flat TopK", "permuted teacher"]
    files["phase4/ablations.json"]["reference"] = "teacher"
    assert [table.title for table in difference_tables(run_files(files))] == ["Each arm minus teacher"]


def test_concepts_are_listed_with_rows_and_words(files):
    values = [cell.value for cell in rows_of([concepts_table(run_files(files))], "")["animal"]]
    assert values == ["0.20", "0.60", "0.50", "0.10", "30", "2"]
    concepts = files["phase4/ablations.json"]["concepts"]
    for arm, measured in concepts.items():  # a concept by itself has no purity
        concepts[arm] = [{key: value for key, value in one.items() if key != "purity"} for one in measured[:1]]
    assert [cell.value for cell in rows_of([concepts_table(run_files(files))], "")["animal"][:4]] == [DASH] * 4


def test_evidence_stands_beside_its_controls(files):
    few = {**dict.fromkeys(("fraction_z_above_3", "median_z", "median_beta", "omega")), "why": "too few parents"}
    files["phase1/evidence.json"]["residual_covariance"] = few
    found = evidence_table(run_files(files))
    assert [row.cells[0].value for row in found.groups[""]] == ["50\u00a0%", "0\u00a0%", "0\u00a0%", DASH]
    assert [row.cells[2].note for row in found.groups[""]] == [None, 1, 1, 2]
    assert found.groups[""][-1].name == "covariance of activations"
    rows = rows_of([parents_table(run_files(files))], "")
    assert list(rows) == ["animal", "tool"]  # by z
    assert [cell.value for cell in rows["animal"]] == ["2", "1.00", "5.00", "0.020", "1.00", "0.100", "89.0"]
    assert (rows["animal"][2].bold, rows["tool"][2].bold, rows["tool"][4].value) == (True, False, DASH)


def test_steering_and_interventions_are_shown_beside_other_directions(files):
    run = run_files(files)
    grid = rows_of([steering_table(run)], "")
    parents, children = grid["parent, direction added, +0.5 nats"], grid["child, direction added, +0.5 nats"]
    assert [cell[:2] for cell in parents[:2]] == [
        ("0.400 (0.500)", "0 of 2 not reached"),
        ("0.100 (0.500)", "0 of 2 not reached"),
    ]
    assert [cell[:2] for cell in children[1:]] == [("– (0.500)", "2 of 2 not reached"), (DASH, None)]
    table = rows_of([interventions_table(run)], "")
    assert table["KL among a parent's words, median (published: below 0.1)"][0][:2] == ("0.050", "0.040 to 0.060")
    assert [cell.value for cell in table["parents not reached"]] == ["1 of 5"] * 3
    assert table["children: share with a ratio of 3 or more"][0].value == "100\u00a0%"
    files["phase4/interventions.json"] = {"why": "no head", "agreement": {"why": "no head"}}
    files["phase4/steering.json"]["grid"] = {}
    run = run_files(files)
    assert interventions_table(run).groups == steering_table(run).groups == {"": []}
