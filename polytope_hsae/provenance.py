"""What a run was made from, and whether a phase has to run again.

provenance.json holds, for every finished phase, the config fields and input files that it depends on and the
environment (versions, device, commit). A phase with unchanged dependencies is skipped; changed ones need --force.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from .config import Config, ConfigError, local_paths
from .fileio import read_json, write_json
from .parsing import shown

LOCAL = "a file or folder"  # stands for a path
NOT_IN_RESULTS = ("baseline", "teacher", "checkpoint_every", "allow_unequal_budget")
PACKAGES = ("polytope-hsae", "torch", "transformers", "safetensors", "numpy", "scipy", "scikit-learn", "pydantic")


def environment(device: str) -> dict[str, Any]:
    """Versions, platform, git commit and device of this process."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _git_commit(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout this package lies in, with -dirty if its code differs from it; None outside one."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
        return answer.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", Path(__file__).parent.name)
    return f"{commit}{'-dirty' if changed else ''}" if commit else None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {"a.b.0": value}."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: value for name, branch in items for key, value in flatten(branch, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): tree}


def dependencies(config: Config, phase: int) -> dict[str, Any]:
    """The flattened part of the config that a phase's outputs depend on (device, threads and trackers do not count).

    Paths do not count either: what lies there is among phase 1's inputs, by its hash.
    """
    tree = config.model_dump(mode="json")
    arms = [arm for arm in tree["arms"] if phase == 4 or config.arm(arm["name"]).phase == phase]
    stages = {
        arm["name"]: [stage.model_dump(mode="json") for stage in config.arm_stages(config.arm(arm["name"]))]
        for arm in arms
    }

    def without(block: str, *keys: str) -> dict[str, Any]:
        return {key: value for key, value in tree[block].items() if key not in keys}

    trained = {
        "normalize": tree["data"]["normalize"],
        "hsae": tree["hsae"],
        "training": without("training", *NOT_IN_RESULTS),
        "stages": stages,
        "arms": arms,
    }
    of_label = ("label", "min_test_rows")
    parts: dict[int, dict[str, Any]] = {
        1: {
            "model": tree["model"],
            "corpus": tree["corpus"],
            "concepts": {**without("concepts", *of_label), "belief": tree["concepts"]["label"] == "belief"},
            "data": without("data", "normalize"),
            "geometry": tree["geometry"],
        },
        2: trained,
        3: {**trained, "teacher": tree["teacher"]},
        4: {"concepts": tree["concepts"], "eval": tree["eval"], "arms": arms},
    }
    found = {"run.seed": config.run.seed, **flatten(parts[phase])}
    return {**found, **{field: LOCAL for field in local_paths(config) if field in found}}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


class _Phase(TypedDict):
    config: dict[str, Any]
    inputs: dict[str, str]
    environment: dict[str, Any]
    seconds: float


class State(TypedDict):
    """The content of provenance.json."""

    phases: dict[str, _Phase]


class Provenance:
    """The run folder's record; `is_done` decides, `record` writes."""

    def __init__(self, run: Path):
        self.path = run / "provenance.json"
        self.state: State = read_json(self.path, State) if self.path.exists() else {"phases": {}}

    def is_done(self, phase: int, config: Config, inputs: dict[str, str], outputs: list[Path], force: bool) -> bool:
        """True when the phase's outputs are there and the recorded dependencies equal the present ones.

        Raises ConfigError naming the first difference when they differ and `force` is off.
        """
        recorded = self.state["phases"].get(f"phase{phase}")
        if recorded is None or not all(path.is_file() for path in outputs):
            return False
        for before, now in ((recorded["config"], dependencies(config, phase)), (recorded["inputs"], inputs)):
            for key in _differing(before, now):
                if force:
                    return False
                found, made = shown(now.get(key)), shown(before.get(key))
                raise ConfigError(
                    f"{key}: found {found}, but phase {phase} of this run folder was made with {made}; "
                    "use --force to make it again or --out for another folder"
                )
        return True

    def inputs(self, phase: int) -> dict[str, str]:
        """sha256 of what a finished phase was made from; empty for any other phase."""
        recorded = self.state["phases"].get(f"phase{phase}")
        return {} if recorded is None else recorded["inputs"]

    def require(self, phase: int, config: Config, inputs: Mapping[str, str]) -> None:
        """Raise ConfigError unless the phase was finished with the present config and `inputs`, forced or not."""
        recorded, now = self.state["phases"].get(f"phase{phase}"), dependencies(config, phase)
        if recorded is None:
            raise ConfigError(f"phase {phase}: not finished in this run folder; run it first, or all with hsae run")
        before = recorded["config"] | {key: recorded["inputs"].get(key) for key in inputs}
        now |= inputs
        for key in _differing(before, now):
            line = f"{key}: found {shown(now.get(key))}, but phase {phase} was made with {shown(before.get(key))}"
            raise ConfigError(f"{line}; run phase {phase} again first")

    def record(self, phase: int, config: Config, inputs: dict[str, str], device: str, seconds: float) -> None:
        """Note a finished phase."""
        self.state["phases"][f"phase{phase}"] = {
            "config": dependencies(config, phase),
            "inputs": inputs,
            "environment": environment(device),
            "seconds": round(seconds, 1),
        }
        write_json(self.path, self.state)
