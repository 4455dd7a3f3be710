"""Words that concepts leave out (`concepts.exclude`): named themselves, or by a synset of WordNet."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polytope_hsae.config import PACKAGED
from polytope_hsae.data.wordnet import WordNet

PACKAGED_LIST = Path(__file__).with_name("exclude.txt")
SYNSET = re.compile(r".+\.([nv])\.\d\d+")


@dataclass(frozen=True)
class Exclusions:
    """`words` in lower case; `synsets`, each of which stands for the words whose first sense is at or below it."""

    words: frozenset[str] = frozenset()
    synsets: frozenset[str] = frozenset()

    def kept(self, words: Iterable[str], wordnet: WordNet | None) -> list[str]:
        """The words that are not left out; those of a graph, or (None) of a user's file.

        Raises ValueError for a synset that the graph does not have, though it has its part of speech, and for any
        with a user's file.
        """
        below: set[str] = set()
        if wordnet is None and self.synsets:
            raise ValueError(f"concepts.exclude: found {min(self.synsets)!r}, allowed with a file's words: words")
        if wordnet is not None:
            letters = {match[1] for name in wordnet.lemmas if (match := SYNSET.fullmatch(name))}
            level = [name for name in self.synsets if name.rsplit(".", 2)[1] in letters]
            while level:
                for name in level:
                    if name not in wordnet.children:
                        raise ValueError(f"concepts.exclude: found {name!r}, allowed: a word or a synset of WordNet")
                below.update(level)
                level = [child for name in level for child in wordnet.children[name] if child not in below]
        left = [word for word in words if word.lower() not in self.words]
        return [word for word in left if wordnet is None or wordnet.first_sense[word.lower()] not in below]


def read_exclusions(source: str | Sequence[str]) -> Exclusions:
    """The entries of a list, of a file with one a line (`#` starts a comment), or of the packaged one (`packaged`).

    Raises ValueError when there is no such file, or it is not text.
    """
    entries = source if not isinstance(source, str) else _lines(PACKAGED_LIST if source == PACKAGED else Path(source))
    synsets = frozenset(entry for entry in entries if SYNSET.fullmatch(entry))
    return Exclusions(frozenset(entry.lower() for entry in entries if entry not in synsets), synsets)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        allowed = f"{PACKAGED}, a list of words and synsets, or a file with one a line"
        raise ValueError(f"concepts.exclude: found {str(path)!r}, allowed: {allowed}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise ValueError(f"concepts.exclude: {path} is not readable as UTF-8 text ({error})") from error
    return [entry for line in lines if (entry := line.partition("#")[0].strip())]
