"""Training rows: an endless, shuffled, repeatable stream over a split of the activation store.

Every epoch visits every row once. Shards are permuted and grouped into windows, rows are permuted within a
window, so a store larger than memory is read a window at a time. The order depends on the seed, the epoch
and the store alone.
Shapes: B batch, d residual width.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from polytope_hsae.data.store import ActivationStore

WINDOW_ROWS = 524_288


class Stream(Protocol):
    """What a trainer needs of its rows: the next batch, and a place that can be saved and gone back to."""

    def next(self) -> Tensor:
        """The next batch, float32 [B, d]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


class RowStream:
    """`next()` gives the next batch of activations; `state_dict` says how many rows were given, for an exact resume."""

    def __init__(
        self, store: ActivationStore, split: str, batch_size: int, seed: int, *, window_rows: int = WINDOW_ROWS
    ) -> None:
        """Raises ValueError unless `batch_size` is between 1 and the split's rows and the window at least 1 row."""
        self.store, self.split, self.batch_size, self.seed = store, split, batch_size, seed
        self.n_rows = store.n_rows(split)
        if not 1 <= batch_size <= self.n_rows:
            allowed = f"1 to {self.n_rows} (the rows of {split})"
            raise ValueError(f"training.batch_size: found {batch_size}, allowed: {allowed}")
        if window_rows < 1:
            raise ValueError(f"window_rows: found {window_rows}, allowed: 1 or more")
        self.window_rows = window_rows
        self.rows_consumed = 0
        self._epoch = -1
        self._windows: list[tuple[int, list[int]]] = []  # the epoch's plan: first place, shards
        self._window_key = (-1, -1)
        self._window_order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """The next batch, float32 [B,d]; it may reach over the end of an epoch."""
        return self.store.acts(self.split, self.next_rows())

    def next_rows(self) -> Tensor:
        """Row numbers of the next batch, int64 [B] on the store's device; counts them as consumed."""
        parts: list[Tensor] = []
        missing = self.batch_size
        while missing:
            epoch, place = divmod(self.rows_consumed, self.n_rows)
            window_start, order = self._window(epoch, place)
            part = order[place - window_start : place - window_start + missing]
            parts.append(part)
            missing -= part.numel()
            self.rows_consumed += part.numel()
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on at the same row."""
        return {"rows_consumed": self.rows_consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to another stream."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(f"stream.{key}: the checkpoint has {state.get(key)!r}, this stream has {value!r}")
        self.rows_consumed = int(state["rows_consumed"])

    def _identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("split", "n_rows", "batch_size", "seed", "window_rows")}

    def _window(self, epoch: int, place: int) -> tuple[int, Tensor]:
        """The window that holds the epoch's row number `place`: (its first place in the epoch, its permuted rows)."""
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._plan(epoch)
        index = max(i for i, (start, _) in enumerate(self._windows) if start <= place)
        start, shards = self._windows[index]
        if self._window_key != (epoch, index):
            bounds = self.store.shard_bounds(self.split)
            rows = torch.cat([torch.arange(bounds[shard], bounds[shard + 1]) for shard in shards])
            generator = self._generator(epoch, 1 + index)
            order = rows[torch.randperm(rows.numel(), generator=generator)]
            if self.store.device.type == "cuda":
                order = order.pin_memory()  # else its copy would wait for all that the GPU has still to do
            self._window_order = order.to(self.store.device, non_blocking=True)
            self._window_key = (epoch, index)
        return start, self._window_order

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Windows of an epoch: (first place, shards). A window closes before it would exceed `window_rows`."""
        bounds = self.store.shard_bounds(self.split)
        windows: list[tuple[int, list[int]]] = []
        filled = place = 0
        for shard in torch.randperm(len(bounds) - 1, generator=self._generator(epoch, 0)).tolist():
            rows = bounds[shard + 1] - bounds[shard]
            if not windows or filled + rows > self.window_rows:
                windows.append((place, []))
                filled = 0
            windows[-1][1].append(shard)
            filled += rows
            place += rows
        return windows

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        """A generator for one permutation; the constants keep (seed, epoch, part) apart."""
        mixed = (self.seed * 1_000_003 + epoch) * 1_000_003 + part
        return torch.Generator().manual_seed(mixed % (1 << 63))
