"""What the shell offers after TAB: names and files of configs, and the fields that --set can change."""

from collections.abc import Iterator
from pathlib import Path

import typer

from .config import PACKAGE, Block, Config, ConfigError, load_config


def complete_config(incomplete: str) -> list[str]:
    """Packaged names and YAML files that begin with what was typed."""
    packaged = sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml"))
    folder, _, start = incomplete.rpartition("/")
    beside = Path(f"{folder}/" if "/" in incomplete else ".")
    files = sorted(path.name for path in beside.glob("*.y*ml")) if beside.is_dir() else []
    prefix = incomplete.removesuffix(start)
    offered = [*packaged, *(f"{prefix}{name}" for name in files)]
    return [name for name in offered if name.startswith(incomplete)]


def complete_field(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Fields of the config that was named, as (`training.lr=`, meaning); of the quickstart where none can be read."""
    # A --set that has no value yet ends the parsing of the line, and what stood before it is left in `args`.
    named = [context.params.get("config"), *context.args, "quickstart"]
    config = next(found for name in named if name is not None and (found := _readable(name)) is not None)
    return [(f"{path}=", meaning) for path, meaning in field_paths(config) if path.startswith(incomplete)]


def _readable(name: str) -> Config | None:
    try:
        return load_config(name)
    except (ConfigError, OSError):
        return None


def field_paths(block: Block, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key path, meaning) of every field below a config block; items of lists of blocks by their number."""
    for name, field in type(block).model_fields.items():
        value, path = getattr(block, name), f"{prefix}{name}"
        # Items that are defaults cannot be set one by one: the file has no list to put them in.
        items = value if isinstance(value, list | tuple) and name in block.model_fields_set else []
        if isinstance(value, Block):
            yield from field_paths(value, f"{path}.")
        elif items and all(isinstance(item, Block) for item in items):
            for number, item in enumerate(items):
                yield from field_paths(item, f"{path}.{number}.")
        else:
            yield path, field.description or ""
