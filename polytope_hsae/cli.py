"""The command line: `hsae run quickstart` and its parts. It parses, calls a phase and prints.

Imports inside the commands keep `hsae -h` and config errors fast: PyTorch takes seconds to load.
"""

import json
import os
import signal
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from . import __version__
from .completion import complete_config, complete_field
from .config import Config, load_config
from .sweep.commands import app as sweep_app
from .units import size

app = typer.Typer(
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hierarchical sparse autoencoders with teachers from the geometry of language models.",
    pretty_exceptions_enable=False,
)
app.add_typer(sweep_app, name="sweep")


class Split(StrEnum):
    """Documents that no arm was trained on."""

    VAL = "val"
    TEST = "test"


def _silence(quiet: bool) -> bool:
    if quiet:
        warnings.showwarning = lambda *_: None
    return quiet


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A packaged config (quickstart, recommended, factored, smoke, v2-focused, jax-compat) or a YAML file.",
        autocompletion=complete_config,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: key.path=value; repeatable.", autocompletion=complete_field),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make what a changed config or input affects again.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Same as --set run.device=...")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same as --set run.seed=...")]
QuietOption = Annotated[bool, typer.Option("--quiet", callback=_silence, help="Print nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document; the rest goes to standard error.")]


def _config(name: str, overrides: list[str] | None, device: str | None, seed: int | None) -> Config:
    shortcuts = [f"run.device={device}"] if device is not None else []
    shortcuts += [f"run.seed={seed}"] if seed is not None else []
    return load_config(name, [*(overrides or []), *shortcuts])


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hsae {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def no_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _add_run(name: str, help_text: str) -> None:
    """Add `hsae run` or `hsae phase4`: those that end with results, which --json prints."""

    @app.command(name, help=help_text)
    def run_command(
        config: ConfigArgument,
        overrides: SetOption = None,
        out: OutOption = None,
        force: ForceOption = False,
        device: DeviceOption = None,
        seed: SeedOption = None,
        quiet: QuietOption = False,
        as_json: JsonOption = False,
    ) -> None:
        from .fileio import read_json
        from .phases.run import Run
        from .phases.run_all import PHASES, run_all

        run = Run(_config(config, overrides, device, seed), out, force=force, quiet=quiet, stderr=as_json)
        (run_all if name == "run" else PHASES[4])(run)
        if as_json:
            _print_json(read_json(run.phase(4) / "results.json"))


def _add_phase(number: int, help_text: str) -> None:
    @app.command(f"phase{number}", help=help_text)
    def phase_command(
        config: ConfigArgument,
        overrides: SetOption = None,
        out: OutOption = None,
        force: ForceOption = False,
        device: DeviceOption = None,
        seed: SeedOption = None,
        quiet: QuietOption = False,
    ) -> None:
        from .phases.run import Run
        from .phases.run_all import PHASES

        PHASES[number](Run(_config(config, overrides, device, seed), out, force=force, quiet=quiet))


_add_run("run", "All four phases and the report; resumes what was interrupted and skips what is done.")
_add_phase(1, "Concepts, activations, geometry, teacher, evidence.")
_add_phase(2, "Train the baseline and the flat models.")
_add_phase(3, "Train the teacher's models and their controls.")
_add_run("phase4", "Evaluate all models and judge the targets.")


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")],
) -> None:
    """Write report.html of finished runs: one page each, to read or to send."""
    from .report.build import write_report

    for folder in runs:
        path = write_report(folder)
        typer.echo(f"{path} ({size(path.stat().st_size)})")


