"""Rows of a world: drawn when they are asked for, never stored, the same for the same seed on the same kind of device.

Features without a parent are drawn for all rows at once; children only where their parent is on. So the cost of a row
is that of its free features and of the few that are on.

Shapes: B rows, N features, d width, E features on in all rows together, b children of a node.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .world import World

PARTS = {"train": 0, "val": 1, "test": 2}
BATCHES_AT_ONCE = 8  # batches that the training stream draws together: the drawing waits for the device


class Rows(NamedTuple):
    """Drawn rows: x [B, d], and their features as a list sorted by row: row_E, feature_E (int64), value_E > 0."""

    x: Tensor
    row: Tensor
    feature: Tensor
    value: Tensor


def draw(world: World, n_rows: int, part: str, number: int) -> Rows:
    """The draw of that number of a part (train, val, test): `n_rows` rows on the world's device."""
    mixed = (world.config.seed * 1_000_003 + PARTS[part]) * 1_000_003 + number
    generator = torch.Generator(world.device).manual_seed(mixed % (1 << 63))
    row_E, feature_E, value_E = _features(world, n_rows, generator)
    starts_B = torch.searchsorted(row_E, torch.arange(n_rows, device=world.device))
    x_Bd = torch.nn.functional.embedding_bag(
        feature_E, world.direction_Nd, starts_B, mode="sum", per_sample_weights=value_E
    )
    x_Bd = x_Bd + world.bias_d
    if world.config.noise > 0:
        x_Bd = x_Bd + world.config.noise * torch.randn(x_Bd.shape, generator=generator, device=world.device)
    return Rows(x_Bd, row_E, feature_E, value_E)


def _features(world: World, n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, features and values of all that is on, sorted by row."""
    row_n, place_n = _free(world, n_rows, generator).nonzero(as_tuple=True)
    feature_n = world.free_n[place_n]
    value_n = _magnitudes(world, feature_n, generator)
    found = [(row_n, feature_n, value_n)]
    for _ in range(world.config.depth):
        row_n, feature_n, value_n = _children(world, row_n, feature_n, value_n, generator)
        found.append((row_n, feature_n, value_n))
    row_E, feature_E, value_E = (torch.cat(parts) for parts in zip(*found, strict=True))
    order_E = row_E.argsort(stable=True)
    return row_E[order_E], feature_E[order_E], value_E[order_E]


def _free(world: World, n_rows: int, generator: torch.Generator) -> Tensor:
    """Which features without a parent are on, [B, n] bool: a normal number of its own and shared factors are enough."""
    own_Bn = torch.randn(n_rows, len(world.free_n), generator=generator, device=world.device)
    if world.config.correlation_rank == 0:
        return own_Bn > world.threshold_n
    factors_Br = torch.randn(n_rows, world.loading_nr.shape[1], generator=generator, device=world.device)
    own_Bn *= (1 - world.loading_nr.square().sum(1)).sqrt()
    return torch.addmm(own_Bn, factors_Br, world.loading_nr.T) > world.threshold_n


def _children(
    world: World, row_n: Tensor, feature_n: Tensor, value_n: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The children that are on under the given features: rows, features, values."""
    first_n = world.child_first_N[feature_n]
    rate_nb = world.child_rate_Nb[feature_n]
    if world.config.exclusive:  # one number decides which child is on, if any
        upper_nb = rate_nb.cumsum(1)
        u_n1 = torch.rand(len(row_n), 1, generator=generator, device=world.device)
        on_nb = (u_n1 < upper_nb) & (u_n1 >= upper_nb - rate_nb)
    else:
        on_nb = torch.rand(rate_nb.shape, generator=generator, device=world.device) < rate_nb
    above_m, place_m = on_nb.nonzero(as_tuple=True)
    feature_m = first_n[above_m] + place_m
    value_m = _magnitudes(world, feature_m, generator)
    if world.config.scale_by_parent:
        value_m = value_m * (value_n / world.mean_N[feature_n])[above_m]
    return row_n[above_m], feature_m, value_m


def _magnitudes(world: World, feature_n: Tensor, generator: torch.Generator) -> Tensor:
    """|mean + spread * normal| of each."""
    own_n = torch.randn(len(feature_n), generator=generator, device=world.device)
    return (world.mean_N[feature_n] + world.spread_N[feature_n] * own_n).abs()


class SyntheticStream:
    """Training batches of a world, as a RowStream gives them: `next`, and a place that can be saved.

    The rows depend on the world and the batch size alone, so all models that train on one stream see the same.
    """

    def __init__(self, world: World, batch_size: int) -> None:
        self.world, self.batch_size = world, batch_size
        self.rows_consumed = 0
        self._number = -1
        self._drawn = torch.empty(0)

    def next(self) -> Tensor:
        """The next batch, float32 [B, d] on the world's device."""
        number, place = divmod(self.rows_consumed // self.batch_size, BATCHES_AT_ONCE)
        if number != self._number:
            self._number = number
            self._drawn = draw(self.world, BATCHES_AT_ONCE * self.batch_size, "train", number).x
        self.rows_consumed += self.batch_size
        return self._drawn[place * self.batch_size : (place + 1) * self.batch_size]

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
        return {"batch_size": self.batch_size, "world": self.world.config.model_dump(mode="json")}
