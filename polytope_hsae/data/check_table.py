"""The checks of `checks.py` for a reader: a table of parents and lines on the rest; for rich."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from polytope_hsae.data.concepts import FOLDS


def format_checks(report: Mapping[str, Any]) -> Group:
    """Parents with words, contexts and frequencies by split, then the splits as wholes, then warnings."""
    templated = any(row["templated"] is not None for row in report["parents"])
    table = Table(caption="train/val/test; per million: uses of a word in a million tokens of the corpus")
    table.add_column("parent", min_width=16, overflow="fold")
    for column in ("children", "words", "natural contexts", *(["templated"] if templated else []), "per million"):
        table.add_column(column, justify="right")
    for row in report["parents"]:
        of_child = row["words_of_child"]
        table.add_row(
            Text(row["name"]),
            f"{row['children']} of {of_child['min']}-{of_child['max']}",
            _three(row["words"]),
            _three(row["contexts"]),
            *([_three(row["templated"])] if templated else []),
            _three(row["per_million_and_word"]),
        )
    lines = [*_lines(report), *(f"warning: {line}" for line in report["warnings"])]
    return Group(table, *map(Text, lines))


def _three(values: Mapping[str, float | None]) -> str:
    return "/".join("-" if values[fold] is None else f"{values[fold]:.0f}" for fold in FOLDS)


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = ["no word or token is in two folds, no document in two splits"]
    if report["excluded_words"]:
        lines.append(f"{report['excluded_words']} words of this tokenizer are left out (concepts.exclude)")
    if report["skipped_rows"]:
        lines.append(f"{report['skipped_rows']:,} rows of the corpus have no text and are skipped")
    for fold, found in report["frequency"].items():
        medians = found["median_uses"]
        lines.append(
            f"{fold} words against train words: used {medians[fold]:g} and {medians['train']:g} times (median), "
            f"AUROC {found['auroc']:.3f} (balance 0.5, standard error {found['standard_error']:.3f})"
        )
    documents = report["documents"]
    for name, found in documents.items():
        if "_in_" in name:
            split, _, other = name.partition("_in_")
            lines.append(
                f"{split} documents near to {other} documents: {found['near_duplicates']} of {found['compared']}, "
                f"shared runs of {documents['ngram']} tokens: {_percent(found['share_of_ngrams'])}"
            )
    sizes = report["sizes"]
    of_child = sizes["words_of_child"]
    lines.append(
        f"words of a child: {of_child['min']} to {of_child['max']}, median {of_child['median']:g}; "
        f"children without val words {sizes['children_without_val_words']}, "
        f"without test words {sizes['children_without_test_words']}"
    )
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
