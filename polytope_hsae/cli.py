"""The command line: `hsae run quickstart` and its parts. It parses, calls a phase and prints.

Imports inside the commands keep `hsae -h` and config errors fast: PyTorch takes seconds to load.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from .config import Config, load_config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hierarchical sparse autoencoders with teachers from the geometry of language models.",
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[
    str, typer.Argument(help="A packaged config (quickstart, smoke, v2-focused) or a YAML file.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a field: key.path=value; repeatable.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make what a changed config or input affects again.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Same as --set run.device=...")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same as --set run.seed=...")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def _config(name: str, overrides: list[str] | None, device: str | None, seed: int | None) -> Config:
    shortcuts = [f"run.device={device}"] if device is not None else []
    shortcuts += [f"run.seed={seed}"] if seed is not None else []
    return load_config(name, [*(overrides or []), *shortcuts])


@app.command("run")
def run_command(
    config: ConfigArgument,
    overrides: SetOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    seed: SeedOption = None,
    quiet: QuietOption = False,
) -> None:
    """All four phases; resumes what was interrupted and skips what is done."""
    from .phases.run import Run
    from .phases.run_all import run_all

    run_all(Run(_config(config, overrides, device, seed), out, force=force, quiet=quiet))


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


_add_phase(1, "Concepts, activations, geometry, teacher, evidence.")
_add_phase(2, "Train the baseline and the flat models.")
_add_phase(3, "Train the teacher's models and their controls.")
_add_phase(4, "Evaluate all models and judge the targets.")


@app.command("concepts")
def concepts_command(
    config: ConfigArgument,
    overrides: SetOption = None,
    out: OutOption = None,
) -> None:
    """The tree of parents and children with their words, for the config's tokenizer or a finished run."""
    from .data.concepts import Concepts, format_tree
    from .fileio import read_json
    from .lm import load_tokenizer
    from .phases.phase1_teacher import make_concepts

    made = out / "phase1" / "concepts.json" if out is not None else None
    if made is not None and made.is_file():
        concepts = Concepts.from_json(read_json(made))
    else:
        loaded = load_config(config, overrides)
        concepts = make_concepts(loaded, load_tokenizer(loaded.model.name, revision=loaded.model.revision))
    Console().print(format_tree(concepts))


@app.command("config-schema")
def config_schema_command() -> None:
    """The JSON schema of a config: every field with its meaning and bounds."""
    typer.echo(json.dumps(Config.model_json_schema(), indent=1))


def experiment(command: str) -> None:
    """Entry point of experiments/*.py: `--config FILE` instead of a positional argument, the rest as for `hsae`."""
    sys.argv[1:] = [command, *(part.removeprefix("--config=") for part in sys.argv[1:] if part != "--config")]
    main()


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 bad input (one line), 130 interrupted after a checkpoint."""
    # Threads that spin while they wait slow a busy machine down sixfold; this is read when PyTorch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except SystemExit as done:
        if done.code == 130:  # what Typer makes of a KeyboardInterrupt, without a word to the user
            _exit("interrupted", 130)
        raise
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except InterruptedError as error:
        _exit(f"interrupted: {error}", 130)
    except ArithmeticError as error:
        _exit(f"error: {error}", 1)
    except (ValueError, OSError) as error:
        _exit(f"error: {' '.join(str(error).split())}", 2)


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
