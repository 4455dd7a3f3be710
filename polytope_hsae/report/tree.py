"""The learned trees as one compact object for the page's script: tokens once, short numbers, a limit on the size."""

import json
from typing import Any

from .read import RunFiles

BUDGET = 5_500_000  # bytes of JSON for all arms together, so that the page stays below 8 MB


class Tokens:
    """Numbers tokens in the order they are first seen."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, token: str) -> int:
        return self.numbers.setdefault(token, len(self.numbers))


def tree_data(run: RunFiles, budget: int = BUDGET) -> dict[str, Any]:
    """What tree.js reads: `tokens`, `concepts` {name, children}, and per arm its parents.

    Parents that were mapped to a concept come first, then those that a teacher gave one, then the most used. Where
    all arms together would exceed `budget` bytes, every arm keeps as many as fit into its part; `n_parents` beside them
    says of how many.
    """
    tokens = Tokens()
    out = {}
    for arm in run.arms:
        found = run.latents["arms"][arm]
        steered = {record["parent"]: record for record in run.steering["arms"].get(arm, [])}
        left = budget / len(run.arms)
        parents = []
        for parent in sorted(found["parents"], key=_importance):
            short = _parent(parent, steered, tokens)
            left -= len(json.dumps(short, separators=(",", ":")))
            if left < 0:
                break
            parents.append(short)
        out[arm] = {"n_parents": found["n_parents"], "n_children": found["n_children"], "parents": parents}
    chance = next((found for arm in run.arms if (found := run.metric(arm, "purity"))), None)
    concepts = [
        {"name": parent["name"], "children": [child["name"] for child in parent["children"]]}
        for parent in run.concepts["parents"]
    ]
    return {
        "concepts": concepts,
        "first_child": _first_children(concepts),
        "chance": None if chance is None else chance["chance"],
        "min_rows": run.config.concepts.min_test_rows,
        "nats": run.steering["target_nats"],
        "arms": out,
        "tokens": list(tokens.numbers),
    }


def _importance(parent: dict[str, Any]) -> tuple[bool, bool, float, int]:
    return not parent["mapped"], parent["concept"] is None, -parent["share"], parent["latent"]


def _first_children(concepts: list[dict[str, Any]]) -> list[int]:
    """Row of every parent's first child among all children."""
    rows, row = [], 0
    for concept in concepts:
        rows.append(row)
        row += len(concept["children"])
    return rows


def _parent(parent: dict[str, Any], steered: dict[int, dict[str, Any]], tokens: Tokens) -> dict[str, Any]:
    record = steered.get(parent["concept"]) if parent["mapped"] else None
    return {
        "latent": parent["latent"],
        "concept": parent["concept"],
        "mapped": parent["mapped"],
        "share": parent["share"],
        "mean": parent["mean_value"],
        "purity": short(parent["purity"]),
        "leakage": short(parent["leakage"]),
        "recall": short(parent["recall"]),
        **_described(parent, tokens),
        "children": [
            {
                "index": child["index"],
                "concept": child["concept"],
                "share": child["share_of_parent"],
                **_described(child, tokens),
            }
            for child in parent["children"]
        ],
        "steering": None if record is None else _steering(record, tokens),
    }


def _described(latent: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    """Words and contexts; a context's values are [place, value] pairs of the tokens where it is active."""
    return {
        "reads": _pairs(latent["reads"], tokens),
        "writes": _pairs(latent["writes"], tokens),
        "fires": [[tokens(token), mean, count] for token, mean, count in latent["fires_on"]],
        "contexts": [
            {
                "doc": context["doc"],
                "pos": context["pos"],
                "tokens": [tokens(token) for token in context["tokens"]],
                "values": [[t, value] for t, value in enumerate(context["values"]) if value > 0],
            }
            for context in latent["contexts"]
        ],
    }


def _steering(record: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    example = record["example"]
    return {
        "alpha": short(record["alpha"]),
        "effect": short(record["effect"]),
        "leakage": short(record["steering_leakage"]),
        "chance": short(record["chance_steering_leakage"]),
        "example": None
        if example is None
        else {
            "context": [tokens(token) for token in example["context"]],
            "before": _pairs(example["before"], tokens),
            "after": _pairs(example["after"], tokens),
        },
    }


def _pairs(words: list[list[Any]] | None, tokens: Tokens) -> list[list[Any]]:
    """[token number, score] pairs; none where the model has no output head."""
    return [[tokens(token), score] for token, score in words or []]


def short(value: float | None) -> float | None:
    """Three significant digits."""
    return None if value is None else float(f"{value:.3g}")
