"""All runs of a study as one file, to carry from one machine to another."""

import json
from pathlib import Path

from ..fileio import write_json, write_text
from ..parsing import checked, parse_json
from .files import key_of
from .plan import RunKey
from .run import Record, records_in


def pack_runs(folder: Path, file: Path) -> int:
    """Write every record of a study folder as one line of `file`; returns how many."""
    records = records_in(folder)
    write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records.values()))
    return len(records)


def unpack_runs(file: Path, folder: Path) -> int:
    """Write every line of `file` as a run's file; returns how many.

    Raises ValueError, before any is written, for a line that is none.
    """
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(checked(parse_json(line), Record, "not a run"))
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: {error}") from error
    for record in records:
        run = key_of(RunKey, record)
        if Path(run.file).name != run.file:
            raise ValueError(f"{file}: arm: found {run.arm!r}, allowed: a name without folders")
        write_json(folder / "runs" / run.file, record)
    return len(records)
