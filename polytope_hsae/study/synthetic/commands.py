"""The commands of `hsae synthetic`."""

from pathlib import Path
from typing import Annotated

import typer

from ..commands import Folder, Quiet, teller

app = typer.Typer(help="All models on one stream of rows with known features: what each of them recovers.")


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study's file, e.g. studies/synthetic/study.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value: a field of the study; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Study folder; default: the file's.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only this arm, or a glob of arms.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Runs at once, each in a process.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, or cuda:0,cuda:1 and so on.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Make the runs that are not there yet, and the table; one that is stopped goes on where it was."""
    from .run import Options, run_synthetic

    run_synthetic(file, overrides or [], out, Options(only, workers, device), teller("synthetic", quiet))


@app.command("table")
def table_command(folder: Folder) -> None:
    """Write table.md from the study's files alone."""
    from .table import write_table

    typer.echo(str(write_table(folder)))
