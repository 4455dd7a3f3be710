"""Where metrics go: metrics.jsonl always, Weights & Biases and TensorBoard when the config asks for them."""

import json
from pathlib import Path
from typing import Any, Protocol

from .config import Config, ConfigError
from .fileio import write_text


class Tracker(Protocol):
    """Receives named numbers of one arm at one step."""

    def log(self, values: dict[str, float], step: int, tokens: int) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """Appends {phase, arm, seed, step, tokens, name, value} lines to one file.

    Opening it at a step drops the arm's later lines (and a line that a killed process left unfinished), so that an
    interrupted and resumed run leaves the same lines as an uninterrupted one.
    """

    def __init__(self, path: Path, phase: int, arm: str, seed: int, resume_step: int = 0):
        self.key = {"phase": phase, "arm": arm, "seed": seed}
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if self._keeps(line, resume_step)]
            write_text(path, "".join(kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = path.open("a", encoding="utf-8")

    def _keeps(self, line: str, resume_step: int) -> bool:
        if not line.endswith("}\n"):
            return False
        record = json.loads(line)
        return record["step"] <= resume_step or any(record[name] != value for name, value in self.key.items())

    def log(self, values: dict[str, float], step: int, tokens: int) -> None:
        for name, value in values.items():
            record = {**self.key, "step": step, "tokens": tokens, "name": name, "value": value}
            self.stream.write(json.dumps(record, allow_nan=False) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class WandbTracker:
    """Weights & Biases; `mode` online or offline (offline needs no account)."""

    def __init__(self, config: Config, folder: Path, phase: int, arm: str):
        try:
            import wandb
        except ModuleNotFoundError as error:
            line = "tracking.wandb: the package wandb is missing; pip install polytope-hsae[wandb]"
            raise ConfigError(line) from error
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
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError(
                "tracking.tensorboard: the package tensorboard is missing; pip install polytope-hsae[tensorboard]"
            ) from error
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


def open_trackers(config: Config, run: Path, phase: int, arm: str, resume_step: int) -> Trackers:
    """The trackers that the config asks for, opened for one arm at the step it (re)starts from."""
    trackers: list[Tracker] = [JsonlTracker(run / "metrics.jsonl", phase, arm, config.run.seed, resume_step)]
    if config.tracking.wandb != "off":
        trackers.append(WandbTracker(config, run / "wandb", phase, arm))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(run / "tensorboard" / f"phase{phase}-{arm}"))
    return Trackers(trackers)
