"""What mkdocs does to pages: the tables of the config and of the commands, and links to files beside the docs."""

import re
from typing import Any

import typer

from polytope_hsae.cli import app
from polytope_hsae.config import Config

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+(?!docs/)([^)]*)\)")


def config_tables() -> str:
    """One table per block of a config: field, type, default, meaning."""
    schema = Config.model_json_schema()
    blocks = {"Config": schema, **schema["$defs"]}
    parts = []
    for name, block in blocks.items():
        if "properties" not in block:
            continue
        rows = [
            f"| `{field}` | {_kind(spec)} | {_default(spec)} | {_text(spec)} |"
            for field, spec in block["properties"].items()
        ]
        parts.append(
            "\n".join([f"## {name}", "", "| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
        )
    return "\n\n".join(parts)


def cli_tables() -> str:
    """Every command with its help and its options."""
    parts: list[str] = []
    _add_commands(typer.main.get_command(app), "hsae", parts)
    return "\n\n".join(parts)


def _add_commands(command: Any, name: str, parts: list[str]) -> None:
    for child in getattr(command, "commands", {}).values():
        _add_commands(child, f"{name} {child.name}", parts)
    if hasattr(command, "commands"):
        return
    rows = [
        f"| `{_names(p)}` | {_escape(getattr(p, 'help', None) or '')} |" for p in command.params if p.name != "help"
    ]
    parts.append("\n".join([f"## {name}", "", command.help or "", "", "| option | meaning |", "| --- | --- |", *rows]))


def _names(parameter: Any) -> str:
    return ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else parameter.name


def _kind(spec: dict[str, Any]) -> str:
    if "$ref" in spec:
        name = spec["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec["enum"])
    choices = [_kind(choice) for choice in spec.get("anyOf", [])]
    return " or ".join(choices) or str(spec.get("type", spec.get("const", "any")))


def _default(spec: dict[str, Any]) -> str:
    return f"`{spec['default']}`" if "default" in spec else ""


def _text(spec: dict[str, Any]) -> str:
    return _escape(spec.get("description", ""))


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("{", "&#123;").replace("[", "&#91;").replace("<", "&lt;")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the two generated pages in; name a file outside the docs in place of a link to it."""
    markdown = markdown.replace(
        "<!-- config tables -->", config_tables() if "<!-- config tables -->" in markdown else ""
    )
    markdown = markdown.replace(
        "<!-- command tables -->", cli_tables() if "<!-- command tables -->" in markdown else ""
    )
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
