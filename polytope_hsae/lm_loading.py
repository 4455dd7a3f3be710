"""Loading a causal LM and its tokenizer from a hub id, a folder or the name of a packaged model.

Safetensors only, no remote code. What cannot be loaded is a ValueError of one line.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from polytope_hsae.fileio import sha256_file

ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model and where it came from. `revision`: a hash of the weights for a folder, the hub's commit otherwise."""

    model: PreTrainedModel
    name: str
    has_head: bool
    revision: str | None
    tokenizer_sha256: str | None


def load_model(name: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """Load the weights of `name` in `dtype`, with the output head when its config names a causal LM.

    Raises ValueError for an unknown dtype, a missing folder, and missing or other weights than safetensors.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: found {dtype!r}, allowed: {', '.join(DTYPES)}")
    location = _location(name)
    options = {"revision": revision} if revision is not None else {}
    try:
        config = AutoConfig.from_pretrained(location, **options)
        has_head = any("ForCausalLM" in a or "LMHead" in a for a in config.architectures or [])
        auto_class: Any = AutoModelForCausalLM if has_head else AutoModel
        model, loading = auto_class.from_pretrained(
            location, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name: cannot load {name!r} ({_first_line(error)})") from error
    if loading["missing_keys"] and has_head:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(f"model.name: the weights of {name!r} lack {missing}")
    folder = Path(location) if Path(location).is_dir() else None
    return Loaded(
        model.to(device),
        name=folder.resolve().name if folder else name,
        has_head=has_head,
        revision=_weights_sha256(folder) if folder else revision or getattr(config, "_commit_hash", None),
        tokenizer_sha256=_tokenizer_file_sha256(location, revision),
    )


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a hub id, a folder or a packaged model. Raises ValueError (one line) when there is none."""
    options = {"revision": revision} if revision is not None else {}
    try:
        return AutoTokenizer.from_pretrained(_location(name), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name: cannot load the tokenizer of {name!r} ({_first_line(error)})") from error


def _location(name: str) -> str:
    """Where to load `name` from: the folder it names, a packaged model, or the hub id itself."""
    if name and Path(name).is_dir():
        return name
    if "/" not in name and (ASSETS / name / "config.json").is_file():
        return str(ASSETS / name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise ValueError(f"model.name: no such folder {name!r}")
    return name


def _weights_sha256(folder: Path) -> str:
    """What stands for a revision where there is no hub: a hash over the folder's weights."""
    hashes = [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return "sha256:" + hashlib.sha256("".join(hashes).encode()).hexdigest()


def _tokenizer_file_sha256(location: str, revision: str | None) -> str | None:
    path = cached_file(location, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else sha256_file(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
