"""Any saved models side by side on one run's activations, concepts and language model."""

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from ..models.base import SparseAutoencoder
from .measure import measure_models, metrics_table
from .run import Run

SPLITS = ("val", "test")


def compare_models(run: Run, folders: list[Path], split: str | None = None) -> dict[str, Any]:
    """Measure saved models as phase 4 measures a run's arms; nothing is written.

    `split` is val or test, by default the config's. Returns {"run": {model, hook, label, split, seed}, "models": {name:
    {path, architecture, parameters, metrics: {METRIC: {value, ci95, chance, n}}}}}; a name is the
    shortest end of the model's path that no other model has.

    Raises ValueError (one line) for a folder without a model, one given twice, a model of another width than the
    activations, and another split; ConfigError when the run's phase 1 is not finished.
    """
    split = split or run.config.eval.split
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, allowed: {', '.join(SPLITS)}")
    names = _display_names(folders)
    run.require_done(1)
    models = {name: _load(run, folder) for name, folder in zip(names, folders, strict=True)}
    measured = measure_models(run, models, split, step="evaluate")
    return {
        "run": {
            "model": run.lm.name,
            "hook": run.hook,
            "label": run.label,
            "split": split,
            "seed": run.config.run.seed,
        },
        "models": {
            name: {
                "path": str(folder),
                "architecture": type(models[name]).__name__,
                "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
                "metrics": {key: metric.to_json() for key, metric in measured[name].evaluation.metrics.items()},
            }
            for name, folder in zip(names, folders, strict=True)
        },
    }


def format_comparison(result: dict[str, Any]) -> Table:
    """The models' main metrics as a table for the terminal."""
    run = result["run"]
    title = f"{run['model']}, {run['hook']}, {run['label']} labels, {run['split']} split"
    return metrics_table(title, {name: model["metrics"] for name, model in result["models"].items()})


def _display_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that all differ."""
    if not folders:
        raise ValueError("models: found none, allowed: one folder or more")
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise ValueError(f"models: found {folder} twice, allowed: folders that differ")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = [Path(*part[-length:]).as_posix() for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _load(run: Run, folder: Path) -> SparseAutoencoder:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: found no config.json, allowed: the folder of a saved model")
    sae = SparseAutoencoder.from_pretrained(folder, device=run.device)
    if sae.width != run.store.width:
        allowed = f"{run.store.width}, the width of the activations in {run.folder}"
        raise ValueError(f"{folder}: width: found {sae.width}, allowed: {allowed}")
    return sae
