"""A world of known features: what fires how often and under what, how strongly, and in which direction it points.

Features are numbered breadth first: the roots of all trees, then their children, grandchildren and so on, and last the
features outside any tree. Rates fall with the number (Zipf), so a parent is always more frequent than its children.
A child can be on only while its parent is.

Shapes: N features, d width, T trees, n nodes of one level, b children of a node.
"""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from polytope_hsae.config.block import Block, Whole, require

MAX_SHARED = 0.99  # of a root's variance that the correlation's factors may explain
ORTHOGONAL_RATE = 0.1  # step of the descent on the squared cosines, relative to what one step can take


class WorldConfig(Block):
    """What the rows are made of (docs/method.md section 7)."""

    n_features: Whole = Field(ge=1, description="N: features.")
    width: Whole = Field(ge=1, description="d: width of the rows.")
    trees: Whole = Field(ge=0, description="T: trees; what is left of the features is in none.")
    branching: Whole = Field(4, ge=1, description="Children of every node above the last level.")
    depth: Whole = Field(3, ge=0, description="Levels below the roots.")
    exclusive: bool = Field(True, description="At most one child of a node is on; else each fires for itself.")
    rate_max: float = Field(0.4, gt=0, lt=1, description="Share of rows with the first feature on.")
    rate_min: float = Field(5e-4, gt=0, lt=1, description="Share of rows with the last feature on, were it in no tree.")
    rate_exponent: float = Field(0.5, gt=0, description="Zipf exponent of the rates between them.")
    magnitude_first: float = Field(5.0, gt=0, description="Mean magnitude of the first feature.")
    magnitude_last: float = Field(4.0, gt=0, description="Mean magnitude of the last feature; linear between them.")
    spread_mean: float = Field(0.5, ge=0, description="A feature's own spread is |N(spread_mean, spread_sd)|.")
    spread_sd: float = Field(0.5, ge=0, description="See spread_mean; both 0: constant magnitudes.")
    scale_by_parent: bool = Field(True, description="A child's magnitude follows its parent's: times value / mean.")
    correlation_rank: Whole = Field(0, ge=0, description="Factors of a Gaussian copula over features without a parent.")
    correlation_scale: float = Field(0.1, ge=0, description="Standard deviation of the copula's loadings.")
    orthogonal_steps: Whole = Field(0, ge=0, description="Steps of descent on the squared cosines of the directions.")
    mean_cosine: float = Field(0.0, ge=0, lt=1, description="Cosine that all directions share, through a common part.")
    bias_norm: float = Field(0.0, ge=0, description="Norm of a constant vector that is added to every row.")
    noise: float = Field(0.0, ge=0, description="Standard deviation of Gaussian noise in every coordinate.")
    seed: Whole = Field(0, ge=0, description="Seed of the world and of its rows.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require("trees", self.trees, sum(self.level_sizes) <= self.n_features, f"room in {self.n_features} features")
        require("rate_min", self.rate_min, self.rate_min <= self.rate_max, f"at most rate_max = {self.rate_max}")
        return self

    @property
    def level_sizes(self) -> list[int]:
        """Nodes of each level of all trees together; [] without trees."""
        return [self.trees * self.branching**level for level in range(self.depth + 1)] if self.trees else []


class World:
    """The features of a config on a device.

    nominal_N: the Zipf rates; rate_N: the share of rows with each feature on, exactly.
    parent_N, level_N: int64, -1 for features without a parent, and outside any tree.
    free_n: features without a parent, roots first; threshold_n: how large a normal number turns each of them on;
    loading_nr: its loadings on the copula's factors.
    child_first_N: number of a node's first child, its children are the next b; -1 for a leaf.
    child_rate_Nb: P(child on | its parent on); 0 for a leaf. mean_N, spread_N: magnitudes.
    direction_Nd: unit vectors. bias_d: what every row has.
    """

    def __init__(self, config: WorldConfig, device: str | torch.device = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        generator = torch.Generator().manual_seed(config.seed)
        N, b, levels = config.n_features, config.branching, config.level_sizes
        in_trees = sum(levels)
        self.parent_N = torch.full((N,), -1)
        self.level_N = torch.full((N,), -1)
        self.child_first_N = torch.full((N,), -1)
        first = 0
        for level, size in enumerate(levels):
            self.level_N[first : first + size] = level
            if level < config.depth:
                nodes = torch.arange(size)
                self.child_first_N[first : first + size] = first + size + nodes * b
                self.parent_N[first + size : first + size + size * b] = (first + nodes).repeat_interleave(b)
            first += size
        self.nominal_N = zipf(config)
        self.child_rate_Nb = self._child_rates()
        self.rate_N = self._rates()
        self.free_n = torch.cat([torch.arange(levels[0] if levels else 0), torch.arange(in_trees, N)])
        self.threshold_n = -torch.special.ndtri(self.nominal_N[self.free_n]).float()
        loading_nr = config.correlation_scale * torch.randn(
            len(self.free_n), config.correlation_rank, generator=generator
        )
        shared_n = loading_nr.square().sum(1, keepdim=True)
        self.loading_nr = loading_nr * (MAX_SHARED / shared_n.clamp_min(MAX_SHARED)).sqrt()
        self.mean_N = torch.linspace(config.magnitude_first, config.magnitude_last, N)
        self.spread_N = (config.spread_mean + config.spread_sd * torch.randn(N, generator=generator)).abs()
        self.direction_Nd = directions(config, generator)
        bias_d = torch.randn(config.width, generator=generator)
        self.bias_d = config.bias_norm * bias_d / bias_d.norm()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self.device))

    def _child_rates(self) -> Tensor:
        """Nominal rate of each child over its parent's; exclusive siblings share at most 1, others have at most 1."""
        N, b = self.config.n_features, self.config.branching
        rate_Nb = torch.zeros(N, b, dtype=torch.float64)
        inner_n = (self.child_first_N >= 0).nonzero().squeeze(1)
        children_nb = self.child_first_N[inner_n, None] + torch.arange(b)
        wanted_nb = self.nominal_N[children_nb] / self.nominal_N[inner_n, None]
        most_n1 = wanted_nb.sum(1, keepdim=True) if self.config.exclusive else wanted_nb
        rate_Nb[inner_n] = wanted_nb / most_n1.clamp_min(1.0)
        return rate_Nb.float()

    def _rates(self) -> Tensor:
        """Share of rows with each feature on [N], level by level."""
        rate_N = self.nominal_N.clone()
        for level in range(1, self.config.depth + 1):
            nodes_n = (self.level_N == level).nonzero().squeeze(1)
            parents_n = self.parent_N[nodes_n]
            given_n = self.child_rate_Nb[parents_n, nodes_n - self.child_first_N[parents_n]]
            rate_N[nodes_n] = rate_N[parents_n] * given_n.double()
        return rate_N


