"""The flat SAEs' options (docs/method.md section 1)."""

from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .block import Block, Whole, require


class FlatConfig(Block):
    """What every flat SAE has (docs/method.md section 1)."""

    n_latents: Whole = Field(ge=1, description="P: number of latents.")
    k: float = Field(gt=0, description="Active latents per row (L0), on average.")
    tied: bool = Field(False, description="Tie encoder and decoder; false = equal at initialisation only.")
    recon_reduction: Literal["sum", "mean"] = Field("sum", description="Squared error summed or averaged over d.")
    project_gradient: bool = Field(False, description="Remove the gradient along decoder rows before each step.")
    aux_weight: float = Field(0.0, ge=0, description="Weight of the auxiliary loss of dead latents; 0 = none.")
    aux_k: Whole = Field(32, ge=1, description="Maximum dead latents per row in the auxiliary loss.")

    @property
    def total_l0(self) -> float:
        """Active latents per row, on average."""
        return self.k

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require("k", self.k, self.k <= self.n_latents, f"at most n_latents = {self.n_latents}")
        return self


class TopKConfig(FlatConfig):
    k: Whole = Field(ge=1, description="Active latents per row.")


class BatchTopKConfig(FlatConfig):
    deleted: ClassVar[dict[str, Any]] = {"threshold_decay": 0.99}


class MatryoshkaConfig(BatchTopKConfig):
    fractions: tuple[float, ...] = Field(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        description="Nested prefixes that rebuild the row, as shares of the latents.",
    )

    @model_validator(mode="after")
    def _nested(self) -> Self:
        rising = all(a < b for a, b in pairwise((0.0, *self.fractions)))
        allowed = "rising shares above 0, the last one 1"
        require("fractions", list(self.fractions), rising and self.fractions[-1:] == (1.0,), allowed)
        return self


class JumpReLUConfig(FlatConfig):
    bandwidth: float = Field(
        0.1, gt=0, description="Width of the window around a threshold in which it gets a gradient, in units of x."
    )
    l0_weight: float = Field(
        3.0, ge=0, description="Weight of (L0/k - 1)^2, as a multiple of the error with no latent on."
    )
    initial_threshold: float | None = Field(
        None, gt=0, description="All thresholds at initialisation; null = such that L0 is k on a sample of train rows."
    )


FLAT_KINDS: dict[str, type[FlatConfig]] = {
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "matryoshka": MatryoshkaConfig,
}
