"""Checkpoints: one safetensors file with all that resuming needs, written whole or not at all."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, Json
from torch import Tensor
from typing_extensions import TypedDict

from ..fileio import check_tensors, read_tensors, write_tensors
from ..parsing import checked

KEEP = 2
PARTS = ("model", "optimizer", "usage", "noise")
NAME = re.compile(r"step-(\d{8})\.safetensors")
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class _Stream(TypedDict):
    """The place in the stream of rows; `RowStream.load_state_dict` checks that it is the same stream."""

    rows_consumed: Annotated[int, Field(ge=0, lt=2**63)]


class _Metadata(TypedDict):
    step: Json[Annotated[int, Field(ge=0, lt=2**63)]]
    stream: Json[_Stream]


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
    checked(metadata, _Metadata, path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"{path}: found a tensor {key!r}, allowed: those of {', '.join(PARTS)}")
        parts[part][name] = tensor
    return int(metadata["step"]), parts, metadata


def check_parts(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    like: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, Tensor],
) -> None:
    """Raise ValueError unless a checkpoint's tensors are as in `like`, and the optimiser's as the parameters."""
    layout = {f"{part}.{name}": ((t.dtype,), t.shape) for part, tree in like.items() for name, t in tree.items()}
    for name, parameter in names.items():
        if any(f"{name}.{key}" in parts["optimizer"] for key in OPTIMIZER_STATE):
            layout[f"optimizer.{name}.step"] = ((torch.float32,), torch.Size())
            for key in OPTIMIZER_STATE[1:]:
                layout[f"optimizer.{name}.{key}"] = ((parameter.dtype,), parameter.shape)
    check_tensors(path, {f"{part}.{name}": t for part, tree in parts.items() for name, t in tree.items()}, layout)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's state as "tensor.key": parameters that never had a gradient have none."""
    state = {name: optimizer.state[parameter] for name, parameter in names.items() if parameter in optimizer.state}
    return {f"{name}.{key}": entry[key] for name, entry in state.items() for key in OPTIMIZER_STATE}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    optimizer.state.clear()
    for name, parameter in names.items():
        if f"{name}.step" in state:
            entry = {key: state[f"{name}.{key}"].clone() for key in OPTIMIZER_STATE}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entry.items()
            }