@app.command("evaluate")
def evaluate_command(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL_DIR...", help="Folders of saved models.")],
    on: Annotated[
        Path | None,
        typer.Option("--on", help="Run folder to measure on; default: the one that the first model lies in."),
    ] = None,
    split: Annotated[Split | None, typer.Option("--split", help="Default: the run's eval.split.")] = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare any saved models on one run's held-out documents and words; the run folder is not changed."""
    from .phases.compare import compare_models, format_comparison
    from .phases.run import Run, run_folder_of

    folder = on if on is not None else run_folder_of(models[0])
    run = Run.open(folder, device, quiet=quiet, stderr=as_json)
    comparison = compare_models(run, models, split)
    if as_json:
        _print_json(comparison)
    else:
        run.console.print(format_comparison(comparison))


@app.command("concepts")
def concepts_command(
    config: ConfigArgument,
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """The tree of parents and children with their words and checks of the splits, for a config or a finished run."""
    from .data.checks import format_checks
    from .data.concepts import Concepts, format_tree
    from .fileio import read_json
    from .lm.loading import load_tokenizer, tokenizer_sha256
    from .phases.phase1_teacher import make_checks, make_concepts
    from .phases.run import load_corpus

    loaded = load_config(config, overrides)
    model = loaded.model
    tokenizer = load_tokenizer(model.name, revision=model.revision)
    made = out / "phase1" / "concepts.json" if out is not None else None
    if made is not None and made.is_file():
        concepts = Concepts.from_json(read_json(made))
    else:
        concepts = make_concepts(loaded, tokenizer)
    corpus = load_corpus(loaded, tokenizer, tokenizer_sha256(model.name, revision=model.revision))
    checks, _ = make_checks(loaded, tokenizer, concepts, *corpus)
    if as_json:
        _print_json({**concepts.to_json(), "checks": checks})
    else:
        Console().print(format_tree(concepts))
        Console().print(format_checks(checks))


@app.command("import-jax")
def import_jax_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Folder of an orbax checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; from_pretrained reads it.")],
    topk: Annotated[
        int | None, typer.Option("--topk", min=1, help="Active experts per row; default: the checkpoint's.")
    ] = None,
) -> None:
    """Weights of the published JAX H-SAE as a model of this package (needs the extra `jax`)."""
    from .interop.jax_hsae import import_jax

    model = import_jax(checkpoint, out, topk)
    typer.echo(
        f"{out}: {model.n_parents} parents with {model.n_children} children each, width {model.width}, "
        f"{model.config.topk_parent} active parents"
    )


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """What this machine has for the package, what is broken (exit code 1) and what could be better."""
    from .doctor import examine, format_checks, to_json

    checks = examine()
    if as_json:
        _print_json(to_json(checks))
    else:
        typer.echo(format_checks(checks))
    if any(check.broken for check in checks):
        raise typer.Exit(1)


@app.command("bench")
def bench_command(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", help="A packaged config; repeatable. Default: jax-compat and v2-focused; on a CPU factored."
        ),
    ] = None,
    overrides: SetOption = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of which a time is the median.")] = 20,
    peers: Annotated[str, typer.Option("--peers", help="all, none, or some of flat,naive.")] = "all",
    routing: Annotated[str, typer.Option("--routing", help="uniform, zipf or both.")] = "both",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for bench.json and bench.md.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time a training step of ours and of plain PyTorch peers, beside this machine's ceilings."""
    from .bench.run import PEERS, ROUTINGS, Options, bench, chosen, device_of
    from .bench.shapes import load_shape
    from .bench.table import markdown, write

    which = chosen(peers, PEERS, "--peers", {"all": PEERS, "none": ()})
    routings = chosen(routing, ROUTINGS, "--routing", {"both": ROUTINGS})
    place = device_of(device)
    names = shapes or (["jax-compat", "v2-focused"] if place == "cuda" else ["factored"])
    asked = [load_shape(name, overrides) for name in names]
    console = Console(stderr=True, quiet=quiet, highlight=False)

    def save(document: dict[str, Any]) -> None:
        if out is not None:
            write(out, "bench", document, markdown(document))

    options = Options(place, steps, which, routings)
    document = bench(asked, options, lambda line: console.print(line, markup=False), save)
    if as_json:
        _print_json(document)
    elif not quiet:
        typer.echo(markdown(document))


@app.command("config-schema")
def config_schema_command() -> None:
    """The JSON schema of a config: every field with its meaning and bounds."""
    _print_json(Config.model_json_schema())


def experiment(command: str) -> None:
    """Entry point of experiments/*.py: `--config FILE` instead of a positional argument, the rest as for `hsae`."""
    sys.argv[1:] = [command, *(part.removeprefix("--config=") for part in sys.argv[1:] if part != "--config")]
    main()


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 bad input (one line), 130 interrupted (training writes a checkpoint first)."""
    # Threads that spin while they wait slow a busy machine down sixfold; this is read when PyTorch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(prog_name="hsae", standalone_mode=False)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except InterruptedError as error:
        _exit(f"interrupted: {error}", 130)
    except ArithmeticError as error:
        _exit(f"error: {error}", 1)
    except typer.TyperException as error:  # an unknown option, a missing argument
        _exit(f"error: {' '.join(error.format_message().split())}", 2)
    except (ValueError, OSError) as error:
        _exit(f"error: {' '.join(str(error).split())}", 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == 130:  # what Typer makes of a KeyboardInterrupt, without a word to the user
        _exit("interrupted", 130)
    if code:
        sys.exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    """SIGTERM stops a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
