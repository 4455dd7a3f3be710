"""Cells and tables of a sweep's pages: a column is a title and what it says of a result."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..report.words import DASH, listed, markdown_table, number
from .summary import Result, Results, Spread

UNMATCHED = " †"  # stands behind an arm that is not compared at matched L0
SPLITS = {"val": "validation", "test": "test"}


class Column(NamedTuple):
    """A column of a table with a row for every result."""

    title: str
    cell: Callable[[Result], str]


def shown(found: Spread | None, digits: int = 4, sign: bool = False) -> str:
    """'0.7840 ± 0.0010', without the deviation of one seed; a dash where there is none."""
    if found is None:
        return DASH
    text = number(found.mean, digits, sign)
    return text if found.sd is None else f"{text} ± {number(found.sd, digits)}"


def mean_text(found: Spread | None, digits: int = 3) -> str:
    """The mean; a dash where there is none."""
    return DASH if found is None else number(found.mean, digits)


def percent(found: Spread | None) -> str:
    return DASH if found is None else f"{number(100 * found.mean, 2)} %"


def rows_of(columns: Sequence[Column], results: Sequence[Result]) -> list[str]:
    """A Markdown table: a row for every result."""
    header = ["arm", *(column.title for column in columns)]
    return markdown_table(header, [[_name(found), *(column.cell(found) for column in columns)] for found in results])


def _name(result: Result) -> str:
    seeds = len(result.records) + result.failed
    failed = f" ({result.failed} of {seeds} failed)" if result.failed and len(result.trials) == 1 else ""
    return result.cell.arm + failed


def of_versions(results: Results) -> list[str]:
    """A line where the records are of more than one version of the code, and one on what is left out."""
    lines = []
    if len({record["code"]["sources_sha256"] for record in results.runs.values()}) > 1:
        lines += ["", "The runs were made with more than one version of the code; each says which."]
    if results.left_out:
        lines += ["", f"Left out, because the sweep does not ask for them as they were made: {results.left_out} runs."]
    return lines


def devices(results: Results) -> str:
    """The machines that the runs were made on."""
    return listed(sorted({record["code"]["device"] for record in results.runs.values()}))
