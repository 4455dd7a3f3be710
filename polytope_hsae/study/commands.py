"""The commands of `hsae study`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="A grid of arms, L0 and seeds on real text: one JSON file per run, a table and plots from those."
)


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study's YAML file, e.g. studies/win/study.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key.path=value: a field of the study (text=FOLDER), or else of its config; repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Study folder; default studies/NAME.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only this arm, or a glob of ARM-HOOK-L0.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Runs made now, at most.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Runs at once, each in a process.")] = 1,
    test: Annotated[bool, typer.Option("--test", help="Measure on test documents, too.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    cache: Annotated[Path, typer.Option("--cache", help="Where activations are kept.")] = Path("runs/study-cache"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make the runs that are not there yet; one that is stopped goes on where it was."""
    from .run import Options, run_study

    options = Options(only, limit, workers, test, device, cache)
    say = (lambda message: None) if quiet else (lambda message: typer.echo(message))
    run_study(file, overrides or [], out, options, say)


@app.command("table")
def table_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")],
    test: Annotated[bool, typer.Option("--test", help="Show test instead of validation values.")] = False,
) -> None:
    """Write table.md, pareto.svg and pareto.html from the study's files alone."""
    from .table import write_table

    for path in write_table(folder, "test" if test else "val"):
        typer.echo(str(path))


@app.command("pack")
def pack_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file to write, a run a line.")],
) -> None:
    """Write all runs as one file, to carry it to another machine."""
    from .pack import pack_runs

    typer.echo(f"{file}: {pack_runs(folder, file)} runs")


@app.command("unpack")
def unpack_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `pack` wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")],
) -> None:
    """Write the runs of a packed file as files of a study folder."""
    from .pack import unpack_runs

    typer.echo(f"{folder}: {unpack_runs(file, folder)} runs")
