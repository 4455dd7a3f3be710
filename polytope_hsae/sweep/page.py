"""`hsae sweep page`: what one or several sweeps show, in words computed from the records, with figures and tables.

PAGE            a section for every sweep
PAGE's name/    NAME.md, all tables of a sweep, and the figures
"""

from pathlib import Path

from ..fileio import update_text
from .figures import drawings
from .summary import read_results
from .table import kind_of, table


def write_page(folders: list[Path], page: Path, split: str) -> list[Path]:
    """Write the page, its tables and figures; the same records give the same bytes."""
    beside, lines, written = page.with_suffix(""), ["# Results", ""], []
    command = f"hsae sweep page {' '.join(folder.as_posix() for folder in folders)}{' --test' * (split == 'test')}"
    lines += [f"Written by `{command} --page {page.name}` from the files of these studies alone.", ""]
    for folder in folders:
        results = read_results(folder, split)
        name = results.sweep.name
        update_text(beside / f"{name}.md", table(results))
        written.append(beside / f"{name}.md")
        lines += [
            f"## {name}",
            "",
            *([results.sweep.about.strip(), ""] if results.sweep.about else []),
            *kind_of(results).summary(results),
            "",
        ]
        for drawing in drawings(results):
            update_text(beside / f"{drawing.name}.svg", drawing.standalone)
            written.append(beside / f"{drawing.name}.svg")
            lines.append(f"![{drawing.name.replace('-', ' ')}]({beside.name}/{drawing.name}.svg)")
        lines += ["", f"All numbers: [{name}]({beside.name}/{name}.md).", ""]
    update_text(page, "\n".join(lines).rstrip() + "\n")
    return [page, *written]
