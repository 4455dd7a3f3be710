"""The causal metric on the residual space (docs/method.md §3).

Two kinds of object live in d coordinates: covectors (unembedding rows, probes, encoder rows) and vectors
(activations, decoder rows, steering vectors). With Sigma the covariance of the unembedding's rows, covectors
are measured by Sigma^-1 and vectors by Sigma; Sigma^(-1/2) and Sigma^(1/2) bring them to the unified
coordinate, where both metrics are the dot product and covector . vector is preserved exactly.

Shape suffixes: V vocabulary, d residual width, N any number of rows. Everything is computed in float64.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, Json
from torch import Tensor
from typing_extensions import TypedDict

from polytope_hsae.fileio import check_tensors, read_tensors, write_tensors
from polytope_hsae.parsing import checked, shown

METRICS = ("causal", "identity", "diagonal", "random", "residual_covariance")
_BLOCK_ROWS = 16_384
_LAYOUT = {
    **dict.fromkeys(("sigma", "sigma_sqrt", "sigma_inv_sqrt"), ((torch.float64,), ("d", "d"))),
    "spectrum": ((torch.float64,), ("d",)),
}


class _Metadata(TypedDict):
    """What a geometry file says beside its tensors; all of it is text."""

    metric: Literal["causal", "identity", "diagonal", "random", "residual_covariance"]
    shrinkage: Json[Annotated[float, Field(ge=0, le=1)]]
    literal: Json[bool]


class Space(StrEnum):
    """What kind of object a tensor's last dimension holds."""

    COVECTOR = "covector"
    VECTOR = "vector"
    UNIFIED = "unified"


def as_space(space: Space | str) -> Space:
    """`space` as a Space. Raises ValueError naming the allowed spaces."""
    if space not in list(Space):
        raise ValueError(f"space: found {space!r}, allowed: {', '.join(Space)}")
    return Space(space)


def row_mean(rows_Vd: Tensor) -> Tensor:
    """Mean row [d] in float64, without a float64 copy of the whole matrix."""
    total_d = rows_Vd.new_zeros(rows_Vd.shape[1], dtype=torch.float64)
    for block in rows_Vd.split(_BLOCK_ROWS):
        total_d += block.double().sum(0)
    return total_d / rows_Vd.shape[0]


def centred_covariance(rows_Vd: Tensor) -> Tensor:
    """Covariance [d, d] of the rows about their mean (divided by V), float64. Raises ValueError on bad shapes
    or values."""
    if rows_Vd.ndim != 2 or rows_Vd.shape[0] < 2:
        raise ValueError(f"unembedding_matrix: found shape {tuple(rows_Vd.shape)}, allowed: [V, d] with V >= 2")
    rows_Vd = rows_Vd.detach()
    mean_d = row_mean(rows_Vd)
    cov_dd = mean_d.new_zeros(rows_Vd.shape[1], rows_Vd.shape[1])
    for block in rows_Vd.split(_BLOCK_ROWS):
        centred = block.double() - mean_d
        cov_dd += centred.T @ centred
    if not torch.isfinite(cov_dd).all():
        raise ValueError("unembedding_matrix: found NaN or infinite entries, allowed: finite numbers")
    return cov_dd / rows_Vd.shape[0]


def shrink(cov_dd: Tensor, shrinkage: float) -> Tensor:
    """Relative shrinkage (1 - s) S + s tr(S)/d I. Raises ValueError when s is outside [0, 1]."""
    if not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage: found {shrinkage}, allowed: 0 to 1")
    eye_dd = torch.eye(len(cov_dd), dtype=cov_dd.dtype, device=cov_dd.device)
    return (1 - shrinkage) * cov_dd + shrinkage * (cov_dd.trace() / len(cov_dd)) * eye_dd


