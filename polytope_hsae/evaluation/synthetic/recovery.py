"""Which features a model's latents stand for, and how well they tell when those are on (docs/method.md section 7).

Codes and features are sparse, and so is the counting: every pair that is on together in a row adds one to a table.
Nothing of size rows x features x latents, or rows x latents, is made.

Shapes: B rows, K slots of a row's codes, L latents (an H-SAE's parents, then its children), N features, E features on,
d width.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.codes import Codes

from .rows import Rows, draw
from .world import World

BATCH = 8192
RECOVERED = 0.7  # cosine from which a latent stands for the feature that it is matched with


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


class Match(NamedTuple):
    """The one-to-one assignment of latents to features with the largest summed |cosine| (Hungarian).

    latent_M, feature_M: the matched pairs, M = min(L, N), by latent; cosine_M: their cosines, with sign.
    feature_L: for each latent the feature that it stands for: matched with a cosine of RECOVERED or more; else -1.
    latent_N: the inverse. nearest_L: for each latent the feature of the largest |cosine|, which others may share.
    """

    latent_M: Tensor
    feature_M: Tensor
    cosine_M: Tensor
    feature_L: Tensor
    latent_N: Tensor
    nearest_L: Tensor


def match(decoder_Ld: Tensor, world: World) -> Match:
    """Match unit decoder rows with the world's directions; the result lies on the CPU."""
    cosine_LN = (decoder_Ld @ world.direction_Nd.T).cpu()
    size_LN = cosine_LN.abs()
    latent_M, feature_M = map(torch.from_numpy, linear_sum_assignment(size_LN.numpy(), maximize=True))
    cosine_M = cosine_LN[latent_M, feature_M]
    good_M = cosine_M >= RECOVERED
    feature_L = torch.full((len(cosine_LN),), -1)
    feature_L[latent_M[good_M]] = feature_M[good_M]
    latent_N = torch.full((cosine_LN.shape[1],), -1)
    latent_N[feature_M[good_M]] = latent_M[good_M]
    return Match(latent_M, feature_M, cosine_M, feature_L, latent_N, size_LN.argmax(1))


def detection(counts: Counts, found: Match) -> dict[str, float]:
    """Precision, recall and F1 of latents as detectors, means over all latents (a dead one has 0).

    `precision`, `recall`, `f1`: of the feature with the largest |cosine|, as SynthSAEBench has it. `f1_assigned`: under
    the one-to-one assignment with the largest summed F1, over as many pairs as there are of the fewer.
    """
    L = len(found.nearest_L)
    both_L = counts.both_LN.cpu()[torch.arange(L), found.nearest_L].double()
    latent_L, feature_L = counts.latent_L.cpu().double(), counts.feature_N.cpu()[found.nearest_L].double()
    either_LN = counts.latent_L[:, None].float() + counts.feature_N.float()
    table_LN = (2 * counts.both_LN.float() / either_LN.clamp_min(1)).cpu()
    assigned = linear_sum_assignment(table_LN.numpy(), maximize=True)
    return {
        "precision": float((both_L / latent_L.clamp_min(1)).mean()),
        "recall": float((both_L / feature_L.clamp_min(1)).mean()),
        "f1": float((2 * both_L / (latent_L + feature_L).clamp_min(1)).mean()),
        "f1_assigned": float(table_LN[assigned].mean()),
    }


def recovery(counts: Counts, found: Match, world: World) -> dict[str, float | None]:
    """How much of the world there is in the model.

    `mcc`: mean |cosine| of the matched pairs. `unique`: different nearest features, over latents. `recovered`: share of
    the L most frequent features that a latent stands for; `recovered_level_l` and `recovered_free` the same by level of
    the trees and outside them (None where the L have none of that level). `leaf_given_parent`: of the features on the
    last level whose parent is recovered, the share that is recovered. `dead`: share of latents that are never on.
    """
    L = len(found.feature_L)
    rate_N, level_N, parent_N = world.rate_N.cpu(), world.level_N.cpu(), world.parent_N.cpu()
    have_N = found.latent_N >= 0
    frequent_N = torch.zeros_like(have_N)
    frequent_N[rate_N.topk(min(L, len(rate_N))).indices] = True
    levels = {f"recovered_level_{level}": level_N == level for level in range(int(level_N.max()) + 1)}
    leaf_N = (level_N == world.config.depth) & (parent_N >= 0)
    return {
        "mcc": float(found.cosine_M.abs().mean()),
        "unique": len(found.nearest_L.unique()) / L,
        "recovered": _share(have_N, frequent_N),
        **{name: _share(have_N, frequent_N & of_N) for name, of_N in levels.items()},
        "recovered_free": _share(have_N, frequent_N & (level_N < 0)),
        "leaf_given_parent": _share(have_N, leaf_N & have_N[parent_N]),
        "dead": float((counts.latent_L == 0).double().mean()),
    }


def _share(have_N: Tensor, of_N: Tensor) -> float | None:
    return float(have_N[of_N].double().mean()) if of_N.any() else None
