"""The commands of `hsae findings`."""

from pathlib import Path
from typing import Annotated

import typer

from ..study.commands import Cache, Device, Folder, Out, Overrides, Packed, Quiet, teller

app = typer.Typer(help="Evidence and controls over hooks, seeds and arms: a JSON record per arm, a page from those.")


@app.command("run")
def run_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The study's YAML file, e.g. studies/evidence-small/study.yaml.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    only: Annotated[str | None, typer.Option("--only", help="Only this arm, or a glob of HOOK-sSEED/ARM.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Records made now, at most.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Arms at once, each in a process.")] = 1,
    test: Annotated[bool, typer.Option("--test", help="Measure on test documents and words, too.")] = False,
    device: Device = "auto",
    cache: Cache = None,
    quiet: Quiet = False,
) -> None:
    """Make the records that are not there yet; one that is stopped goes on where it was."""
    from ..study.workers import Options
    from .run import run_findings

    options = Options(only, limit, workers, test, device, cache)
    run_findings(file, overrides or [], out, options, teller("findings", quiet))


@app.command("write")
def write_command(
    folder: Folder,
    page: Annotated[Path | None, typer.Option("--page", help="Markdown file; default FOLDER/results.md.")] = None,
    test: Annotated[bool, typer.Option("--test", help="Show test instead of validation values.")] = False,
) -> None:
    """Write the page of findings, its figures and FOLDER/results.json, from the study's files alone."""
    from .page import write_page

    for path in write_page(folder, page or folder / "results.md", "test" if test else "val"):
        typer.echo(str(path))


@app.command("pack")
def pack_command(
    folder: Folder, file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file to write, a record a line.")]
) -> None:
    """Write all records as one file, to carry it to another machine."""
    from .pack import pack

    typer.echo(f"{file}: {pack(folder, file)} records")


@app.command("unpack")
def unpack_command(file: Packed, folder: Folder) -> None:
    """Write the records of a packed file as files of a study folder."""
    from .pack import unpack

    typer.echo(f"{folder}: {unpack(file, folder)} records")
