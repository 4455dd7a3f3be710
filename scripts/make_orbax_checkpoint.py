"""Write a small H-SAE as the published weights are stored: an orbax checkpoint of the parameter tree.

    PYTHONPATH=benchmarks python scripts/make_orbax_checkpoint.py FOLDER [--layout single|manager|zarr]

Needs jax, equinox, optax and orbax-checkpoint. The layouts differ on disk and restore to the same nested dict:

- `single`: `StandardCheckpointer.save`, one OCDBT store in FOLDER (orbax's default);
- `manager`: `CheckpointManager.save`, the same store in FOLDER/{step}/default;
- `zarr`: `PyTreeCheckpointHandler(use_ocdbt=False)`, one zarr folder per leaf, as older releases wrote.
"""

import argparse
from pathlib import Path

import orbax.checkpoint as ocp
from jax_hsae import HSAE, Config, init

STEP = 60_799


def save(model: HSAE, folder: Path, layout: str) -> None:
    """Write the model's tree to a folder that does not exist yet."""
    folder = folder.absolute()  # orbax refuses relative paths
    if layout == "single":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, model)
    elif layout == "manager":
        with ocp.CheckpointManager(folder) as manager:
            manager.save(STEP, args=ocp.args.StandardSave(model))
    else:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(folder, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("single", "manager", "zarr"), default="single")
    arguments = parser.parse_args()
    save(init(Config(), "float32"), arguments.folder, arguments.layout)


if __name__ == "__main__":
    main()
