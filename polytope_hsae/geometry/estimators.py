"""Concept vectors from token sets and from activations (docs/method.md §3).

Shape suffixes: V vocabulary, d residual width, n tokens of one set, S sets, Q parents, R children (rows
numbered over all parents), K children of one parent, s subspace width, N activation rows. Vectors are in the
unified coordinate.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self, cast, get_args

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from polytope_hsae.geometry.bases import subspace_bases
from polytope_hsae.geometry.causal import CausalGeometry, Space, row_mean

Estimator = Literal["mean", "lda"]
TokenSets = Sequence[Sequence[int]]
ALL = slice(None)
_BLOCK_TOKENS = 16_384


class ConceptEstimator:
    """Concept vectors from sets of tokens, over g_y = Sigma^(-1/2)(gamma_y - mean gamma).

    Args:
        unembedding: [V, d] rows gamma_y.
        geometry: the metric; g_y is computed only for the tokens asked for.
        method: `mean`: l = mean g. `lda`: S = Ledoit-Wolf covariance of the set, w = S^+ mu / |S^+ mu|,
            l = (w . mu) w.
        named: index of the rows that stand for a token: the others are in no mean.
    """

    def __init__(
        self, unembedding: Tensor, geometry: CausalGeometry, method: str = "mean", named: slice | Tensor = ALL
    ) -> None:
        if method not in get_args(Estimator):
            raise ValueError(f"estimator: found {method!r}, allowed: {', '.join(get_args(Estimator))}")
        if unembedding.ndim != 2 or unembedding.shape[1] != geometry.width:
            raise ValueError(f"unembedding: found {tuple(unembedding.shape)}, allowed: [V, {geometry.width}]")
        self.unembedding_Vd = unembedding.detach()
        self.geometry = geometry
        self.method = cast(Estimator, method)
        # Without centring every vector carries the mean row, and the orthogonality ratio is 1 by artefact.
        self.mean_d = row_mean(self.unembedding_Vd[named])
        self.named = named

    def of(self, unembedding: Tensor, geometry: CausalGeometry) -> "ConceptEstimator":
        """The same estimator for other rows or in another metric."""
        return ConceptEstimator(unembedding, geometry, self.method, self.named)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.unembedding_Vd.shape[0]

    @property
    def ids(self) -> Tensor:
        """The ids that stand for a token, int64, rising."""
        return torch.arange(self.vocab_size)[self.named]

    def rows(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """g [n, d] (float64) of n token ids. Raises ValueError for ids outside the vocabulary."""
        index_n = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        if len(index_n) and not 0 <= int(index_n.min()) <= int(index_n.max()) < self.vocab_size:
            found = f"{int(index_n.min())} to {int(index_n.max())}"
            raise ValueError(f"tokens: found ids {found}, allowed: 0 to {self.vocab_size - 1}")
        rows_nd = self.unembedding_Vd[index_n.to(self.unembedding_Vd.device)].double() - self.mean_d
        return self.geometry.whiten(rows_nd, Space.COVECTOR)

    def scores(self, tokens: Sequence[int] | Tensor, vectors_Sd: Tensor) -> Tensor:
        """g_y . l [n, S] of n token ids with S unified vectors, without the g of the tokens."""
        index_n = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1).to(self.unembedding_Vd.device)
        readers_Sd = self.geometry.unwhiten(vectors_Sd, Space.VECTOR)
        blocks = [self.unembedding_Vd[block].double() @ readers_Sd.T for block in index_n.split(_BLOCK_TOKENS)]
        return torch.cat(blocks) - readers_Sd @ self.mean_d

    def concept_vectors(self, token_sets: TokenSets) -> Tensor:
        """l [S, d] of S token sets, not normalised. Raises ValueError for an empty set (lda: for fewer than
        two tokens)."""
        least = 1 if self.method == "mean" else 2
        for number, tokens in enumerate(token_sets):
            if len(tokens) < least:
                raise ValueError(
                    f"tokens of set {number}: found {len(tokens)}, allowed: at least {least} ({self.method})"
                )
        sizes_S = torch.tensor([len(tokens) for tokens in token_sets], dtype=torch.int64)
        rows_nd = self.rows([token for tokens in token_sets for token in tokens])
        if self.method == "mean":
            return segment_sum(rows_nd, sizes_S) / sizes_S.to(rows_nd).unsqueeze(1)
        blocks = rows_nd.split(sizes_S.tolist()) if len(sizes_S) else ()
        return torch.stack([_lda_vector(block) for block in blocks]) if blocks else rows_nd

    def estimate_parent_vectors(self, parent_tokens: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """l_p [d] of every named parent."""
        return dict(zip(parent_tokens, self.concept_vectors(list(parent_tokens.values())), strict=True))

    def estimate_child_deltas(
        self, parent_vectors: Mapping[str, Tensor], child_tokens: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> dict[str, dict[str, Tensor]]:
        """delta_{c|p} = l_c - l_p [d], by parent name and child name. Raises ValueError for an unknown
        parent."""
        deltas: dict[str, dict[str, Tensor]] = {}
        for parent, children in child_tokens.items():
            if parent not in parent_vectors:
                raise ValueError(f"child_tokens: found parent {parent!r}, allowed: the names in parent_vectors")
            rows = self.concept_vectors(list(children.values())) - parent_vectors[parent]
            deltas[parent] = dict(zip(children, rows, strict=True))
        return deltas

    def estimate_child_subspace_projectors(
        self,
        parent_vectors: Mapping[str, Tensor],
        child_deltas: Mapping[str, Mapping[str, Tensor]],
        subspace_dim: int,
        energy: float = 0.85,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Orthonormal bases B_p [s, d] of the children's differences, by parent name (see
        `subspace_bases`)."""
        names = list(parent_vectors)
        deltas = [delta for name in names for delta in child_deltas.get(name, {}).values()]
        owner = [row for row, name in enumerate(names) for _ in child_deltas.get(name, {})]
        parents_Qd = torch.stack([parent_vectors[name] for name in names])
        deltas_Rd = torch.stack(deltas) if deltas else parents_Qd.new_zeros(0, parents_Qd.shape[1])
        bases_Qsd = subspace_bases(parents_Qd, deltas_Rd, owner, subspace_dim, energy, seed)
        return dict(zip(names, bases_Qsd, strict=True))


