"""The commands of `hsae study`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="A grid of arms, L0 and seeds on real text: one JSON file per run, a table and plots from those."
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")]
Packed = Annotated[Path, typer.Argument(metavar="FILE", help="What `pack` wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key.path=value: a field of the study (text=FOLDER), or else of its config; repeatable."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Study folder; default: the file's, or NAME beside a file that is not a study.yaml."),
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Where activations (and models) are kept; default: cache in the study folder."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def teller(command: str, quiet: bool) -> Callable[[str], None]:
    """Prints lines that begin with the command's name; nothing if `quiet`."""
    return (lambda message: None) if quiet else (lambda message: typer.echo(f"{command}: {message}"))


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study's YAML file, e.g. studies/win/study.yaml.")],
    overrides: Overrides = None,
    out: Out = None,
    only: Annotated[str | None, typer.Option("--only", help="Only this arm, or a glob of ARM-HOOK-L0.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Runs made now, at most.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Runs at once, each in a process.")] = 1,
    test: Annotated[bool, typer.Option("--test", help="Measure on test documents, too.")] = False,
    device: Device = "auto",
    cache: Cache = None,
    quiet: Quiet = False,
) -> None:
    """Make the runs that are not there yet; one that is stopped goes on where it was."""
    from .run import run_study
    from .workers import Options

    options = Options(only, limit, workers, test, device, cache)
    run_study(file, overrides or [], out, options, teller("study", quiet))


@app.command("table")
def table_command(
    folder: Folder,
    test: Annotated[bool, typer.Option("--test", help="Show test instead of validation values.")] = False,
) -> None:
    """Write table.md, pareto.svg and pareto.html from the study's files alone."""
    from .table import write_table

    for path in write_table(folder, "test" if test else "val"):
        typer.echo(str(path))


@app.command("pack")
def pack_command(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file to write, a run a line.")],
) -> None:
    """Write all runs as one file, to carry it to another machine."""
    from .pack import pack_runs

    typer.echo(f"{file}: {pack_runs(folder, file)} runs")


@app.command("unpack")
def unpack_command(
    file: Packed,
    folder: Folder,
) -> None:
    """Write the runs of a packed file as files of a study folder."""
    from .pack import unpack_runs

    typer.echo(f"{folder}: {unpack_runs(file, folder)} runs")
