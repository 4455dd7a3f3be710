"""Paths in a config. A relative path is relative to the working directory, in a file as after --set."""

import os
from pathlib import Path

from .run import Config
from .sources import PACKAGED

FIELDS: dict[str, str | None] = {  # that may name a file or folder, and the value that is another name
    "model.name": None,
    "corpus.path": None,
    "corpus.heldout_path": None,
    "concepts.ontology": "wordnet",
    "concepts.prompts": PACKAGED,
    "concepts.nltk_data": None,
    "concepts.exclude": PACKAGED,
}


def local_paths(config: Config) -> dict[str, str]:
    """The local paths that a config names, by field; not names on the hub or of packaged data."""
    found = {}
    for field, name in FIELDS.items():
        value = _value(config, field)
        on_hub = field.startswith("corpus.") and config.corpus.kind == "hub"
        if value and value != name and not on_hub and (field != "model.name" or _is_folder(value)):
            found[field] = value
    return found


def located(config: Config) -> Config:
    """The config with absolute paths and an explicit kind of corpus, so that it means the same in any folder."""
    if config.corpus.path is not None:
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": config.corpus.kind})})
    for field, path in local_paths(config).items():
        block, name = field.split(".")
        absolute = os.path.abspath(os.path.expanduser(path))
        config = config.model_copy(update={block: getattr(config, block).model_copy(update={name: absolute})})
    return config


def _value(config: Config, field: str) -> str | None:
    block, name = field.split(".")
    value = getattr(getattr(config, block), name)
    return value if isinstance(value, str) else None  # concepts.exclude may be a list of words


def _is_folder(name: str) -> bool:
    """Whether model.name is a folder; a folder wins over a hub id of the same name."""
    return name.startswith(("/", ".", "~")) or Path(name).is_dir()
