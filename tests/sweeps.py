"""Tiny sweeps that run in seconds: a grid of L0s and learning rates, one with a teacher, one on synthetic rows."""

import json
from pathlib import Path
from typing import Any

import yaml
from running import Answer, hsae

HOOKS = ("final_residual_pre_unembed", "layers.1")
SMOKE = {
    "run.threads": 1,
    "corpus.max_tokens": 6000,
    "data.bias_rows": 64,
    "training.batch_size": 64,
    "training.baseline.stages": [{"name": "train", "steps": 4}],
    "training.teacher.stages": [{"name": "train", "steps": 4}],
    "concepts.label": "current_token",
    "concepts.min_test_rows": 1,
    "eval.lm_contexts": 2,
    "eval.steering.contexts": 1,
    "eval.steering.max_concepts": 2,
    "hsae.causal_ortho_lambda": 0,
}
GRID: dict[str, Any] = {
    "name": "grid",
    "config": "smoke",
    "set": SMOKE,
    "hooks": [HOOKS[0]],
    "steering": False,
    "seeds": [0, 1],
    "l0": [4],
    "lr": [1e-3, 3e-3],
    "arms": [
        {
            "name": "nested",
            "hsae": {"n_parents": 16, "n_children_per_parent": 3, "subspace_dim": 4, "gate": "hard"},
            "l0": {4: {"topk_parent": 2, "topk_child_total": 2}},
        },
        {"name": "topk", "kind": "topk", "match": {"params": "nested"}},
    ],
}
CONCEPTS: dict[str, Any] = {
    "name": "concepts",
    "config": "smoke",
    "set": SMOKE,
    "seeds": [0, 1],
    "hooks": [
        {"hook": HOOKS[0], "teacher": "teacher", "control": "permuted"},
        {"hook": HOOKS[1], "teacher": "teacher", "control": "permuted", "set": {"eval.steering.target_nats": 0.1}},
    ],
    "arms": [
        {"name": "baseline"},
        {"name": "flat_topk", "kind": "topk", "match": {"l0": "baseline"}},
        {"name": "teacher", "init": "teacher"},
        {"name": "permuted", "init": "permuted_teacher"},
    ],
}
WORLD: dict[str, Any] = {
    "name": "world",
    "config": None,
    "world": {
        "n_features": 80,
        "width": 48,
        "trees": 10,
        "branching": 4,
        "depth": 1,
        "rate_max": 0.3,
        "rate_min": 0.01,
        "orthogonal_steps": 50,
    },
    "sample_rows": 4096,
    "test_rows": 8192,
    "set": {
        "training.lr": 0.01,
        "training.batch_size": 256,
        "training.warmup_steps": 20,
        "training.baseline.stages": [{"name": "train", "steps": 390}],
        "hsae.n_parents": 12,
        "hsae.n_children_per_parent": 4,
        "hsae.gate": "hard",
        "hsae.children": "direct",
        "hsae.parent_budget": "batch",
        "hsae.child_budget": "batch",
        "hsae.topk_parent": 2,
        "hsae.topk_child_total": 2,
        "hsae.top_level_beta": 1.0,
        "hsae.balance_rate": 0,
        "hsae.rate_cap": None,
        "hsae.rate_floor": 0,
    },
    "arms": [
        {"name": "nested"},
        {"name": "topk", "kind": "topk"},
        {"name": "frozen", "kind": "topk", "chance": "frozen"},
        {"name": "random", "chance": "random"},
    ],
}


def written(folder: Path, sweep: dict[str, Any], **changes: Any) -> Path:
    """A sweep's file with some fields replaced."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**sweep, **changes}))
    return path


def run(path: Path, out: Path, fixtures: Path | None, *more: object) -> Answer:
    """`hsae sweep run` on the CPU, with the tiny language model and the cache of `fixtures`."""
    shared = [] if fixtures is None else ["--set", f"model.name={fixtures / 'lm'}", "--cache", fixtures / "cache"]
    return hsae("sweep", "run", path, "--out", out, "--device", "cpu", *shared, *more)


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, in its order."""
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def rewrite(folder: Path, found: list[dict[str, Any]]) -> None:
    """Put these records in the place of a folder's."""
    (folder / "runs.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in found))


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What equal runs have in common."""
    return {name: record.get(name) for name in ("val", "test", "usage", "settings_sha256", "data_sha256", "parameters")}
