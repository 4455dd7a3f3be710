"""`hsae sweep table`: every number of a sweep as Markdown, from its files alone."""

from pathlib import Path
from types import ModuleType

from ..fileio import update_text
from . import concepts, recovered, sizes
from .summary import Results, read_results


def write_table(folder: Path, split: str = "val") -> Path:
    """Write table.md; the same records give the same bytes. Raises ValueError where nothing is to be shown."""
    path = folder / "table.md"
    update_text(path, table(read_results(folder, split)))
    return path


def table(results: Results) -> str:
    """All tables of a sweep as Markdown."""
    return "\n".join(kind_of(results).tables(results)).rstrip() + "\n"


def kind_of(results: Results) -> ModuleType:
    """The module with `tables` and `summary` of a sweep: on synthetic rows, with a teacher's targets, or over sizes."""
    if results.sweep.world is not None:
        return recovered
    return concepts if any(plan.teacher for plan in results.sweep.hooks) else sizes
