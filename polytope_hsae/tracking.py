"""Where metrics go: metrics.jsonl always, Weights & Biases and TensorBoard when the config asks for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import TypedDict

from .config import ArmConfig, Config, ConfigError
from .fileio import naming, write_text
from .parsing import checked, parse_json


class Tracker(Protocol):
    """Receives named numbers of one arm at one step."""

    def log(self, values: dict[str, float], step: int, tokens: int) -> None: ...

    def close(self) -> None: ...


class _Line(TypedDict):
    """What decides whether a line of metrics.jsonl is kept; a line has tokens, name and value too."""

    phase: int
    arm: str
    seed: int
    step: int


class JsonlTracker:
    """Appends {phase, arm, seed, step, tokens, name, value} lines to one file.

    Opening it at a step drops the arm's later lines and an unfinished last line, so that a resumed run leaves the same
    lines as an uninterrupted one. Raises ValueError for any other line that is not such an object.
    """

    def __init__(self, path: Path, phase: int, arm: str, seed: int, resume_step: int = 0):
        self.path = path
        self.key = {"phase": phase, "arm": arm, "seed": seed}
        if path.exists():
            write_text(path, "".join(f"{line}\n" for line in self._kept(resume_step)))
        path.parent.mkdir(parents=True, exist_ok=True)

    def _kept(self, resume_step: int) -> Iterator[str]:
        *lines, _unfinished = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record: dict[str, Any] = parse_json(line.decode("utf-8"))
                checked(record, _Line, "not a metric")
            except ValueError as error:
                raise ValueError(f"{self.path}: line {number}: {error}") from error
            if record["step"] <= resume_step or any(record[name] != value for name, value in self.key.items()):
                yield line.decode("utf-8")

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        records = [{**self.key, "step": step, "tokens": tokens, "name": name, "value": values[name]} for name in values]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with naming(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def close(self) -> None:
        """Nothing is open between two calls of `log`."""


@contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        line = f"tracking.{package}: the package {package} is missing; pip install polytope-hsae[{package}]"
        raise ConfigError(line) from error


class WandbTracker:
    """Weights & Biases; `mode` online or offline (offline needs no account)."""

    def __init__(self, config: Config, folder: Path, phase: int, arm: str):
        with _needs("wandb"):
            import wandb
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project=config.tracking.wandb_project,
            name=f"{config.run.name}-phase{phase}-{arm}",
            group=config.run.name,
            dir=str(folder),
            mode=config.tracking.wandb,
            config=config.model_dump(mode="json"),
        )

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        self.run.log({**values, "tokens": tokens}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    """TensorBoard event files."""

    def __init__(self, folder: Path):
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(folder))

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]):
        self.trackers = trackers

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step, tokens)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def open_trackers(config: Config, run: Path, arm: ArmConfig, resume_step: int) -> Trackers:
    """The trackers that the config asks for, opened for one arm at the step it (re)starts from."""
    phase, name, seed = arm.phase, arm.name, config.arm_seed(arm)
    trackers: list[Tracker] = [JsonlTracker(run / "metrics.jsonl", phase, name, seed, resume_step)]
    if config.tracking.wandb != "off":
        trackers.append(WandbTracker(config, run / "wandb", phase, name))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(run / "tensorboard" / f"phase{phase}-{name}"))
    return Trackers(trackers)
