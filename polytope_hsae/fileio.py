"""Reading and writing artifacts: JSON and safetensors only, never half-written, never trusted."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .parsing import checked, parse_json

PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Layout = Mapping[str, tuple[Sequence[torch.dtype], Sequence[str | int]]]


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Make an error of writing in the block name the file, which a full disk and a temporary file do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` if the block succeeds, delete it otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def update_text(path: Path | str, text: str) -> None:
    """Write `text` unless the file already holds it."""
    path = Path(path)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as JSON, atomically. Raises ValueError on NaN or infinity: they are not JSON."""
    write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """What a JSON file holds. Raises ValueError on NaN or infinity."""
    return json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path | str, kind: Any = object) -> Any:
    """Read a JSON file whose content is a `kind`, any type that pydantic checks.

    Raises ValueError with one line, naming the first field that does not fit, when it is not or is not valid JSON.
    """
    try:
        obj = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return checked(obj, kind, path)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device, any strides) as safetensors, atomically; metadata values are strings."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file makes files that only their owner may read
        save_file(contiguous, str(temporary), metadata=dict(metadata or {}))
        temporary.chmod(mode)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors header's metadata in order: the library writes it in an order that changes from run to run."""
    with open(path, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the header grew"
        stream.seek(8)
        stream.write(text.ljust(size))


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: (tensors by name, metadata). Tensors are memory-mapped until they are touched.

    Raises ValueError for pickles (refused by name) and for anything that is not safetensors.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: found a {path.suffix} file, allowed: .safetensors (pickles are never read)")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as handle:
            names = sorted(handle.keys())
            return {name: handle.get_tensor(name) for name in names}, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def check_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    finite: bool = True,
) -> dict[str, int]:
    """The sizes of a file's tensors by letter, if they have the dtypes and shapes of `layout`.

    Args:
        layout: {name: (allowed dtypes, shape)}; a letter in a shape is the same size everywhere.
        finite: refuse NaN and infinities, which reads every number.

    Raises ValueError naming the file and the first tensor that does not fit. Other tensors may be there.
    """
    known: dict[str, int] = {}
    for name, (dtypes, shape) in layout.items():
        names = " or ".join(_dtype_name(dtype) for dtype in dtypes)
        allowed = f"{names} [{', '.join(str(known.get(str(size), size)) for size in shape)}]"
        if name not in tensors:
            raise ValueError(f"{path}: {name}: found nothing, allowed: {allowed}")
        tensor = tensors[name]
        letters = {size: length for size, length in zip(shape, tensor.shape, strict=False) if isinstance(size, str)}
        now = {**letters, **known}
        wanted = [size if isinstance(size, int) else now.get(size) for size in shape]
        if tensor.dtype not in dtypes or list(tensor.shape) != wanted:
            found = f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"{path}: {name}: found {found}, allowed: {allowed}")
        if finite and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name}: found NaN or an infinity, allowed: finite numbers")
        known = now
    return known


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(obj: Any) -> str:
    """Hex SHA-256 of an object's canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
