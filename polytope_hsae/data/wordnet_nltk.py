"""WordNet as nltk reads it, of whatever version lies in nltk's data (extra `wordnet`).

The data are a folder `corpora/wordnet` or an archive `corpora/wordnet.zip`, in a given folder or where nltk looks
(`nltk.data.path`, which the variable NLTK_DATA extends). Nothing is downloaded.
"""

import hashlib
import warnings
from functools import lru_cache
from typing import Any

from polytope_hsae.data.wordnet import LETTERS, PartOfSpeech, WordNet, children_of, load_wordnet

PLACES = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")
INSTALL = 'pip install "polytope-hsae[wordnet]"'


@lru_cache(maxsize=2)
def load_nltk_wordnet(part: PartOfSpeech, folder: str | None = None) -> WordNet:
    """The graph of nltk's WordNet. Raises ValueError when nltk or its data are missing, or the data are broken.

    `folder` is nltk's data folder, None for nltk's own places. Irregular forms are the packaged ones. Hypernyms of
    a synset are sorted by name, as nltk gives them.
    """
    root = _find(folder)
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reader warns that it has no language but English
            reader = WordNetCorpusReader(root, None)
        synsets = list(reader.all_synsets(LETTERS[part]))
        hypernyms = {s.name(): tuple(above.name() for above in s.hypernyms()) for s in synsets}
        lemmas = {s.name(): tuple(s.lemma_names()) for s in synsets}
        words = {lemma.lower() for listed in lemmas.values() for lemma in listed}
        # nltk also looks under the base forms of a word, after the word itself: the first sense is the word's own
        first_sense = {word: reader.synsets(word, LETTERS[part])[0].name() for word in sorted(words)}
        instances = {s.name(): tuple(above.name() for above in s.instance_hypernyms()) for s in synsets}
    except (WordNetError, OSError, ValueError, LookupError, AssertionError, StopIteration) as error:
        raise ValueError(f"concepts.wordnet: {root} is not readable as WordNet's files: {error}") from error
    return WordNet(
        hypernyms=hypernyms,
        children=children_of(hypernyms),
        instance_hypernyms={name: above for name, above in instances.items() if above},
        lemmas=lemmas,
        first_sense=first_sense,
        irregular_forms=load_wordnet(part).irregular_forms,
    )


def nltk_is_there(folder: str | None = None) -> bool:
    """Whether nltk can be imported and finds its WordNet."""
    try:
        _find(folder)
    except ValueError:
        return False
    return True


def nltk_sha256(part: PartOfSpeech, folder: str | None = None) -> str:
    """Hex SHA-256 of the data file of a part of speech. Raises ValueError as `load_nltk_wordnet`."""
    root = _find(folder)
    try:
        with root.join(f"data.{part}").open() as stream:
            return hashlib.sha256(stream.read()).hexdigest()
    except OSError as error:
        raise ValueError(f"concepts.wordnet: {root} has no data.{part}, a file of WordNet") from error


def _find(folder: str | None) -> Any:
    """nltk's pointer to the folder of WordNet's files."""
    try:
        import nltk.data
    except ImportError as error:
        raise ValueError(f"concepts.wordnet: nltk needs the extra wordnet: {INSTALL}") from error
    if folder is not None and folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk reads nothing outside of these
    paths = nltk.data.path if folder is None else [folder]
    for place in PLACES:
        try:
            return nltk.data.find(place, paths)
        except LookupError:
            continue
    raise ValueError(
        f"concepts.wordnet: found no corpora/wordnet in {', '.join(map(str, paths))}, allowed: concepts.nltk_data "
        "with nltk's data folder; python -m nltk.downloader wordnet fetches it"
    )