def zipf(config: WorldConfig) -> Tensor:
    """Rates [N], float64: (rank^-exponent) stretched so that the first is rate_max and the last rate_min."""
    power_N = torch.arange(1, config.n_features + 1, dtype=torch.float64) ** -config.rate_exponent
    if len(power_N) == 1:
        return torch.full((1,), config.rate_max, dtype=torch.float64)
    share_N = (power_N - power_N[-1]) / (power_N[0] - power_N[-1])
    return config.rate_min + (config.rate_max - config.rate_min) * share_N


def directions(config: WorldConfig, generator: torch.Generator) -> Tensor:
    """Unit vectors [N, d]: random, then moved apart, then with the common part.

    A step goes down the gradient of the sum of squared cosines, W (W^T W) - W, through the d x d Gram matrix.
    """
    N, d = config.n_features, config.width
    W_Nd = torch.nn.functional.normalize(torch.randn(N, d, generator=generator), dim=1)
    for _ in range(config.orthogonal_steps):
        step_Nd = W_Nd @ (W_Nd.T @ W_Nd) - W_Nd
        W_Nd = torch.nn.functional.normalize(W_Nd - ORTHOGONAL_RATE * step_Nd / max(1.0, N / d), dim=1)
    if config.mean_cosine > 0:
        common_d = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        apart_Nd = W_Nd - (W_Nd @ common_d)[:, None] * common_d
        apart_Nd = torch.nn.functional.normalize(apart_Nd, dim=1)
        W_Nd = math.sqrt(1 - config.mean_cosine) * apart_Nd + math.sqrt(config.mean_cosine) * common_d
    return W_Nd
