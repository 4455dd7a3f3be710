"""What every autoencoder shares: the coordinates of its input, freezing, saving and loading.

Shapes: B rows, d residual width, P parents (a flat SAE's latents).
"""

import os
import shutil
import uuid
import warnings
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from huggingface_hub import snapshot_download
from pydantic import Field, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..config import Block, LossOverrides
from ..fileio import FLOATS, PICKLE_SUFFIXES, check_tensors, read_json, read_tensors, write_json, write_tensors
from ..ops import CPU, Ops, Precision, of
from ..parsing import misfit, shown
from .card import FILE as CARD
from .card import Described, read_card, write_card
from .codes import Codes, Firings, ModelOutput

NORMALIZATIONS = ("rms", "unit_row", "none")


class Part(nn.Module):
    """A module whose operations `ops` follow its weights: to a GPU and back, to another type, and with `precision`.

    precision: of matrix products on a GPU; to set it on a model sets it on all of its parts.
    """

    ops: Ops = CPU
    _precision: Precision = "float32"

    @property
    def precision(self) -> Precision:
        return self._precision

    @precision.setter
    def precision(self, value: Precision) -> None:
        for module in self.modules():
            if isinstance(module, Part):
                module._precision = value
                module._follow()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _follow(self) -> None:
        weight = next(self.parameters(), None)
        if weight is not None:
            self.ops = of(weight, self._precision)


