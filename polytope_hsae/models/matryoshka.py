"""Matryoshka SAEs (Bussmann et al., arXiv 2503.17547): nested dictionaries, each of which rebuilds the row.

Shapes: B rows, d width, P latents, n prefixes, k' slots of a row's codes.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..config import MatryoshkaConfig
from .batchtopk import BatchTopKSAE
from .codes import Codes


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK over all latents; the loss is the mean error of the reconstructions by prefixes of them.

    `bounds` [n]: how many latents each prefix has, the shares of the config rounded, equal ones once.
    """

    config_block = MatryoshkaConfig

    def __init__(self, config: Any, width: int, normalize: str = "rms", seed: int = 0):
        super().__init__(config, width, normalize, seed)
        self.bounds = sorted({max(1, round(share * config.n_latents)) for share in config.fractions})

    def decode_prefixes(self, codes: Codes) -> Tensor:
        """Reconstructions [n, B, d] by every prefix, for the price of one: each code is decoded once.

        A row's codes are sorted by latent, so that those of each group between two bounds are one run of them, and
        summed run by run; prefixes are running sums of the groups.
        """
        index_Bk, order_Bk = codes.parent_index.sort(dim=1)
        value_Bk = codes.parent_value.gather(1, order_Bk)
        B, k = index_Bk.shape
        starts_n = torch.tensor([0, *self.bounds[:-1]], device=index_Bk.device)
        run_Bn = torch.searchsorted(index_Bk, starts_n.expand(B, -1).contiguous())
        run_Bn = run_Bn + k * torch.arange(B, device=index_Bk.device).unsqueeze(1)
        groups = embedding_bag(
            index_Bk.flatten(), self.D, run_Bn.flatten(), mode="sum", per_sample_weights=value_Bk.flatten()
        )
        return self._added_up(groups.view(B, len(self.bounds), self.width).unbind(1))

    def decode_whole(self, value_BP: Tensor) -> Tensor:
        """The same from the codes of all latents."""
        starts = [0, *self.bounds[:-1]]
        return self._added_up([value_BP[:, a:b] @ self.D[a:b] for a, b in zip(starts, self.bounds, strict=True)])

    def _added_up(self, groups: Iterable[Tensor]) -> Tensor:
        """Running sums of the groups' shares [B, d], each with the bias."""
        return torch.stack([x_hat_Bd + self.b_dec for x_hat_Bd in accumulate(groups)])
