"""Checkpoints: one safetensors file with all that resuming needs, written whole or not at all."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..fileio import read_tensors, write_tensors

KEEP = 2
NAME = re.compile(r"step-(\d{8})\.safetensors")
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; None if there is none."""
    found = sorted(path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name))
    return found[-1] if found else None


def save_checkpoint(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write every part's tensors as "part.name", then delete all but the last two checkpoints."""
    tensors = {f"{part}.{name}": tensor for part, tree in parts.items() for name, tensor in tree.items()}
    write_tensors(folder / f"step-{step:08d}.safetensors", tensors, {"step": str(step), **metadata})
    for old in sorted(path for path in folder.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink()


def load_checkpoint(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, str]]:
    """(step, tensors by part and name, metadata). Raises ValueError for a broken file."""
    tensors, metadata = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    if "step" not in metadata:
        raise ValueError(f"{path}: found no step in its metadata, allowed: a file written by the trainer")
    return int(metadata["step"]), parts, metadata


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as "tensor.key": parameters that never had a gradient have none."""
    state = {name: optimizer.state[parameter] for name, parameter in names.items() if parameter in optimizer.state}
    return {f"{name}.{key}": entry[key] for name, entry in state.items() for key in OPTIMIZER_STATE}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], state: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    optimizer.state.clear()
    for name, parameter in names.items():
        if f"{name}.step" in state:
            entry = {key: state[f"{name}.{key}"].clone() for key in OPTIMIZER_STATE}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entry.items()
            }
