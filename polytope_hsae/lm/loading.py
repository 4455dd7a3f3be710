"""Loading a language model and its tokenizer from a hub id, a folder or the name of a packaged model.

Safetensors only, no code from the folder or the hub. What cannot be loaded is a ValueError of one line that names the
folder and what is missing; a folder is looked at before its weights are read.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils import logging as transformers_logging

from polytope_hsae.fileio import sha256_file, sha256_json

ASSETS = Path(__file__).parents[1] / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
HUB_SECONDS = 5  # to wait for the hub before it counts as out of reach

# What transformers raises for a config, a tokenizer or weights that it cannot use.
_OF_PYTHON = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError)
UNUSABLE = (*_OF_PYTHON, StrictDataclassError, SafetensorError)


class Loaded(NamedTuple):
    """A model and where it came from. `revision`: a hash of the weights for a folder, the hub's commit otherwise."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    has_head: bool
    revision: str | None
    tokenizer_sha256: str | None


def load_model(name: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """Load `name` and its tokenizer, in `dtype`: with its output head if the class that its config names can generate.

    Raises ValueError for an unknown dtype, an encoder-decoder, a model that needs code of its own, anything missing or
    broken, and a tokenizer with more ids than the embedding has rows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: found {dtype!r}, allowed: {', '.join(DTYPES)}")
    source = _Source(name, revision)
    config = _load_config(source)
    _check_weights(source)
    tokenizer = _load_tokenizer(source)
    model_class, has_head = _model_class(config)
    # Keys that do not fit are told below, in one line: transformers would print a table.
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "ignore_mismatched_sizes": True}
    with source.telling("cannot load"):
        model, keys = model_class.from_pretrained(**source.arguments, **options, output_loading_info=True)
    _check_keys(source, keys)
    _check_ids(source, tokenizer, model)
    folder = source.folder
    return Loaded(
        model.to(device),
        tokenizer,
        name=folder.resolve().name if folder else name,
        has_head=has_head,
        revision=_weights_sha256(folder) if folder else source.commit(),
        tokenizer_sha256=source.tokenizer_sha256(),
    )


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a hub id, a folder or a packaged model. Raises ValueError (one line) when there is none."""
    source = _Source(name, revision)
    _load_config(source)
    return _load_tokenizer(source)


def tokenizer_sha256(name: str, *, revision: str | None = None) -> str | None:
    """SHA-256 of the tokenizer.json of a hub id, a folder or a packaged model; None where it has no such file."""
    return _Source(name, revision).tokenizer_sha256()


class _Source:
    """A model's name, the folder that it stands for (None: it is on the hub), and how to ask transformers for it."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self.folder = _folder(name)
        location = str(self.folder) if self.folder else name
        self.options: dict[str, Any] = {"revision": revision} if revision is not None else {}
        self.offline = self.folder is None and not _hub_answers()
        if self.offline:
            self.options["local_files_only"] = True  # otherwise every file is asked for again and again, half a minute
        self.arguments = {"pretrained_model_name_or_path": location, "trust_remote_code": False, **self.options}

    def file(self, name: str) -> Path | None:
        """A file of the folder or the repository (then it is downloaded), None if it has none of that name."""
        if self.folder:
            return self.folder / name if (self.folder / name).is_file() else None
        with self.telling("cannot load"):
            found = cached_file(self.name, name, _raise_exceptions_for_missing_entries=False, **self.options)
        return None if found is None else Path(found)

    def commit(self) -> str | None:
        """The hub's commit that the files come from."""
        commit: str | None = extract_commit_hash(str(self.file("config.json")), None)
        return commit or self.options.get("revision")

    def tokenizer_sha256(self) -> str | None:
        path = self.file("tokenizer.json")
        return None if path is None else sha256_file(path)

    def refused(self, message: str) -> ValueError:
        return ValueError(f"model.name: {message}")

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Turn what transformers raises into one line, and keep what it would print off the terminal."""
        try:
            with quiet_transformers():
                yield
        except UNUSABLE as error:
            raise self.refused(f"{what} {self.name!r} ({_first_line(error)})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the warnings of transformers, which are for its direct callers, off the terminal."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _folder(name: str) -> Path | None:
    """The folder that `name` is, or that a packaged model of this name lies in; None for what may be a hub id."""
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if "/" not in name and (ASSETS / name / "config.json").is_file():
        return ASSETS / name
    if path.is_file():
        raise ValueError(f"model.name: found the file {name!r}, allowed: a folder, a hub id or a packaged name")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise ValueError(f"model.name: no such folder {name!r}")
    return None


def _hub_answers() -> bool:
    """Whether the hub takes a connection. Behind a proxy only the download itself can tell: then it is True."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().keys() & {"http", "https", "all"}:
        return True
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def _load_config(source: _Source) -> Any:
    """The model's config. Raises ValueError when there is none, or one of a model that this package cannot run."""
    name = source.name
    path = source.file("config.json")
    if path is None:
        where = "and no such model was downloaded before; the hub is out of reach"
        raise source.refused(f"no folder {name!r}, {where}" if source.offline else f"no config.json in {name!r}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise source.refused(f"config.json in {name!r} is not valid JSON ({_first_line(error)})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise source.refused(f"config.json in {name!r} has no model_type")
    known = raw["model_type"] in CONFIG_MAPPING
    classes = raw.get("architectures") or []
    if "auto_map" in raw and not (known and all(hasattr(transformers, str(found)) for found in classes)):
        raise source.refused(f"{name!r} needs code of its own (auto_map), allowed: what transformers has itself")
    if not known:
        allowed = f"a type that transformers {transformers.__version__} knows"
        raise source.refused(f"{name!r}: found model_type {raw['model_type']!r}, allowed: {allowed}")
    with source.telling("cannot load the config of"):
        config = AutoConfig.from_pretrained(**source.arguments)
    if getattr(config, "is_encoder_decoder", False):
        allowed = "a decoder or an encoder"
        raise source.refused(f"{name!r}: found an encoder-decoder ({config.model_type}), allowed: {allowed}")
    return config


def _check_weights(source: _Source) -> None:
    """Raise ValueError unless there are safetensors, all of the shards, and every one is whole."""
    name, folder = source.name, source.folder
    if source.file(WEIGHTS):
        shards = [WEIGHTS]
    elif index := source.file(INDEX):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise source.refused(f"{INDEX} in {name!r} names no shards") from error
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder else []
        if pickles:
            raise source.refused(f"{name!r}: found {pickles[0]}, allowed: safetensors (a pickle can run code)")
        raise source.refused(f"no {WEIGHTS} in {name!r}")
    if folder is None:
        return
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        shown = ", ".join(missing[:3])
        raise source.refused(f"{len(missing)} of {len(shards)} shards are missing in {name!r}: {shown}")
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise source.refused(f"{shard} in {name!r} is not a complete safetensors file") from error


def _load_tokenizer(source: _Source) -> Any:
    folder, none = source.folder, f"no tokenizer in {source.name!r} (tokenizer.json, or what it is made from)"
    if folder is not None and not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise source.refused(none)
    with source.telling("cannot load the tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
    if not _plain_ids(tokenizer):  # without its files transformers makes one of special tokens only
        raise source.refused(none)
    return tokenizer


def _plain_ids(tokenizer: Any) -> set[int]:
    """Ids of the vocabulary without the added tokens, which text need not contain."""
    return set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)


def _model_class(config: Any) -> tuple[Any, bool]:
    """What to load, and whether it has an output head that predicts the next token."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, GenerationMixin):
            return found, True
    return AutoModel, False


def _check_keys(source: _Source, keys: Any) -> None:
    """Raise ValueError when a tensor was not loaded. A pooler, which many encoders are saved without, is not run."""
    lacking = sorted(key for key in keys["missing_keys"] if "pooler" not in key)
    if lacking:
        raise source.refused(f"the weights of {source.name!r} lack {', '.join(lacking[:3])}")
    for key, found, allowed in sorted(keys["mismatched_keys"]):
        shapes = f"found {key} of shape {tuple(found)}, allowed by its config.json: {tuple(allowed)}"
        raise source.refused(f"{source.name!r}: {shapes}")


def _check_ids(source: _Source, tokenizer: Any, model: PreTrainedModel) -> None:
    """Raise ValueError when the tokenizer has ids that the embedding has no row for."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, torch.nn.Embedding):
        raise source.refused(f"{source.name!r}: found a {type(model).__name__}, allowed: a model that reads tokens")
    largest, rows = max(_plain_ids(tokenizer)), embedding.num_embeddings
    if largest >= rows:
        found = f"found token {largest}, allowed: at most {rows - 1}, the last row of its embedding"
        raise source.refused(f"the tokenizer of {source.name!r} is not its own: {found}")


def folder_sha256(folder: Path | str) -> str:
    """SHA-256 over all files of a model's folder that it is loaded from: weights, config and tokenizer."""
    patterns = ("*.safetensors", "config.json", *TOKENIZERS)
    paths = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    return sha256_json({path.name: sha256_file(path) for path in paths})


def _weights_sha256(folder: Path) -> str:
    """What stands for a revision where there is no hub: a hash over the folder's weights."""
    hashes = [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return "sha256:" + hashlib.sha256("".join(hashes).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, all of them if it ends in a colon; its type where they say little."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__} {text}".strip()