def segment_sum(rows_nd: Tensor, sizes_S: Tensor) -> Tensor:
    """Sums [S, d] of consecutive segments of `sizes_S` rows."""
    owner_n = torch.repeat_interleave(torch.arange(len(sizes_S)), sizes_S).to(rows_nd.device)
    return rows_nd.new_zeros(len(sizes_S), rows_nd.shape[1]).index_add_(0, owner_n, rows_nd)


def _lda_vector(rows_nd: Tensor) -> Tensor:
    """l = (w . mu) w with w along S^+ mu, S the Ledoit-Wolf covariance, solved in the n x n space of the
    rows.

    S = (1 - a) X^T X / n + a tr/d I with X the centred rows, so S^-1 mu needs no d x d matrix: by Woodbury,
    or by the singular vectors of X where a = 0.
    """
    n, d = rows_nd.shape
    mean_d = rows_nd.mean(0)
    centred_nd = rows_nd - mean_d
    # Rows sit on the device of the geometry; scikit-learn computes on the CPU.
    amount = float(ledoit_wolf_shrinkage(rows_nd.cpu().numpy()))
    floor = amount * float(centred_nd.square().sum()) / n / d
    if amount == 0.0 or floor == 0.0:
        _, values, axes = torch.linalg.svd(centred_nd, full_matrices=False)
        kept = values.square() > values.max().square() * d * torch.finfo(torch.float64).eps
        direction_d = (axes[kept] @ mean_d / values[kept].square()) @ axes[kept]
    elif amount == 1.0:
        direction_d = mean_d
    else:
        gram_nn = centred_nd @ centred_nd.T
        gram_nn.diagonal().add_(n * floor / (1 - amount))
        direction_d = mean_d - centred_nd.T @ torch.linalg.solve(gram_nn, centred_nd @ mean_d)
    length = direction_d.norm()
    if length == 0:
        raise ValueError("estimator lda: found a token set without spread, allowed: sets of differing rows (or mean)")
    direction_d = direction_d / length
    return (direction_d @ mean_d) * direction_d


