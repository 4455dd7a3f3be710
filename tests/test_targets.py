"""The five targets and their verdicts."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from polytope_hsae.config.evaluation import TargetsConfig
from polytope_hsae.evaluation.bootstrap import Metric, Units
from polytope_hsae.evaluation.targets import MIN_UNITS, assess_targets, format_targets, verdict


def test_verdicts():
    def found(ci95, required, n=MIN_UNITS):
        return verdict(Metric(1.0, ci95, None, n), required)

    assert found((81, 99), (80, 100)) == "PASS"
    assert found((70, 79.9), (80, 100)) == "FAIL"
    assert found((101, 102), (80, 100)) == "FAIL"
    assert found((79, 99), (80, 100)) == "INCONCLUSIVE"
    assert found((10, 11), (10, None)) == "PASS"
    assert found((-1, 9), (10, None)) == "FAIL"
    assert found(None, (10, None)) == "INCONCLUSIVE"
    for n in (2, MIN_UNITS - 1):
        assert {found(ci95, (80, 100), n) for ci95 in ((81, 99), (70, 79), (79, 99))} == {"INCONCLUSIVE"}


def arms(gain, leak, fvu):
    rng = np.random.default_rng(0)
    base = {name: Units.mean(rng.random(50) * 0.02 + 0.5) for name in ("purity", "leakage", "steering_leakage")}
    base["fvu"] = Units.ratio(rng.random(90) + 3, np.full(90, 10.0))
    teacher = {
        "purity": Units.mean(base["purity"].numerator_U + gain),
        "leakage": Units.mean(base["leakage"].numerator_U * (1 - leak)),
        "steering_leakage": Units.mean(base["steering_leakage"].numerator_U * (1 - leak)),
        "fvu": Units.ratio(base["fvu"].numerator_U * (1 + fvu), np.full(90, 10.0)),
    }
    return base, teacher


def test_targets_from_two_arms():
    angle = Metric(89.0, (85.0, 93.0), None, 50)
    passed = assess_targets(angle, *arms(0.12, 0.25, 0.04))
    assert [row["name"] for row in passed] == [
        "median_angle_deg",
        "purity_gain_pp",
        "leakage_reduction",
        "steering_leakage_reduction",
        "reconstruction_parity",
    ]
    assert [row["verdict"] for row in passed] == ["PASS"] * 5
    assert [row["measured"] for row in passed] == pytest.approx([89.0, 12.0, 0.25, 0.25, 0.04])
    assert passed[1]["required"] == [10.0, None]
    assert passed[4]["required"] == [-0.05, 0.05]
    failed = assess_targets(Metric(60.0, (55.0, 65.0), None, 50), *arms(0.05, 0.1, -0.2))
    assert [row["verdict"] for row in failed] == ["FAIL"] * 5, "parity is two-sided: a better fit is no parity either"
    looser = TargetsConfig(purity_gain_pp=4.0, reconstruction_parity=0.3)
    verdicts = [row["verdict"] for row in assess_targets(angle, *arms(0.05, 0.1, -0.2), thresholds=looser)]
    assert verdicts == ["PASS", "PASS", "FAIL", "FAIL", "PASS"]


def test_a_handful_of_units_decides_nothing_and_says_so():
    def first(units, n):
        return {name: Units.ratio(u.numerator_U[:n], u.denominator_U[:n]) for name, u in units.items()}

    few = "12 of 14 parents have fewer than 20 labelled rows in train or test"
    angle, two = Metric(89.0, (85.0, 93.0), None, 2), [first(arm, 2) for arm in arms(0.12, 0.25, 0.04)]
    rows = assess_targets(angle, *two, few=few)
    assert [row["verdict"] for row in rows] == ["INCONCLUSIVE"] * 5
    assert [row["measured"] is None or row["ci95"] is None for row in rows] == [False] * 5
    assert rows[0]["why"] == "2 parents, 8 are needed for a verdict"
    assert rows[1]["why"] == f"2 concepts, 8 are needed for a verdict: {few}"
    enough = assess_targets(None, *(first(arm, 8) for arm in arms(0.12, 0.25, 0.04)), few=few)
    assert [row["verdict"] for row in enough[1:]] == ["PASS"] * 4
    assert not any("why" in row for row in enough[1:])


def test_missing_measurements_are_inconclusive_with_a_reason():
    base, teacher = arms(0.12, 0.25, 0.0)
    del teacher["steering_leakage"]
    base["leakage"] = Units.mean([math.nan] * 50)
    rows = {row["name"]: row for row in assess_targets(None, base, teacher)}
    assert rows["median_angle_deg"]["why"] == "no angle was measured"
    assert rows["steering_leakage_reduction"]["why"] == "steering_leakage was not measured for the teacher arm"
    assert rows["leakage_reduction"]["why"] == "0 concepts, 8 are needed for a verdict"
    for name in ("median_angle_deg", "steering_leakage_reduction", "leakage_reduction"):
        assert rows[name]["measured"] is None
        assert rows[name]["verdict"] == "INCONCLUSIVE"
    assert json.dumps(list(rows.values()), allow_nan=False)
    bare = assess_targets(Metric(90.0, None, None, 9), base, teacher)[0]
    assert bare["verdict"] == "INCONCLUSIVE"
    assert bare["why"] == "no interval was given"
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(format_targets(list(rows.values())))
    text = console.export_text()
    assert "median_angle_deg: no angle was measured" in text
    assert "50 concepts" in text  # what n counts stands beside it
    assert "90 documents" in text