class SparseAutoencoder(Described, Part):
    """Base of the hierarchical and the flat autoencoders.

    `encode`, `decode`, `reconstruct` and every file speak raw activations h. Inside, x = (h - data_mean) / data_scale
    (`rms`), h / (|h| + 1e-6) (`unit_row`), or h (`none`). Rows of any float type are taken; codes and reconstructions
    have the model's own, float32 unless it was converted.
    """

    registry: ClassVar[dict[str, type["SparseAutoencoder"]]] = {}
    config_block: ClassVar[type[Block]]
    graphable: bool = True  # a training step never waits for the GPU, so that one CUDA graph can replay it
    router_temperature: float | Tensor = 1.0
    data_mean: Tensor
    data_scale: Tensor
    D: Tensor
    n_parents: int
    n_children: int

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "config_block"):  # else it is not a kind of its own
            SparseAutoencoder.registry[cls.__name__] = cls

    def __init__(self, config: Any, width: int, normalize: str = "rms"):
        super().__init__()
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: found {normalize!r}, allowed: {', '.join(NORMALIZATIONS)}")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width: found {width!r}, allowed: a whole number above 0")
        self.config = config
        self.width = width
        self.normalize = normalize
        self.lr_mult: dict[Any, float] = {}  # learning rate multipliers by tensor; those of a stage come first
        self.register_buffer("data_mean", torch.zeros(width))
        self.register_buffer("data_scale", torch.ones(()))

    # what each kind defines

    def forward(self, h_Bd: Tensor, generator: torch.Generator | None = None) -> ModelOutput:
        """One pass over raw rows; routing noise, if any, is drawn from `generator`, in training mode only."""
        raise NotImplementedError

    def decode_normalized(self, codes: Codes) -> Tensor:
        """x_hat [B, d] in normalised coordinates."""
        raise NotImplementedError

    def normalize_decoder_weights(self) -> None:
        """Restore the unit norms of decoder rows (and atoms)."""
        raise NotImplementedError

    def project_gradients(self) -> None:
        """Remove the gradients' components along constrained rows."""
        raise NotImplementedError

    def loss_terms(
        self, output: ModelOutput, overrides: LossOverrides, dead_P: Tensor | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """Every loss term that is on, by name: (weight, value). dead_P: latents that take part in auxiliary terms."""
        raise NotImplementedError

    def initialize_bias(self, batches: Iterable[Tensor]) -> None:
        """Start b_dec, where there is one, at the geometric median of raw rows, given as batches [B, d].

        The batches are gone through many times: a list, or an object whose `iter` starts anew.
        """
        raise NotImplementedError

    def calibrate(self, batches: Iterable[Tensor], target_l0: float) -> None:
        """Set the thresholds, where a kind has them, so that raw rows [B, d] have `target_l0` codes on average.

        The batches may be gone through more than once: a list, or an object whose `iter` starts anew.
        """

    def write_directions(self) -> Tensor:
        """Unit-norm decoder rows, the parents' write directions in raw coordinates: [P, d]."""
        return torch.nn.functional.normalize(self.D.detach(), dim=1)

    # coordinates

    def set_normalization(self, mean_d: Tensor, scale: float) -> None:
        """Set the train mean and scale of `rms`; ignored by the other normalisations.

        Raises ValueError for a scale that is not above 0: rows that are all the same have no scale.
        """
        if self.normalize == "rms":
            if not 0 < scale < float("inf"):
                raise ValueError(f"data_scale: found {float(scale)}, allowed: above 0, so rows that differ")
            self._looked_at = True
            self.data_mean.copy_(mean_d)
            self.data_scale.fill_(scale)

    def warn_unless_normalized(self) -> None:
        """Say once if `rms` is asked for and mean and scale were never set."""
        if self.normalize == "rms" and not self._looked_at:
            self._looked_at = True
            if bool(self.data_scale == 1) and not bool(self.data_mean.any()):
                found = "found mean 0 and scale 1: set_normalization was never called, so rows are read as they are"
                warnings.warn(f"normalize rms: {found}", stacklevel=3)

    _looked_at = False

    def to_normalized(self, h_Bd: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x [B, d], row norms [B] or None), in the model's type."""
        x_Bd, _, norms_B = self.ops.enter(h_Bd, self.normalize, self.data_mean, self.data_scale, None)
        return x_Bd, norms_B

    def to_raw(self, x_Bd: Tensor, row_scale_B: Tensor | None) -> Tensor:
        """Inverse of `to_normalized`: h [B, d]."""
        if row_scale_B is not None:
            return x_Bd * row_scale_B[:, None]
        return x_Bd * self.data_scale + self.data_mean

    def encode(self, h_Bd: Tensor) -> Codes:
        """Sparse codes of raw rows [B, d], the same in training mode: no noise, and nothing in the model moves.

        Raises ValueError on another width and on NaN.
        """
        h_Bd = self.checked_rows(h_Bd, "encode")
        with self.in_eval_mode():
            codes: Codes = self(h_Bd).codes
        return codes

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Within this the model is in eval mode; afterwards in the mode that it was in."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def decode(self, codes: Codes) -> Tensor:
        """Raw reconstruction [B, d] of codes. Raises ValueError on NaN."""
        dtype = self.data_mean.dtype
        for name in ("parent_value", "child_value", "row_scale"):
            value = getattr(codes, name)
            if value is not None:
                require_finite("decode", name, value)
                codes = codes._replace(**{name: value.to(dtype)})
        return self.to_raw(self.decode_normalized(codes), codes.row_scale)

    def checked_rows(self, h_Bd: Tensor, what: str) -> Tensor:
        """Raw rows [B, d] in the model's type. Raises ValueError, beginning with `what`, for anything else and NaN."""
        self.warn_unless_normalized()
        if h_Bd.ndim != 2 or h_Bd.shape[1] != self.width:
            raise ValueError(f"{what}: found rows of shape {tuple(h_Bd.shape)}, allowed: [B, {self.width}]")
        if not h_Bd.is_floating_point():
            raise ValueError(f"{what}: found rows of {h_Bd.dtype}, allowed: a float type")
        require_finite(what, "rows", h_Bd)
        return h_Bd.to(self.data_mean.dtype)

    def reconstruct(self, h_Bd: Tensor) -> Tensor:
        """decode(encode(h)): [B, d]."""
        return self.decode(self.encode(h_Bd))

    # training

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze exactly the named tensors; the others become trainable. Tied tensors freeze together."""
        names = set(names)
        held = {id(tensor) for name, tensor in self.tensors().items() if name in names}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) not in held)

    def tensors(self) -> dict[str, Tensor]:
        """The method's tensors by name (E, D, ...), tied ones under both names."""
        return {name: getattr(self, name) for name in self.tensor_names if getattr(self, name, None) is not None}

    tensor_names: ClassVar[tuple[str, ...]] = ()

    def update_router_temperature(self, step: int, total_steps: int) -> None:
        """Set the temperature of step 0 <= step < total_steps; models without routing have nothing to set."""

    def after_batch(self, firings: Firings) -> None:
        """Count what fired in a micro-batch; most models have nothing to count."""

    def before_step(self, frozen: Container[str] = ()) -> None:
        """Use the counts since the last optimiser step, and reset them.

        frozen: names of tensors that do not learn in this step.
        """

    # files

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, model.safetensors and the card, if any; the folder appears whole or not at all."""
        folder = Path(folder)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        header = {
            "architecture": type(self).__name__,
            "width": self.width,
            "normalize": self.normalize,
            "config": self.config.model_dump(mode="json"),
        }
        state = self.state_dict()
        kept = {self.file_names.get(name, name): state[name] for name in state if name not in self.transient_names}
        try:
            write_json(temporary / "config.json", header)
            write_tensors(temporary / "model.safetensors", without_sharing(kept))
            if self.card is not None:
                write_card(temporary, self.card)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    transient_names: ClassVar[tuple[str, ...]] = ()  # of the state that ends with a stage of training
    file_names: ClassVar[dict[str, str]] = {}  # of the state's tensors that a file has under another name

    @classmethod
    def from_pretrained(cls, name: Path | str, *, device: str = "cpu") -> Self:
        """Load a folder written by `save_pretrained`, or a hub repository of the same files, in eval mode.

        Raises ValueError with one line when a file is missing, broken, of another architecture or of other shapes.
        """
        folder = Path(name)
        refuse_pickles([folder] if folder.is_file() else [])
        if not folder.is_dir():
            if folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
                raise ValueError(f"{name}: no such folder, allowed: a saved model's folder or a hub id (owner/name)")
            try:
                folder = Path(snapshot_download(str(name), allow_patterns=["config.json", "model.safetensors", CARD]))
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{name}: not a folder here, and the hub does not give it ({reason})") from error
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder / 'config.json'}: no such file, allowed: a folder written by save_pretrained")
        header = read_json(folder / "config.json", _Header)
        kind = SparseAutoencoder.registry.get(header["architecture"])
        if kind is None or not issubclass(kind, cls):
            allowed = sorted(name for name, known in SparseAutoencoder.registry.items() if issubclass(known, cls))
            found = shown(header["architecture"])
            raise ValueError(f"{folder}/config.json: architecture: found {found}, allowed: {', '.join(allowed)}")
        width, normalize = header["width"], header["normalize"]
        try:
            config = kind.config_block.model_validate(header["config"])
            with torch.device("meta"):  # shapes without memory: the file may ask for any size
                empty = {
                    kind.file_names.get(name, name): t
                    for name, t in kind(config, width, normalize).state_dict().items()
                }
        except ValidationError as error:
            raise ValueError(f"{folder}/config.json: not a model config (config.{misfit(error)})") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}/config.json: not a model config ({error})") from error
        if not (folder / "model.safetensors").is_file():
            refuse_pickles(sorted(folder.iterdir()))
        tensors, _ = read_tensors(folder / "model.safetensors")
        kinds = {name: FLOATS if tensor.is_floating_point() else (tensor.dtype,) for name, tensor in empty.items()}
        check_tensors(folder / "model.safetensors", tensors, {name: (kinds[name], empty[name].shape) for name in empty})
        model = kind(config, width, normalize)
        try:
            names = {model.file_names.get(name, name): name for name in model.state_dict()}
            model.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise ValueError(f"{folder}/model.safetensors: {' '.join(str(error).split())}") from error
        if model.data_scale <= 0:
            raise ValueError(f"{folder}/model.safetensors: data_scale: found {model.data_scale}, allowed: above 0")
        model.card = read_card(folder)
        return model.to(device).eval()


class NormalizedBatches:
    """Batches of raw rows in a model's normalised coordinates, on its device; as re-iterable as they are."""

    def __init__(self, model: SparseAutoencoder, batches: Iterable[Tensor]):
        self.model, self.batches = model, batches

    def __iter__(self) -> Iterator[Tensor]:
        for h_Bd in self.batches:
            h_Bd = self.model.checked_rows(h_Bd, "batches")
            yield self.model.to_normalized(h_Bd.to(self.model.data_mean))[0]


class _Header(TypedDict):
    """config.json of a saved model."""

    architecture: str
    width: Annotated[int, Field(ge=1, lt=2**31)]
    normalize: str
    config: dict[str, Any]


def require_finite(what: str, name: str, value: Tensor) -> None:
    """Raise ValueError, beginning with `what`, where a tensor of rows [B, ...] has NaN or an infinity."""
    finite = torch.isfinite(value)
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"{what}: found NaN or an infinity in row {row} of {name}, allowed: finite numbers")


def without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, tied ones as copies: safetensors refuses two names for one memory."""
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        owners.setdefault(tensor.data_ptr(), name)
    return {name: tensor if owners[tensor.data_ptr()] == name else tensor.clone() for name, tensor in tensors.items()}


def refuse_pickles(files: Iterable[Path]) -> None:
    """Raise ValueError for the first pickle among the files; a pickle is never opened."""
    for path in files:
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{path}: found a {path.suffix} file, allowed: .safetensors (pickles are never read)")
