"""Pooled metrics with percentile bootstrap intervals (docs/method.md §5).

Every metric is a ratio of two sums over independent units: documents for reconstruction and language-model
metrics, concepts for concept metrics. A mean over units is the case where every denominator is 1. The units
are kept beside the value, so that two arms are compared on the same resampled units.

Shapes: U units, n resamples.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

FloatArray = NDArray[np.float64]
Comparison = Literal["difference", "ratio", "relative_change", "relative_reduction"]

_DRAWS_AT_ONCE = 1 << 22
_LEVELS = (0.025, 0.975)


class Resampling(NamedTuple):
    """How intervals are made: `n` bootstrap resamples, drawn with `seed`, which deals out chance levels, too."""

    n: int = 1000
    seed: int = 0


RESAMPLING = Resampling()


@dataclass(frozen=True)
class Metric:
    """One number of results.json.

    `ci95` is a 95 % percentile bootstrap interval, `chance` the value that an uninformed answer gets (None
    where the metric has none), `n` the number of units behind the value. `value` is None when it cannot be
    given; `why` then says why.
    """

    value: float | None
    ci95: tuple[float, float] | None
    chance: float | None
    n: int
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of results.json; `why` only where it is set."""
        out: dict[str, Any] = {
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "chance": self.chance,
            "n": self.n,
        }
        return out if self.why is None else out | {"why": self.why}


def unavailable(why: str, chance: float | None = None) -> Metric:
    """A metric that cannot be given."""
    return Metric(None, None, chance, 0, why)


@dataclass(frozen=True)
class Units:
    """Per-unit numerators and denominators [U] of one metric.

    `keys` [U] names the units (document number, parent row); two arms can be compared only where the keys are
    equal. A unit without a value is NaN: it is left out, in a comparison from both arms.
    """

    numerator_U: FloatArray
    denominator_U: FloatArray
    keys_U: NDArray[np.int64]

    @classmethod
    def ratio(cls, numerator: ArrayLike, denominator: ArrayLike, keys: ArrayLike | None = None) -> "Units":
        """Units of a ratio of sums. Raises ValueError unless all are one-dimensional and equally long."""
        num_U, den_U = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
        keys_U = np.arange(num_U.size) if keys is None else np.asarray(keys, dtype=np.int64)
        if num_U.ndim != 1 or not num_U.shape == den_U.shape == keys_U.shape:
            shapes = f"{num_U.shape}, {den_U.shape}, {keys_U.shape}"
            raise ValueError(f"units: found shapes {shapes}, allowed: three equal lengths")
        return cls(num_U, den_U, keys_U)

    @classmethod
    def mean(cls, values: ArrayLike, keys: ArrayLike | None = None) -> "Units":
        """Units of a plain mean over units."""
        values_U = np.asarray(values, dtype=np.float64)
        return cls.ratio(values_U, np.ones_like(values_U), keys)

    @property
    def present_U(self) -> NDArray[np.bool_]:
        """Which units have a value."""
        return np.isfinite(self.numerator_U) & np.isfinite(self.denominator_U)


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the units of those that two arms can be compared on."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    units: dict[str, Units] = field(default_factory=dict)

    def __or__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.metrics | other.metrics, self.units | other.units)


def _resampled_sums(columns_UK: FloatArray, n: int, seed: int) -> FloatArray:
    """Sums [n, K] of the columns over n resamples of the U units (multinomial counts)."""
    n_units = columns_UK.shape[0]
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, _DRAWS_AT_ONCE // n_units)
    out_nK = np.empty((n, columns_UK.shape[1]))
    for start in range(0, n, rows_at_once):
        rows = min(rows_at_once, n - start)
        draws = rng.integers(n_units, size=(rows, n_units)) + np.arange(rows)[:, None] * n_units
        counts = np.bincount(draws.ravel(), minlength=rows * n_units).reshape(rows, n_units)
        out_nK[start : start + rows] = counts @ columns_UK
    return out_nK


