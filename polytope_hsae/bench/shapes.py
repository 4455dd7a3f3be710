"""What is measured: the H-SAE and the training of a config, with the width that its language model has."""

from typing import Any, NamedTuple

from ..config import ConfigError, HSAEConfig, StageConfig, TrainingConfig, load_config

WIDTHS = {"jax-compat": 2304, "v2-focused": 2304, "factored": 256, "smoke": 256}
NEVER = 10**6  # steps of a stage that is not finished
MEASURED = {  # the floor and the start on the device know these values alone
    "children": ("factored",),
    "parent_budget": ("per_row",),
    "child_budget": ("per_parent", "shared"),
    "balance_rate": (0.0,),
}


class Shape(NamedTuple):
    """An H-SAE, its training and the width d of its rows; `normalize` as in `data.normalize`."""

    name: str
    hsae: HSAEConfig
    training: TrainingConfig
    width: int
    normalize: str

    @property
    def stage(self) -> StageConfig:
        """The last stage of a randomly initialised arm, without an end."""
        return self.training.baseline.stages[-1].model_copy(update={"steps": NEVER})

    @property
    def losses(self) -> HSAEConfig:
        """The H-SAE's config with the weights of that stage's loss."""
        return self.stage.loss.apply(self.hsae)

    def precision(self, device: str) -> str:
        """Of matrix products: float32 on a CPU; on a GPU the config's, bf16 where it names none."""
        return self.training.precision or "bf16" if device == "cuda" else "float32"

    def record(self) -> dict[str, Any]:
        """Name, sizes, losses and training, for a JSON file."""
        return {
            "name": self.name,
            "width": self.width,
            "normalize": self.normalize,
            "hsae": self.losses.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude={"baseline", "teacher"}),
        }

    def with_training(self, **fields: object) -> "Shape":
        """The same with other fields of `training`."""
        return self._replace(training=self.training.model_copy(update=fields))


def load_shape(name: str, overrides: list[str] | None = None) -> Shape:
    """The shape of a packaged config with `key.path=value` overrides.

    Raises ConfigError for an unknown name, an override that does not fit or is not in MEASURED, or subspaces wider
    than the rows.
    """
    if name not in WIDTHS:
        raise ConfigError(f"--shape: found {name!r}, allowed: {', '.join(WIDTHS)}")
    config = load_config(name, overrides)
    # Nothing is logged, validated or saved; what costs time on those steps is not part of a training step.
    quiet = {"log_every": NEVER, "val_every": NEVER, "checkpoint_every": NEVER, "accumulate": 1}
    training = config.training.model_copy(update=quiet)
    if config.hsae.subspace_dim > WIDTHS[name]:
        found, most = config.hsae.subspace_dim, WIDTHS[name]
        raise ConfigError(f"hsae.subspace_dim: found {found}, allowed: at most the width {most}")
    for field, allowed in MEASURED.items():
        if (value := getattr(config.hsae, field)) not in allowed:
            raise ConfigError(f"hsae.{field}: found {value}, allowed in a bench: {' or '.join(map(str, allowed))}")
    return Shape(name, config.hsae, training, WIDTHS[name], config.data.normalize)
