"""All records of a study as one file, to carry from one machine to another."""

import json
from pathlib import Path

from typing_extensions import TypedDict

from ..fileio import write_json, write_text
from ..parsing import checked, parse_json
from ..study.files import key_of
from .plan import Key
from .run import read_hooks, records_in


class Line(TypedDict):
    """A line of a packed file: a file below runs/."""

    file: str
    content: dict[str, object]


def pack(folder: Path, file: Path) -> int:
    """Write every record of a study folder, and what is kept of its hooks, as one line of `file`; returns how many."""
    contents = {f"{hook}.json": content for hook, content in read_hooks(folder).items()}
    contents |= {key.file: record for key, record in records_in(folder).items()}
    lines = [json.dumps({"file": name, "content": content}, ensure_ascii=False) for name, content in contents.items()]
    write_text(file, "".join(f"{line}\n" for line in lines))
    return len(lines)


def unpack(file: Path, folder: Path) -> int:
    """Write every line of `file` as a file of a study folder; returns how many.

    Raises ValueError, before any is written, for a line that is none.
    """
    contents = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = checked(parse_json(line), Line, "not a record")
            content = found["content"]
            own = f"{content.get('hook')}.json" if "arm" not in content else key_of(Key, content).file
            if found["file"] != own or ".." in Path(own).parts or Path(own).is_absolute():
                raise ValueError(f"file: found {found['file']!r}, allowed: its record's own name, {own!r}")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: line {number}: {error}") from error
        contents[own] = content
    for name, content in contents.items():
        write_json(folder / "runs" / name, content)
    return len(contents)
