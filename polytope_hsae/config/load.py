"""Reading a config: a packaged name or a YAML file, overrides, validation."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..parsing import cut, did_you_mean, parse_yaml, shown
from .block import MAX_BYTES, PACKAGE, ConfigError, first_line
from .places import located
from .run import Config


def find_config(name_or_path: str) -> Path:
    """Path of a packaged config by name, or of a YAML file. Raises ConfigError naming the packaged ones."""
    packaged = PACKAGE / "configs" / f"{name_or_path}.yaml"
    for path in (Path(name_or_path), packaged):
        if path.is_file():
            return path
    names = sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml"))
    near = Path(name_or_path).parent
    files = sorted(str(path) for path in near.glob("*.yaml")) if near.is_dir() else []
    meant = did_you_mean(name_or_path, [*names, *files])
    raise ConfigError(f"config: found {name_or_path!r}, allowed: a YAML file or one of {', '.join(names)}{meant}")


def load_config(name_or_path: str | None, overrides: list[str] | None = None) -> Config:
    """Read, override and validate a config; its relative paths become absolute, from the working directory.

    Args:
        name_or_path: packaged name ("quickstart") or path of a YAML file; None = the defaults of all fields.
        overrides: "key.path=value" strings; values are read as YAML; list items by number (arms.0.name=x).

    Raises:
        ConfigError: one line naming the field, what was found and what is allowed.
    """
    tree = {} if name_or_path is None else _read(find_config(name_or_path))
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return located(Config.model_validate(tree))
    except ValidationError as error:
        raise ConfigError(first_line(error, Config)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"found {path.stat().st_size} bytes, allowed: {MAX_BYTES}")
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    tree = {} if tree is None else tree  # an empty file
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, allowed: a mapping of config blocks")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one "key.path=value" into a tree. Raises ConfigError when it is none, or its place is not there."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set: found {shown(override)}, allowed: key.path=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {cut(key)}: found {shown(text)}, allowed: a YAML value ({error})") from error
    put(tree, key, value)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at "key.path" of a tree, making the blocks above it. Raises ConfigError where one is a value."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        _check_step(node, part, key)
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    _check_step(node, last, key)
    node[int(last) if isinstance(node, list) else last] = value


def _check_step(node: Any, part: str, key: str) -> None:
    """Raise ConfigError when `part` of an override's key cannot be an item of `node`."""
    if isinstance(node, list) and part not in map(str, range(len(node))):
        raise ConfigError(f"--set {cut(key)}: found item {shown(part)}, allowed: 0 to {len(node) - 1}")
    if not isinstance(node, dict | list):
        raise ConfigError(f"--set {cut(key)}: found a value above {shown(part)}, allowed: a block")


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML, every field present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
