"""Who is on with whom: latents with features, and latents with latents, on rows whose features are known.

Codes and features are sparse, and so is the counting: every pair that is on together in a row adds one to a table.
Nothing of size rows x features x latents, or rows x latents, is made.

Shapes: B rows, K slots of a row's codes, L latents (an H-SAE's parents, then its children), N features, E features on.
"""

import torch
from torch import Tensor

from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes

from .rows import Rows, draw
from .world import World

BATCH = 8192


class Counts:
    """Rows; latents on [L]; features on [N]; both [L, N]; pairs of latents [L, L]. And the errors behind EV."""

    def __init__(self, n_latents: int, n_features: int, device: torch.device) -> None:
        self.rows = 0
        self.parent_codes = self.child_codes = 0
        self.latent_L = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.feature_N = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.both_LN = torch.zeros(n_latents, n_features, dtype=torch.int32, device=device)
        self.pair_LL = torch.zeros(n_latents, n_latents, dtype=torch.int32, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, latent_BK: Tensor, on_BK: Tensor, rows: Rows) -> None:
        """Count one batch: `latent_BK` are the latents in each row's slots, those with `on_BK` are on, each once."""
        self.rows += len(latent_BK)
        N, L = len(self.feature_N), len(self.latent_L)
        self.latent_L += torch.bincount(latent_BK[on_BK], minlength=L)
        self.feature_N += torch.bincount(rows.feature, minlength=N)
        with_EK = on_BK[rows.row]
        _add_ones(self.both_LN, (latent_BK[rows.row] * N + rows.feature[:, None])[with_EK])
        both_BKK = on_BK[:, :, None] & on_BK[:, None, :]
        _add_ones(self.pair_LL, (latent_BK[:, :, None] * L + latent_BK[:, None, :])[both_BKK])

    @property
    def ev(self) -> float:
        """1 - summed squared error / summed squared distance from the train mean."""
        return 1 - float(self.error) / float(self.total)


def _add_ones(table: Tensor, place_n: Tensor) -> None:
    table.view(-1).scatter_add_(0, place_n, torch.ones_like(place_n, dtype=table.dtype))


def slots(codes: Codes, n_parents: int) -> tuple[Tensor, Tensor]:
    """Latents in each row's slots and which are on, [B, K] both: parents first, a child is latent P + p C + j.

    K is the largest number of codes that a row has.
    """
    latent_BK = torch.cat([codes.parent_index, n_parents + codes.child_index], 1)
    on_BK = torch.cat([codes.parent_value > 0, codes.child_value > 0], 1)
    order_BK = on_BK.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(on_BK.sum(1).max())]
    return latent_BK.gather(1, order_BK), on_BK.gather(1, order_BK)


@torch.no_grad()
def count(sae: SparseAutoencoder, world: World, n_rows: int, mean_d: Tensor) -> Counts:
    """Counts over `n_rows` test rows of the world, whole batches of them. The model is in eval mode.

    mean_d: the train rows' mean, which EV is measured against.
    """
    assert not sae.training
    found = Counts(sae.n_parents * (1 + sae.n_children), world.config.n_features, world.device)
    for number in range(-(-n_rows // BATCH)):
        rows = draw(world, BATCH, "test", number)
        codes = sae.encode(rows.x)
        found.add(*slots(codes, sae.n_parents), rows)
        found.parent_codes += int((codes.parent_value > 0).sum())
        found.child_codes += int((codes.child_value > 0).sum())
        found.error += (rows.x - sae.decode(codes)).double().square().sum()
        found.total += (rows.x - mean_d).double().square().sum()
    return found


def decoders(sae: SparseAutoencoder) -> Tensor:
    """Every latent's write direction [L, d], unit rows: parents, then children in the order of the flat index."""
    parts = [sae.write_directions()]
    if sae.n_children:
        parts.append(sae.atoms(slice(None)).detach().flatten(0, 1))  # type: ignore[operator]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)