class CausalGeometry:
    """Sigma with its square roots, and the operations that respect covectors and vectors (docs/method.md §3).

    Args:
        unembedding_matrix: [V, d] rows gamma_y, any float type.
        shrinkage: relative shrinkage of the covariance, 0 to 1.
        metric: causal | identity | diagonal (of the covariance) | random (the covariance's spectrum in a
            seeded random basis). residual_covariance needs activations: see `from_activation_covariance`.
        literal: apply Sigma^(-1/2) to vectors as well, as the first description does. For comparison only:
            the pairing of covector and vector is then not preserved.
        seed: of the random metric.

    Attributes: sigma, sigma_sqrt, sigma_inv_sqrt [d, d]; spectrum [d] (ascending eigenvalues of sigma);
    condition_number.
    """

    sigma: Tensor
    sigma_sqrt: Tensor
    sigma_inv_sqrt: Tensor
    spectrum: Tensor

    def __init__(
        self,
        unembedding_matrix: Tensor,
        shrinkage: float = 0.05,
        metric: str = "causal",
        literal: bool = False,
        seed: int = 0,
    ) -> None:
        self._setup(centred_covariance(unembedding_matrix), shrinkage, metric, literal, seed)

    @classmethod
    def from_covariance(
        cls,
        sigma: Tensor,
        shrinkage: float = 0.05,
        metric: str = "causal",
        seed: int = 0,
    ) -> Self:
        """The geometry of a covariance [d, d] of unembedding rows that is already known; arguments as for the class."""
        geometry = cls.__new__(cls)
        geometry._setup(sigma.detach().double(), shrinkage, metric, False, seed)
        return geometry

    @classmethod
    def from_activation_covariance(cls, covariance: Tensor, shrinkage: float = 0.05) -> Self:
        """The residual_covariance metric: Sigma is the inverse of the shrunk covariance S [d, d] of
        activations.

        A vector h is then measured by h^T S^-1 h, so the teacher of a class mean m writes along m and reads
        by S^-1 m.
        """
        spectrum_d, vectors_dd = _eigen(shrink(_checked(covariance), shrinkage))
        geometry = cls.__new__(cls)
        geometry._set(1 / spectrum_d.flip(0), vectors_dd.flip(1), shrinkage, "residual_covariance", False)
        return geometry

    def _setup(self, cov_dd: Tensor, shrinkage: float, metric: str, literal: bool, seed: int) -> None:
        allowed = [name for name in METRICS if name != "residual_covariance"]
        if metric not in allowed:
            hint = " (from_activation_covariance makes that one)" if metric in METRICS else ""
            raise ValueError(f"metric: found {metric!r}, allowed: {', '.join(allowed)}{hint}")
        cov_dd = shrink(_checked(cov_dd), shrinkage)
        if metric == "identity":
            cov_dd = torch.eye(len(cov_dd), dtype=cov_dd.dtype, device=cov_dd.device)
        elif metric == "diagonal":
            cov_dd = torch.diag(cov_dd.diagonal())
        spectrum_d, vectors_dd = _eigen(cov_dd)
        if metric == "random":
            generator = torch.Generator().manual_seed(seed)
            noise_dd = torch.randn(cov_dd.shape, generator=generator, dtype=torch.float64)
            vectors_dd = torch.linalg.qr(noise_dd)[0].to(cov_dd)
        self._set(spectrum_d, vectors_dd, shrinkage, metric, literal)

    def _set(self, spectrum_d: Tensor, vectors_dd: Tensor, shrinkage: float, metric: str, literal: bool) -> None:
        self.spectrum = spectrum_d
        self.sigma, self.sigma_sqrt, self.sigma_inv_sqrt = (
            _symmetric((vectors_dd * scale_d) @ vectors_dd.T)
            for scale_d in (spectrum_d, spectrum_d.sqrt(), spectrum_d.rsqrt())
        )
        self.metric, self.shrinkage, self.literal = metric, float(shrinkage), bool(literal)

    @property
    def width(self) -> int:
        """Residual width d."""
        return self.sigma.shape[0]

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of Sigma."""
        return float(self.spectrum[-1] / self.spectrum[0])

    def _root(self, space: Space, inverse: bool) -> Tensor | None:
        """The symmetric matrix that brings `space` to the unified coordinate (or back); None for the
        identity."""
        if space is Space.UNIFIED:
            return None
        down = space is Space.COVECTOR or self.literal
        return self.sigma_inv_sqrt if down != inverse else self.sigma_sqrt

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.width:
            raise ValueError(f"geometry: found a tensor of shape {tuple(x.shape)}, allowed: [..., {self.width}]")
        return x.to(device=self.sigma.device, dtype=torch.float64)

    def whiten(self, x: Tensor, space: Space | str) -> Tensor:
        """Bring x [..., d] of the named space to the unified coordinate, float64."""
        root = self._root(as_space(space), inverse=False)
        return self._rows(x) if root is None else self._rows(x) @ root

    def unwhiten(self, x: Tensor, space: Space | str) -> Tensor:
        """Bring x [..., d] from the unified coordinate to the named space (covector: read, vector: write),
        float64."""
        root = self._root(as_space(space), inverse=True)
        return self._rows(x) if root is None else self._rows(x) @ root

    def causal_inner_product(
        self, x: Tensor, y: Tensor, space: Space | str, y_space: Space | str | None = None
    ) -> Tensor:
        """<x, y> [...] of two tensors [..., d] (broadcast) of the same space.

        Raises ValueError when `y_space` is named and differs: covectors and vectors have different metrics,
        so whiten each from its own space and compare in the unified one.
        """
        space = as_space(space)
        if y_space is not None and as_space(y_space) is not space:
            raise ValueError(f"space: found {space} and {y_space}, allowed: one space for both (whiten each first)")
        return (self.whiten(x, space) * self.whiten(y, space)).sum(-1)

    def causal_norm(self, x: Tensor, space: Space | str) -> Tensor:
        """Length [...] of x [..., d] in the metric of its space."""
        return self.whiten(x, space).norm(dim=-1)

    def causal_angle(self, x: Tensor, y: Tensor, space: Space | str, y_space: Space | str | None = None) -> Tensor:
        """Angle [...] in degrees, 0 to 180. Raises ValueError where a length is zero."""
        lengths = self.causal_norm(x, space) * self.causal_norm(y, space)
        if (lengths == 0).any():
            raise ValueError("causal_angle: found a vector of length 0, allowed: non-zero vectors")
        cosine = self.causal_inner_product(x, y, space, y_space) / lengths
        return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))

    def normalize_causal(self, x: Tensor, space: Space | str) -> Tensor:
        """x [..., d] scaled to causal length 1, in its own space, float64. Raises ValueError where a length
        is zero."""
        lengths = self.causal_norm(x, space).unsqueeze(-1)
        if (lengths == 0).any():
            raise ValueError("normalize_causal: found a vector of length 0, allowed: non-zero vectors")
        return self._rows(x) / lengths

    def to(self, device: torch.device | str) -> Self:
        """The same geometry with its tensors on `device`."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        return copy

    def save(self, path: Path | str) -> None:
        """Write sigma, its roots and the spectrum as float64 safetensors."""
        metadata = {
            "metric": self.metric,
            "shrinkage": repr(self.shrinkage),
            "literal": str(self.literal).lower(),
        }
        write_tensors(path, {name: getattr(self, name) for name in _LAYOUT}, metadata)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises ValueError when the file holds something else."""
        tensors, metadata = read_tensors(path)
        missing = (_LAYOUT.keys() - tensors.keys()) | (_Metadata.__required_keys__ - metadata.keys())
        if missing:
            raise ValueError(f"{path}: not a geometry file, missing {', '.join(sorted(missing))}")
        check_tensors(path, tensors, _LAYOUT)
        checked(metadata, _Metadata, path)
        spectrum = tensors["spectrum"].tolist()
        if spectrum != sorted(spectrum) or min(spectrum, default=0) <= 0:
            raise ValueError(f"{path}: spectrum: found {shown(spectrum)}, allowed: rising numbers above 0")
        geometry = cls.__new__(cls)
        for name in _LAYOUT:
            setattr(geometry, name, tensors[name])
        geometry.metric, geometry.shrinkage = metadata["metric"], float(metadata["shrinkage"])
        geometry.literal = metadata["literal"] == "true"
        return geometry


def _symmetric(matrix_dd: Tensor) -> Tensor:
    return (matrix_dd + matrix_dd.T) / 2


def _checked(cov_dd: Tensor) -> Tensor:
    if cov_dd.ndim != 2 or cov_dd.shape[0] != cov_dd.shape[1]:
        raise ValueError(f"covariance: found shape {tuple(cov_dd.shape)}, allowed: [d, d]")
    if not torch.isfinite(cov_dd).all():
        raise ValueError("covariance: found NaN or infinite entries, allowed: finite numbers")
    return _symmetric(cov_dd.detach().double())


def _eigen(cov_dd: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors; ValueError when singular to working precision."""
    spectrum_d, vectors_dd = torch.linalg.eigh(cov_dd)
    if spectrum_d[0] <= spectrum_d[-1] * len(cov_dd) * torch.finfo(torch.float64).eps:
        raise ValueError(
            f"shrinkage: the covariance is singular (eigenvalues {float(spectrum_d[0]):.3g} to "
            f"{float(spectrum_d[-1]):.3g}), allowed: a shrinkage above 0 and rows that are not all equal"
        )
    return spectrum_d, vectors_dd