def bootstrap_sums(
    columns_UK: FloatArray,
    of_sums: Callable[[FloatArray], FloatArray],
    n: int,
    seed: int,
    chance: float | None,
) -> Metric:
    """Value and interval of a function of column sums [..., K] -> [...], `n` times over resamples of the U units."""
    n_units = columns_UK.shape[0]
    if n < 1:
        raise ValueError(f"bootstrap: found {n} resamples, allowed: at least 1")
    if n_units == 0:
        return unavailable("no units with a value", chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of_sums(columns_UK.sum(axis=0)))
        if not math.isfinite(value):
            return Metric(None, None, chance, n_units, "the denominator is zero")
        if n_units == 1:
            return Metric(value, None, chance, 1, "no interval: one unit cannot be resampled")
        samples_n = of_sums(_resampled_sums(columns_UK, n, seed))
    samples_n = samples_n[np.isfinite(samples_n)]
    if not samples_n.size:
        return Metric(value, None, chance, n_units, "no interval: the denominator is zero in every resample")
    low, high = np.quantile(samples_n, _LEVELS)
    return Metric(value, (float(low), float(high)), chance, n_units)


def bootstrap_units(units: Units, n: int = 1000, seed: int = 0, chance: float | None = None) -> Metric:
    """Ratio of the sums of the present units, with its interval from `n` resamples."""
    columns_UK = np.stack([units.numerator_U, units.denominator_U], axis=1)[units.present_U]
    return bootstrap_sums(columns_UK, lambda sums: sums[..., 0] / sums[..., 1], n, seed, chance)


def bootstrap_mean(values: ArrayLike, n: int = 1000, seed: int = 0, chance: float | None = None) -> Metric:
    """Mean of values [U]; NaN marks a unit without a value, which is left out of value and `n`."""
    return bootstrap_units(Units.mean(values), n, seed, chance)


def bootstrap_fraction(count: int, total: int, n: int = 1000, seed: int = 0) -> Metric:
    """Share `count / total` of 0/1 units; resampling those is a binomial draw."""
    if total == 0:
        return unavailable("no units with a value")
    samples_n = np.random.default_rng(seed).binomial(total, count / total, size=n) / total
    low, high = np.quantile(samples_n, _LEVELS)
    return Metric(count / total, (float(low), float(high)), None, total)


def bootstrap_quantile(values: ArrayLike, place: float, chance: float | None = None) -> Metric:
    """The `place` quantile (0.5: median) of values [U], with the interval that infinitely many resamples would give.

    The m-th smallest of U draws is at most the i-th smallest value as often as Binomial(U, i/U) reaches m: no draws are
    needed, however many values there are. NaN marks a unit without a value, which is left out.
    """
    values_U = np.asarray(values, dtype=np.float64)
    sorted_U = np.sort(values_U[np.isfinite(values_U)])
    n_units = sorted_U.size
    if n_units == 0:
        return unavailable("no units with a value", chance)
    value = float(np.quantile(sorted_U, place))
    if n_units == 1:
        return Metric(value, None, chance, 1, "no interval: one unit cannot be resampled")
    wanted = 1 + math.floor(place * (n_units - 1))
    at_most_U = binom.sf(wanted - 1, n_units, np.arange(1, n_units + 1) / n_units)
    low, high = (float(sorted_U[np.searchsorted(at_most_U, level)]) for level in _LEVELS)
    return Metric(value, (low, high), chance, n_units)


_COMPARE: dict[Comparison, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "difference": lambda first, second: second - first,
    "ratio": lambda first, second: second / first,
    "relative_change": lambda first, second: (second - first) / first,
    "relative_reduction": lambda first, second: (first - second) / first,
}


def paired(first: Units, second: Units, how: Comparison = "difference", n: int = 1000, seed: int = 0) -> Metric:
    """Compare two arms on the same resampled units.

    With a and b the pooled values of `first` and `second`: `difference` b - a, `ratio` b/a, `relative_change`
    (b - a)/a, `relative_reduction` (a - b)/a. Units without a value in either arm are left out of both.
    Raises ValueError when the arms were measured on different units.
    """
    if not np.array_equal(first.keys_U, second.keys_U):
        found = f"{first.keys_U.size} and {second.keys_U.size} units"
        raise ValueError(f"paired: found {found} with different keys, allowed: the same units in both arms")
    columns = [first.numerator_U, first.denominator_U, second.numerator_U, second.denominator_U]
    columns_UK = np.stack(columns, axis=1)[first.present_U & second.present_U]
    chance = 1.0 if how == "ratio" else 0.0

    def compared(sums: FloatArray) -> FloatArray:
        return _COMPARE[how](sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3])

    return bootstrap_sums(columns_UK, compared, n, seed, chance)


def summarise(units: dict[str, Units], chance: Mapping[str, float | None], n: int = 1000, seed: int = 0) -> Evaluation:
    """An Evaluation of every named units array, with its chance level where it has one."""
    metrics = {name: bootstrap_units(each, n, seed, chance.get(name)) for name, each in units.items()}
    return Evaluation(metrics, units)
