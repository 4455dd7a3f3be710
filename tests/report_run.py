"""A finished run made by hand: the files that a report reads, with numbers that can be checked in the head."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polytope_hsae.config import Config, dump_yaml, load_config
from polytope_hsae.report.read import RunFiles, read_run

ARMS = ("baseline", "flat_topk", "teacher", "permuted_teacher")
HOSTILE = "</script><img src=x onerror=alert(1)>"
OWN = {"ev": (0.6, 0.7, 0.58, 0.57), "purity": (0.2, 0.3, 0.5, 0.2), "leakage": (0.8, 0.7, 0.4, 0.8)}
OTHERS = ("ev_causal", "ev_logit", "kl", "split", "absorb", "absorb_with_children", "probe_min", "entropy")
OF_CHILDREN = ("dead_children", "edge_precision", "edge_recall", "child_given_parent")
CHANCE = {"ev": 0.0, "purity": 0.25, "leakage": 0.75, "l0": None}


def config(*overrides: str) -> Config:
    """The smoke config at an inner hook."""
    return load_config("smoke", ["model.hook=layers.2", "concepts.label=current_token", *overrides])


def metric(value: float | None, half: float = 0.05, chance: float | None = None, n: int = 4) -> dict[str, Any]:
    """One metric of results.json with an interval of value +- half."""
    ci95 = None if value is None else [round(value - half, 9), round(value + half, 9)]
    return {"value": value, "ci95": ci95, "chance": chance, "n": n}


def target(name: str, required: list, measured: float | None, ci95: list | None, verdict: str, **more: Any) -> dict:
    return {"name": name, "required": required, "measured": measured, "ci95": ci95, "n": 16, "verdict": verdict, **more}


def statistics(z: list[float], beta: list[float] | None) -> dict[str, Any]:
    """One variant of evidence.json: two parents with two children each."""
    parents = {"name": ["animal", "tool"], "n_children": [2, 2], "s_p": [1.0, 2.0], "z": z, "q": [0.02, 0.5]}
    children = {"parent": [0, 0, 1, 1], "beta": beta or [None] * 4, "angle_deg": [88.0, 90.0, 92.0, 94.0]}
    found = {"median_beta": 1.0, "beta_ci95": [0.9, 1.1], "omega": 0.1, "omega_ci95": [0.05, 0.15]}
    if beta is None:
        found = {**dict.fromkeys(found), "why": "no parent with at least 3 children has z > 3"}
    return {
        "parents": {**parents, "omega": [0.1, None]},
        "children": children,
        "fraction_z_above_3": sum(value > 3 for value in z) / len(z),
        "median_z": min(z),
        "angles": {"estimator": "mean", "median_angle_deg": 91.0, "median_ci95": [89.0, 93.0]},
        **found,
    }


def latent(tokens: list[str]) -> dict[str, Any]:
    """Words and one context of a latent that is active on the second token."""
    values = [0.0] * len(tokens)
    values[1] = 2.5
    words = [[token, 0.5] for token in tokens]
    context = {"doc": 3, "pos": 7, "tokens": tokens, "values": values}
    fires_on = [[token, 1.5, 4] for token in tokens]
    return {"reads": words, "writes": words, "fires_on": fires_on, "contexts": [context]}


def parent(number: int, share: float, tokens: list[str], concept: int | None = None, children: int = 2) -> dict:
    mapped = concept is not None
    return {
        "latent": number,
        "concept": concept,
        "mapped": mapped,
        "share": share,
        "mean_value": 1.25,
        "purity": 0.5 if mapped else None,
        "leakage": 0.4 if mapped else None,
        "recall": 0.75 if mapped else None,
        **latent(tokens),
        "children": [
            {"index": j, "concept": 0 if mapped and j == 0 else None, "share_of_parent": 0.1, **latent(tokens)}
            for j in range(children)
        ],
    }


def steered(concept: int, number: int, leakage: float | None) -> dict[str, Any]:
    example = {"context": [" the", " old"], "before": [[" man", 0.2], [" dog", 0.1]], "after": [[" dog", 0.4]]}
    measured = ("alpha", "effect", "sibling_kl", "chance_alpha", "chance_effect", "chance_sibling_kl")
    reached = leakage is not None
    return {
        "parent": concept,
        "latent": number,
        **dict.fromkeys(measured, 0.3 if reached else None),
        "steering_leakage": leakage,
        "chance_steering_leakage": 0.5,
        "example": example if reached else None,
    }


def grid_cell(level: str, leakage: float | None, unreached: int = 0) -> dict[str, Any]:
    """One level of steering.json's grid, injected at the run's hook and dose."""
    place = {"level": level, "form": "inject", "hook": "model.layers.2", "target_nats": 0.5}
    return {**place, "concepts": 2, "unreached": unreached, "steering_leakage": metric(leakage, chance=0.5)}


def interventions() -> dict[str, Any]:
    """interventions.json: the own directions keep ratios and hit their targets, the others do not."""
    along = {"own": (0.05, 4.0), "other": (0.4, 0.5), "random": (0.3, 1.0)}
    ratio = {
        name: {"median": metric(kl, 0.01), "p90": metric(2 * kl, 0.01), "unreached": 1}
        for name, (kl, _) in along.items()
    }
    targeted = {
        name: {"median_ratio": metric(times), "share_above_threshold": metric(float(times > 3)), "unreached": 0}
        for name, (_, times) in along.items()
    }
    return {
        "target_nats": 0.5,
        "ratio_invariance": {"thresholds": {"median": 0.1, "p90": 0.2}, **ratio},
        "targeting": {"threshold": 3.0, "parents": targeted, "children": targeted},
        "agreement": {"same_words": {name: metric(0.6) for name in ("cosine", "other_parents", "random")}},
    }


def train(arm: str) -> dict[str, Any]:
    """train.json of an arm."""
    budget = {"steps": 24, "tokens": 6144, "parameters": 1000, "flops_per_row": 100}
    return {"arm": arm, "identity": {}, **budget, "teacher_parents": [], "validation": {"val_ev": 0.5, "val_l0": 8.0}}


def hand_made() -> dict[str, Any]:
    """Path in the run folder -> content (text as it is, the rest as JSON)."""
    words = {"train": ["a", "b"], "val": [], "test": ["c"]}
    concepts = [
        {
            "name": name,
            "synset": None,
            "children": [{"name": child, "synset": None, "words": words, "tokens": {}} for child in children],
        }
        for name, children in (("animal", ["dog", "bird"]), ("tool", ["saw", "pen"]))
    ]
    arms = {}
    for place, arm in enumerate(ARMS):
        arms[arm] = {
            **{name: metric(0.1, chance=0.05) for name in OTHERS},
            **{name: metric(0.0, 0.0) for name in (*OF_CHILDREN, "dead_parents")},
            **{name: metric(values[place], chance=CHANCE[name]) for name, values in OWN.items()},
            "fvu": metric(round(1 - OWN["ev"][place], 9), chance=1.0),
            "l0": metric(8.0, 0.0),
            "ce_recovered": metric(0.8, chance=0.0),
            "recall": metric(0.5, chance=0.1 * place),
            "steering_leakage": metric(0.4, chance=0.5),
        }
    for name in OF_CHILDREN:
        arms["flat_topk"][name] = {**metric(None), "n": 0, "why": "a flat model has no children"}
    differences, against_teacher = (
        {
            arm: {name: metric(round(sign * (v[place] - v[first]), 9), 0.02) for name, v in OWN.items()}
            for place, arm in enumerate(ARMS)
            if place != first
        }
        for first, sign in ((0, 1), (2, -1))
    )
    measured = {
        arm: [{"parent": 0, "rows": 30, "purity": purity}, {"parent": 1, "rows": 20, "purity": 0.25}]
        for arm, purity in zip(ARMS, (0.2, 0.6, 0.5, 0.1), strict=True)
    }
    controls = {"shuffled_rows": 90.0, "pseudo_parents": 92.0}
    targets = [
        target("median_angle_deg", [80.0, 100.0], 91.0, [89.0, 93.0], "PASS", controls=controls),
        target("purity_gain_pp", [10.0, None], 30.0, [20.0, 40.0], "PASS"),
        target("leakage_reduction", [0.2, None], 0.5, [0.4, 0.6], "PASS"),
        target("steering_leakage_reduction", [0.2, None], 0.5, [0.4, 0.6], "PASS"),
        target("reconstruction_parity", [-0.05, 0.05], 0.05, [0.04, 0.05], "PASS"),
    ]
    evidence = {
        "model": "m",
        "rows_of": "unembedding",
        "permutations": 100,
        "main": statistics([5.0, 1.0], [0.9, 1.1, None, None]),
        "shuffled_rows": statistics([0.5, -0.5], None),
        "pseudo_parents": statistics([1.0, 0.0], None),
    }
    tokens = [" dog", HOSTILE, "ing"]
    described = {
        arm: {
            "architecture": "TopKSAE" if arm == "flat_topk" else "HierarchicalSAE",
            "n_parents": 32,
            "n_children": 0 if arm == "flat_topk" else 2,
            "usage": [0.5, 0.25, 0.0],
            "parents": [
                parent(4, 0.5, tokens, children=0 if arm == "flat_topk" else 2),
                parent(9, 0.25, [" cat", " bird"], concept=0, children=0 if arm == "flat_topk" else 2),
            ],
        }
        for arm in ARMS
    }
    lines = [
        {"phase": 2, "arm": arm, "seed": 0, "step": step, "tokens": 256 * step, "name": name, "value": value / step}
        for arm in ARMS
        for step in (4, 8)
        for name, value in (
            ("loss", 100.0),
            ("val_ev", 2.0),
            ("active_parents_per_sample", 16.0),
            ("active_children_per_sample", 16.0),
            ("dead_parents", 0.0),
        )
    ]
    environment = {"python": "3.11.0", "packages": {"torch": "2.0"}, "platform": "p", "commit": None}
    environment |= {"device": "cpu", "threads": 1}
    phase = {"config": {}, "inputs": {"a": "0" * 64}, "environment": environment, "seconds": 1.5}
    files = {
        "config.yaml": dump_yaml(config()),
        "provenance.json": {"phases": {f"phase{number}": phase for number in (1, 2, 3, 4)}},
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "phase1/concepts.json": {"parents": concepts},
        "phase1/evidence.json": evidence,
        "phase4/results.json": {
            "model": "m",
            "hook": "model.layers.2",
            "label": "current_token",
            "split": "test",
            "seeds": [0],
            "arms": arms,
            "targets": targets,
        },
        "phase4/steering.json": {
            "target_nats": 0.5,
            "arms": {
                "baseline": [steered(0, 9, 0.4), steered(1, 3, 0.2)],
                "flat_topk": [],
                "teacher": [steered(0, 9, 0.1), steered(1, 3, None)],
                "permuted_teacher": [steered(0, 9, None), steered(1, 3, None)],
            },
            "grid": {
                "baseline": [grid_cell("parent", 0.4), grid_cell("child", 0.3, unreached=1)],
                "flat_topk": [],
                "teacher": [grid_cell("parent", 0.1), grid_cell("child", None, unreached=2)],
                "permuted_teacher": [grid_cell("parent", None, unreached=2)],
            },
        },
        "phase4/interventions.json": interventions(),
        "phase4/ablations.json": {
            "reference": "baseline",
            "differences": differences,
            "against_teacher": against_teacher,
            "concepts": measured,
        },
        "activations/manifest.json": {"rows": {"train": 4096, "val": 512, "test": 1000}},
        "phase4/latents.json": {
            "hook": "model.layers.2",
            "label": "current_token",
            "split": "test",
            "n_rows": 1000,
            "reads": "How reads are found.",
            "writes": "How writes are found.",
            "arms": described,
        },
    }
    for arm in ARMS:
        phase_number = 3 if "teacher" in arm else 2
        files[f"phase{phase_number}/{arm}/train.json"] = train(arm)
    return copy.deepcopy(files)


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Put the files into the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def norms(limit: float | None = 10.0, massive: int = 12) -> dict[str, Any]:
    """norms.json of phase 1, where only train and test have rows of massive norm."""
    found = {"rows": 100_000, "massive": massive, "largest_norm": 15464.0, "share_of_squared_deviation": 0.91}
    train = {**found, "tokens": [["The", 7], [HOSTILE, 5]]}
    few = {"rows": 2000, "largest_norm": 300.0, "share_of_squared_deviation": 0.0, "tokens": []}
    splits = {"train": train, "val": {**few, "massive": 0}, "test": {**few, "massive": massive // 12}}
    return {"median_norm": 151.0, "limit": limit, "splits": splits}


def run_files(files: dict[str, Any], *overrides: str) -> RunFiles:
    """The files as the report reads them; `overrides` of the run's config."""
    with TemporaryDirectory() as folder:
        return replace(read_run(write(Path(folder), files)), config=config(*overrides))


def set_target(files: dict[str, Any], name: str, **fields: Any) -> None:
    """Replace fields of one target of results.json."""
    next(t for t in files["phase4/results.json"]["targets"] if t["name"] == name).update(fields)
