"""The short way: a tensor of activations, or any stream of them, to a trained model.

Shapes: N rows, B rows of a batch, d width.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from ..config import FlatConfig, HSAEConfig, StageConfig, TrainingConfig, first_line
from ..data.stream import RowStream, Stream
from ..models.base import SparseAutoencoder, require_finite
from ..progress import Ticker
from ..tracking import Trackers
from .trainer import HSAETrainer

HELD_ROWS = 32_768  # rows at most that are held out: thresholds are set on them, and the last line rests on them
SAMPLE_ROWS = 65_536  # rows at most that mean, scale and the start of b_dec are taken from
FEW_FIRINGS, MANY_EPOCHS = 100, 100  # fewer firings hardly train a latent; more epochs overfit the rows


class TensorRows:
    """Rows [N, d] as a store of one shard, so that `RowStream` reads them in a repeatable, shuffled order."""

    def __init__(self, rows_Nd: Tensor):
        self.rows_Nd, self.device = rows_Nd, rows_Nd.device

    def n_rows(self, split: str) -> int:
        """N."""
        return len(self.rows_Nd)

    def shard_bounds(self, split: str) -> list[int]:
        """Where the one shard begins and ends."""
        return [0, len(self.rows_Nd)]

    def acts(self, split: str, rows_B: Tensor) -> Tensor:
        """The rows with these numbers, float32 [B, d]."""
        return self.rows_Nd[rows_B].float()


def train(
    acts: Tensor | Stream,
    config: HSAEConfig | FlatConfig,
    *,
    steps: int,
    batch_size: int = 4096,
    lr: float | None = None,
    normalize: str = "rms",
    seed: int = 0,
    device: str | None = None,
    folder: Path | str | None = None,
    quiet: bool = False,
    **training: Any,
) -> SparseAutoencoder:
    """Train a model on activations: normalisation, start of b_dec, training and thresholds.

    Args:
        acts: [N, d] of any float type, or a stream whose `next()` gives batches [B, d] (docs/design.md); of a tensor a
            twentieth of the rows is held out.
        config: HSAEConfig, TopKConfig, BatchTopKConfig, JumpReLUConfig or MatryoshkaConfig.
        steps: optimiser steps.
        batch_size: rows per step; a stream has its own.
        lr: peak learning rate; None = 1.6 / d, a guess from the learning rates of two runs of `recommended`: 6e-3 at
            width 256 and 3e-3 at 576 (docs/LOG.md). The quickstart, smaller and shorter, has 8e-3 at 256.
        normalize: rms, unit_row or none.
        device: None = a GPU where there is one, else the CPU.
        folder: for checkpoints, from which the same call goes on; None = none.
        quiet: print nothing; else progress on standard error, and at the end EV and L0 on the held-out rows.
        training: further fields of `training` in a config, e.g. warmup_steps=100.

    Returns the model in eval mode. Raises ValueError with one line for bad rows, learning rates or sizes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True, quiet=quiet)
    stream: Any = acts
    if isinstance(acts, Tensor):
        stream, held_nd = _split(acts, batch_size, seed)
        sample_nd = stream.store.acts("train", torch.arange(min(stream.n_rows, SAMPLE_ROWS)))
    else:
        sample_nd = _take(stream, SAMPLE_ROWS // 4)
        held_nd = _take(stream, SAMPLE_ROWS // 4)
        batch_size = len(stream.next())
    width = sample_nd.shape[1]
    lr = 1.6 / width if lr is None else lr
    options = _options(batch_size, lr, steps, training)
    _look_at(options, config, width, steps, len(acts) if isinstance(acts, Tensor) else None)

    kinds: dict[type, Any] = {kind.config_block: kind for kind in SparseAutoencoder.registry.values()}
    model: SparseAutoencoder = kinds[type(config)](config, width, normalize, seed=seed)
    mean_d = sample_nd.double().mean(0)
    spread = (sample_nd.double() - mean_d).square().sum(1).mean()
    model.set_normalization(mean_d.float(), math.sqrt(spread / width))
    model.to(device)
    model.initialize_bias(list(sample_nd.split(8192)))
    trainer = HSAETrainer(
        model, stream, options.baseline.stages, options, folder=None if folder is None else Path(folder), seed=seed
    )
    trainer.resume()
    ticker = Ticker(console, "train", "steps")
    with ticker.bar:
        trainer.fit(Trackers([]), ticker)
    model.calibrate(list(held_nd.split(8192)), config.total_l0)
    model.eval()
    if not quiet:
        ev, l0 = _fit(model, held_nd, mean_d)
        console.print(f"EV {ev:.3f}, L0 {l0:.1f} on {len(held_nd):,} held-out rows", highlight=False)
    return model


def _split(acts: Tensor, batch_size: int, seed: int) -> tuple[RowStream, Tensor]:
    """A stream over the rows but for a twentieth, and that twentieth. Raises ValueError for rows that are none."""
    if acts.ndim != 2 or not acts.is_floating_point():
        raise ValueError(f"acts: found {acts.dtype} of shape {tuple(acts.shape)}, allowed: floats [N, d]")
    require_finite("train", "acts", acts)
    order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(seed)).to(acts.device)
    held = min(HELD_ROWS, len(acts) // 20)
    if not 1 <= batch_size <= len(acts) - held or held == 0:
        raise ValueError(f"batch_size: found {batch_size} for {len(acts)} rows, allowed: 1 to {len(acts) - held}")
    store: Any = TensorRows(acts[order[held:]])
    return RowStream(store, "train", batch_size, seed), acts[order[:held]].float()


def _take(stream: Stream, rows: int) -> Tensor:
    """So many rows of a stream, or a few more."""
    batches = [stream.next()]
    while sum(map(len, batches)) < rows:
        batches.append(stream.next())
    return torch.cat(batches).float()


def _options(batch_size: int, lr: float, steps: int, fields: dict[str, Any]) -> TrainingConfig:
    """The options of a training of one stage that logs, validates and saves only where it is asked to."""
    quiet = {"log_every": steps, "val_every": steps, "warmup_steps": min(100, steps // 10)}
    try:
        baseline = {"stages": [StageConfig(name="train", steps=steps)]}
        return TrainingConfig(**{"batch_size": batch_size, "lr": lr, **quiet, **fields, "baseline": baseline})
    except ValidationError as error:
        raise ValueError(first_line(error, TrainingConfig)) from error


def _look_at(
    options: TrainingConfig, config: HSAEConfig | FlatConfig, width: int, steps: int, rows: int | None
) -> None:
    """Refuse a learning rate that is too large; warn of a training that is too short, or too long for its rows."""
    if options.lr >= width**-0.5:
        found = f"found {options.lr:g}, allowed: below 1/sqrt(d) = {width**-0.5:.3g}"
        raise ValueError(f"lr: {found}; a step would change a unit row's entries by as much as they are")
    if isinstance(config, HSAEConfig):
        latents = config.n_parents * (1 + config.n_children_per_parent)
    else:
        latents = config.n_latents
    firings = steps * options.batch_size * options.accumulate * config.total_l0 / latents
    if firings < FEW_FIRINGS:
        warnings.warn(f"steps: a latent will be on in {firings:.0f} rows on average; train longer", stacklevel=3)
    if rows is not None and steps * options.batch_size > MANY_EPOCHS * rows:
        epochs = steps * options.batch_size / rows
        warnings.warn(f"steps: every row will be read {epochs:.0f} times; more rows would help", stacklevel=3)


def _fit(model: SparseAutoencoder, rows_nd: Tensor, mean_d: Tensor) -> tuple[float, float]:
    """EV about the mean, and L0."""
    error, l0 = 0.0, 0.0
    for part in rows_nd.to(model.data_mean).split(8192):
        codes = model.encode(part)
        error += float((part - model.decode(codes)).square().sum().detach())
        l0 += float(codes.l0().sum())
    total = float((rows_nd.double().cpu() - mean_d.cpu()).square().sum())
    return 1 - error / total, l0 / len(rows_nd)
