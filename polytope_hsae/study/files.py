"""The files that every kind of study has: its own, which is YAML, and a JSON record for every run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import yaml
from pydantic import ValidationError

from ..config import Block, ConfigError, first_line
from ..fileio import read_json, update_text
from ..parsing import did_you_mean, parse_yaml

BlockT = TypeVar("BlockT", bound=Block)
KeyT = TypeVar("KeyT", bound="Key")


class Key(Protocol):
    """Which run of a study a record is of: a named tuple of fields that the record has."""

    @property
    def file(self) -> str:
        """The record's place below runs/."""


def read_study(path: Path) -> dict[str, Any]:
    """The fields of a study's file. Raises ConfigError where it is none, with the file that may be meant."""
    if not path.is_file():
        near = path.parent if path.parent.is_dir() else path.parent.parent
        files = [str(file) for pattern in ("*.yaml", "*/study.yaml") for file in sorted(near.glob(pattern))]
        raise ConfigError(f"study: found {str(path)!r}, allowed: a YAML file{did_you_mean(str(path), files)}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, allowed: a mapping of a study's fields")
    return tree


def validated(block: type[BlockT], tree: Mapping[str, Any], where: str) -> BlockT:
    """The fields as a block. Raises ConfigError of one line that begins with `where`."""
    try:
        return block.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}{first_line(error, block)}") from error


def study_yaml(study: Block, mode: Literal["python", "json"] = "python") -> str:
    """A study as YAML, without what is as by default."""
    return yaml.safe_dump(study.model_dump(mode=mode, exclude_defaults=True), sort_keys=False, width=120)


def study_folder(path: Path, name: str, out: Path | None) -> Path:
    """Where a study's records lie: `out`; else beside its file, in a folder `name` unless that is a study.yaml."""
    if out is not None:
        return out
    return path.parent if path.name == "study.yaml" else path.parent / name


def nothing_wanted(only: str | None, arms: list[str], globs: str) -> ConfigError:
    """The error for an --only that no run of these arms has."""
    meant = did_you_mean(str(only), arms)
    return ConfigError(f"--only: found {only!r}, allowed: {', '.join(arms)}, or a glob of {globs}{meant}")


def claim(folder: Path, path: Path, changes: list[str], text: Callable[[], str], refusal: str) -> None:
    """Write a study's text as its folder's study.yaml, unless that is the file that was read, `path`.

    changes: the overrides in the text. Raises ConfigError, which ends with `refusal`, if they had to go into `path`.
    """
    target = folder / "study.yaml"
    if not target.is_file() or not target.samefile(path):
        update_text(target, text())
    elif changes:
        raise ConfigError(f"--set: found {changes[0]!r} for {refusal}")


def key_of(kind: type[KeyT], record: Mapping[str, Any]) -> KeyT:
    """Which run a record is of."""
    named_tuple: Any = kind  # which no type of Python's can stand for
    return named_tuple._make(record[field] for field in named_tuple._fields)


def read_records(folder: Path, pattern: str, content: Any, kind: type[KeyT]) -> dict[KeyT, Any]:
    """All records of a study's folder. Raises ValueError for a file that is none, or has another run's name.

    content: the type of what is read of a record before its numbers are.
    """
    found = {}
    for path in sorted((folder / "runs").glob(pattern)):
        record = read_json(path, content)
        key = key_of(kind, record)
        if path.relative_to(folder / "runs").as_posix() != key.file:
            raise ValueError(f"{path}: found the record of {key.file}, allowed: a file of its own name")
        found[key] = record
    return found


def still_valid(
    records: Mapping[KeyT, Any],
    settings_hash: Callable[[KeyT], str],
    data_sha256: str,
    untested: str | None,
    say: Callable[[str], None],
) -> dict[KeyT, Any]:
    """Records with the present settings and data; says of every other one why it is made again.

    untested: what is said of one without test values; None where they are not asked for.
    """
    kept = {}
    for key, record in records.items():
        if record["settings_sha256"] != settings_hash(key):
            say(f"{key.file}: made with other settings, is made again")
        elif record["data_sha256"] != data_sha256:
            say(f"{key.file}: made from other data, is made again")
        elif untested is not None and record["failed"] is None and "test" not in record:
            say(f"{key.file}: {untested}")
        else:
            kept[key] = record
    return kept
