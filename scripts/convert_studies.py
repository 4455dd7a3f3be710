"""Convert the records of version 0.1's studies (a JSON file a run) into sweeps (runs.jsonl, hooks.json).

    git archive 9f256ca studies | tar -x -C OLD
    python scripts/convert_studies.py OLD/studies studies

Numbers are copied as they are; names follow this version, and hashes are those of the present study.yaml. Records that
the study does not ask for are left behind and counted.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polytope_hsae.fileio import read_json, write_json
from polytope_hsae.sweep import language, synthetic
from polytope_hsae.sweep.plan import WORLD, RunKey, Sweep, load_sweep, settings_hash
from polytope_hsae.sweep.records import key_of, write_runs

RENAMED = {"zero_sum_rows": "no_fire_rate"}
OF_LM = ("model_revision", "tokenizer_sha256", "ontology")


def win(old: Path, sweep: Sweep, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs of `hsae study`: measured on both splits, the hierarchy on validation rows."""
    for path in sorted((old / "runs").glob("*.json")):
        found = read_json(path, dict[str, Any])
        steps = found["rows"] // 4096
        made = {name: found[name] for name in (*RunKey._fields, "kind", "code", "workers", "failed", "atoms")}
        made |= {"text_sha256": found["text_sha256"], **{name: identity[name] for name in OF_LM}}
        made |= {"steps": steps, "tokens": found["rows"]}
        made |= {name: found[name] for name in ("parameters", "flops_per_row", "peak_bytes")}
        for split in ("val", "test"):
            parts = found[split]
            metrics = {name: value for name, value in parts.items() if isinstance(value, dict)}
            made[split] = {name: value for name, value in parts.items() if name not in metrics}
            made[split]["metrics"] = metrics | (found["hierarchy"] if split == "val" else {})
        made |= {"usage": found["usage"], "seconds": {"train": found["train_seconds"], "all": found["seconds"]}}
        yield made


def evidence(old: Path, sweep: Sweep, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs of `hsae findings`."""
    for path in sorted((old / "runs").glob("*/*.json")):
        found = read_json(path, dict[str, Any])
        for split in ("val", "test"):
            if split in found:
                metrics = found[split]["metrics"]
                found[split]["metrics"] = {RENAMED.get(name, name): metrics[name] for name in metrics}
        yield {**found, "l0": None, "lr": None}


def of_world(old: Path, sweep: Sweep, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs of `hsae synthetic`."""
    for path in sorted((old / "runs").glob("*.json")):
        found = read_json(path, dict[str, Any])
        seconds = {"train": found.pop("train_seconds"), "all": found.pop("seconds")}
        measured = ("test_rows", "ev", "l0", "l0_parents", "l0_children", "features", "edges", "two_level_bound")
        test = {name: found.pop(name) for name in measured}
        del found["config"], found["started"]
        yield {**found, "hook": WORLD, "l0": None, "lr": None, "seconds": seconds, "test": test}


KINDS: dict[str, Callable[[Path, Sweep, dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "win": win,
    "evidence": evidence,
    "evidence-small": evidence,
    "synthetic": of_world,
    "synthetic-small": of_world,
}


def convert(old: Path, new: Path) -> str:
    """Write the records of one study; returns what was done."""
    sweep, configs = load_sweep(new / "study.yaml")
    asked = [key for hook in sweep.places for key in sweep.keys(hook)]
    converted = {}
    first = next(iter(configs.values()))
    packaged = {} if sweep.world else language.data_identity(first.model_copy(update={"corpus": type(first.corpus)()}))
    for record in KINDS[new.name](old, sweep, packaged):
        key = key_of(record)
        if key not in asked:
            continue
        if sweep.world is not None:
            data = synthetic.data_identity(sweep)
        else:
            if any(record[name] != packaged[name] for name in OF_LM):
                raise ValueError(f"{key.path}: found another language model, tokenizer or ontology than the packaged")
            data = language.identified({name: record[name] for name in ("text_sha256", *OF_LM)})
        ordered = {**{name: record[name] for name in RunKey._fields}, "settings_sha256": settings_hash(sweep, key)}
        converted[key] = {**ordered, **{name: record[name] for name in record if name not in ordered}, **data}
    write_runs(new, {key: converted[key] for key in asked if key in converted})
    hooks = {path.stem: read_json(path, dict[str, Any]) for path in sorted((old / "runs").glob("*.json"))}
    kept = {hook: found for hook, found in hooks.items() if "evidence" in found}
    if kept:
        write_json(new / "hooks.json", kept)
    records = len(list((old / "runs").rglob("*.json"))) - len(kept)
    return f"{new.name}: {len(converted)} of {records} records, evidence of {len(kept)} hooks"


if __name__ == "__main__":
    for name in KINDS:
        print(convert(Path(sys.argv[1]) / name, Path(sys.argv[2]) / name))
