"""The commands of `hsae sweep`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Sweeps: arms x hooks x L0 x learning rates x seeds, a record a run, tables and pages from those."
)

Test = Annotated[bool, typer.Option("--test", help="Show test instead of validation values.")]


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep's YAML file, e.g. studies/win/study.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="key.path=value: a field of the sweep, or else of its config; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; default: the file's, or NAME beside a file that is not a study.yaml."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only this arm, or a glob of HOOK/RUN.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Runs made now, at most.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Runs at once, each in a process.")] = 1,
    test: Annotated[bool, typer.Option("--test", help="Measure on test documents and words, too.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, or cuda:0,cuda:1 and so on.")] = "auto",
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Where activations and models are kept; default: cache in the folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make the runs that are not there yet; one that is stopped goes on where it was."""
    from .run import run_sweep
    from .workers import Options

    options = Options(only, limit, workers, test, device, cache)
    run_sweep(file, overrides or [], out, options, lambda said: None if quiet else typer.echo(f"sweep: {said}"))


@app.command("table")
def table_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A sweep's folder.")], test: Test = False
) -> None:
    """Write FOLDER/table.md, every number, from the sweep's files alone."""
    from .table import write_table

    typer.echo(str(write_table(folder, "test" if test else "val")))


@app.command("page")
def page_command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Sweeps' folders, a section each.")],
    page: Annotated[
        Path | None, typer.Option("--page", help="Markdown file; default page.md in the first folder.")
    ] = None,
    test: Test = False,
) -> None:
    """Write a page of what sweeps show, with figures and all tables beside it."""
    from .page import write_page

    for path in write_page(folders, page or folders[0] / "page.md", "test" if test else "val"):
        typer.echo(str(path))
