"""The base of all config blocks, types that fields share, and errors of one line."""

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..parsing import did_you_mean, misfit, place

PACKAGE = Path(__file__).parents[1]
FOLDER_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
LAST_WITH = "polytope_hsae 0.1 is the last version with this"
MAX_BYTES = 1_000_000  # of a config file
Fraction = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(le=2**31 - 1)]  # PyTorch breaks on sizes that no 64-bit product holds
Tie = Literal[False, True, "init"]
TensorName = Literal["E", "b_E", "D", "Down", "Up", "F", "b_F", "G", "b_dec", "log_threshold"]
TensorGroup = Literal["router", "decoders", "projectors", "children"]
GROUPS: dict[str, tuple[str, ...]] = {
    "router": ("E", "b_E"),
    "decoders": ("D", "G"),
    "projectors": ("Down", "Up"),
    "children": ("F", "b_F"),
}

BlockT = TypeVar("BlockT", bound="Block")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: field, found, allowed."""


class Block(BaseModel):
    """Base of all config blocks: unknown keys, NaN and infinities are refused; values never change.

    Files of version 0.1 are read: a renamed key with a warning, a removed key only with its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}  # old: new
    deleted: ClassVar[dict[str, Any]] = {}  # field: its default

    @model_validator(mode="before")
    @classmethod
    def _as_of_now(cls, fields: Any) -> Any:
        return cls.modern(fields) if isinstance(fields, dict) else fields

    @classmethod
    def modern(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields under their present names. Raises ValueError for a removed one that does not have its default."""
        for key in (key for key in cls.deleted if key in fields):
            require(key, fields[key], fields[key] == cls.deleted[key], f"{cls.deleted[key]}; {LAST_WITH}")
        for key in (key for key in cls.renamed if key in fields):
            warnings.warn(f"{key} is now called {cls.renamed[key]}", stacklevel=2)
        found = {key: value for key, value in fields.items() if key not in {**cls.deleted, **cls.renamed}}
        return found | {new: fields[old] for old, new in cls.renamed.items() if old in fields}


def require(field: str, found: Any, condition: bool, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}: found {found}, allowed: {allowed}")


def check_split(block: Any) -> Any:
    require(
        "split",
        list(block.split),
        abs(sum(block.split) - 1) < 1e-6 and min(block.split) > 0,
        "three shares above 0 with sum 1",
    )
    return block


def _keys_beside(block: type[Block], location: tuple[int | str, ...]) -> list[str]:
    """The fields of the block that holds the last part of `location`, a path into `block`."""
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = block.model_fields[part].annotation
            inner = (annotation, *get_args(annotation))
            block = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, Block))
    return list(block.model_fields)


def first_line(error: ValidationError, block: type[Block]) -> str:
    """One line for the first problem of a pydantic error about `block`: field, found, allowed."""
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return misfit(error)
    keys = _keys_beside(block, problem["loc"])
    meant = did_you_mean(str(problem["loc"][-1]), keys)
    return f"{place(problem)}: found an unknown key, allowed: {', '.join(keys)}{meant}"
