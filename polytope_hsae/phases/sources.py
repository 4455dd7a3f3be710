"""Hashes of the files that a config names: two paths to the same bytes are the same input."""

from pathlib import Path

from ..config import Config, local_paths
from ..data.corpus import corpus_sha256
from ..data.wordnet_nltk import nltk_sha256
from ..data.words import uses_nltk
from ..fileio import sha256_file
from ..lm.loading import folder_sha256


def source_files(config: Config) -> dict[str, str]:
    """sha256 by config field of the corpus, ontology, templates, model folder and WordNet of nltk that exist."""
    found: dict[str, str | None] = {}
    for field, path in local_paths(config).items():
        if field == "model.name" and Path(path).is_dir():
            found[field] = folder_sha256(path)
        elif field.startswith("corpus."):
            found[field] = corpus_sha256(config.corpus.kind, path)
        elif Path(path).is_file():
            found[field] = sha256_file(path)
    options = config.concepts
    if uses_nltk(options.wordnet, options.nltk_data):
        for part in options.parts_of_speech:
            found[f"concepts.wordnet.{part}"] = nltk_sha256(part, options.nltk_data)
    return {field: digest for field, digest in found.items() if digest is not None}