class ActivationClassStats:
    """Running sums of activations per child class, for concept vectors at an inner hook (docs/method.md §3).

    Class -1 ("no concept") is counted as one more class. Feed batches with `update`; everything is kept in
    float64, about the first batch's mean, because residual streams have means far larger than their spread.
    """

    def __init__(self, n_classes: int, width: int) -> None:
        self.n_classes = n_classes
        self.width = width
        self._shift_d: Tensor | None = None
        self._counts = torch.zeros(n_classes + 1, dtype=torch.int64)
        self._sums = torch.zeros(n_classes + 1, width, dtype=torch.float64)
        self._scatter_dd = torch.zeros(width, width, dtype=torch.float64)

    def update(self, acts_Nd: Tensor, labels_N: Tensor) -> None:
        """Add rows [N, d] with child rows [N] (-1 = none). Raises ValueError on other shapes or labels."""
        if acts_Nd.ndim != 2 or acts_Nd.shape[1] != self.width or labels_N.shape != acts_Nd.shape[:1]:
            raise ValueError(
                f"activations: found {tuple(acts_Nd.shape)} and labels {tuple(labels_N.shape)}, "
                f"allowed: [N, {self.width}] and [N]"
            )
        if not len(acts_Nd):
            return
        labels_N = labels_N.to(torch.int64).cpu()
        if int(labels_N.min()) < -1 or int(labels_N.max()) >= self.n_classes:
            found = f"{int(labels_N.min())} to {int(labels_N.max())}"
            raise ValueError(f"labels: found {found}, allowed: -1 to {self.n_classes - 1}")
        rows_Nd = acts_Nd.detach().double()  # the products of a batch are made where it lies
        if self._shift_d is None:
            self._shift_d = rows_Nd.mean(0).cpu()
        rows_Nd = rows_Nd - self._shift_d.to(rows_Nd.device)
        class_N = torch.where(labels_N < 0, self.n_classes, labels_N)
        self._counts += torch.bincount(class_N, minlength=self.n_classes + 1)
        sums = torch.zeros_like(self._sums, device=rows_Nd.device)
        self._sums += sums.index_add_(0, class_N.to(rows_Nd.device), rows_Nd).cpu()
        self._scatter_dd += (rows_Nd.T @ rows_Nd).cpu()

    @property
    def counts(self) -> Tensor:
        """Rows seen of each child class, int64 [R]."""
        return self._counts[:-1]

    @property
    def total(self) -> int:
        """Rows seen in all, with and without a concept."""
        return int(self._counts.sum())

    def mean(self) -> Tensor:
        """Mean of all rows [d]. Raises ValueError before the first row."""
        if self._shift_d is None:
            raise ValueError("activation statistics: found no rows, allowed: at least one batch")
        return self._shift_d + self._sums.sum(0) / self.total

    def class_differences(self) -> Tensor:
        """m_c [R, d]: mean of each child class minus the mean of all rows; 0 for a class without rows."""
        return self._differences(self._sums[:-1], self.counts)

    def parent_differences(self, child_parent: Sequence[int], n_parents: int) -> Tensor:
        """m_p [Q, d]: mean over the rows of any of the parent's children minus the mean of all rows; 0
        without rows."""
        owner_R = torch.tensor(list(child_parent), dtype=torch.int64)
        sums_Qd = self._sums.new_zeros(n_parents, self.width).index_add_(0, owner_R, self._sums[:-1])
        counts_Q = torch.zeros(n_parents, dtype=torch.int64).index_add_(0, owner_R, self.counts)
        return self._differences(sums_Qd, counts_Q)

    def balanced_differences(self, class_owner: Sequence[int], n_owners: int) -> Tensor:
        """Mean over an owner's classes that have rows of mean minus mean of all rows: every class counts alike, however
        many rows it has. [n_owners, d]; 0 without rows."""
        owner_n = torch.tensor(list(class_owner), dtype=torch.int64)
        seen_n = (self.counts > 0).double()
        sums = self._sums.new_zeros(n_owners, self.width).index_add_(0, owner_n, self.class_differences())
        seen = seen_n.new_zeros(n_owners).index_add_(0, owner_n, seen_n)
        return sums / seen.clamp_min(1).unsqueeze(1)

    def _differences(self, sums: Tensor, counts: Tensor) -> Tensor:
        means = sums / counts.clamp_min(1).unsqueeze(1) - self._sums.sum(0) / max(self.total, 1)
        return torch.where(counts.unsqueeze(1) > 0, means, torch.zeros_like(means))

    def merged(self, class_owner: Sequence[int], n_classes: int) -> Self:
        """The same rows in fewer classes: class i becomes a part of class `class_owner[i]`."""
        owner_n = torch.tensor([*class_owner, n_classes], dtype=torch.int64)  # the last one: no concept
        out = type(self)(n_classes, self.width)
        out._shift_d = self._shift_d
        out._counts.index_add_(0, owner_n, self._counts)
        out._sums.index_add_(0, owner_n, self._sums)
        out._scatter_dd += self._scatter_dd
        return out

    def within_covariance(self) -> Tensor:
        """Pooled covariance [d, d] about each class's own mean (the rows without a concept are one class),
        divided by N."""
        self.mean()
        scaled = self._sums / self._counts.clamp_min(1).double().sqrt().unsqueeze(1)
        return (self._scatter_dd - scaled.T @ scaled) / self.total

    def geometry(self, shrinkage: float = 0.05, metric: str = "causal", seed: int = 0) -> CausalGeometry:
        """The residual_covariance geometry of the within-class covariance, with relative shrinkage.

        Another `metric` is made of its Sigma as `CausalGeometry` makes it of the unembedding's: identity, diagonal or
        random (seeded).
        """
        causal = CausalGeometry.from_activation_covariance(self.within_covariance(), shrinkage)
        if metric == "causal":
            return causal
        return CausalGeometry.from_covariance(causal.sigma, 0.0, metric, seed=seed)
