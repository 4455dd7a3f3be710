"""The hypernym graphs of WordNet's nouns and verbs: packaged (3.0, packed by `scripts/make_wordnet.py`) or from nltk.

A synset is named as usual: its first lemma in lower case, `n` or `v`, and the number of the sense (`dog.n.01`).
`children` and `hypernyms` follow "is a kind of" only; that France *is an instance of* a country is kept
apart.
"""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

PartOfSpeech = Literal["noun", "verb"]
LETTERS: dict[PartOfSpeech, str] = {"noun": "n", "verb": "v"}
IRREGULAR = {"noun": "irregular_plurals", "verb": "irregular_forms"}  # their keys in the packaged files

# Some are nouns to WordNet (as: arsenic; who: the organisation; might: power); in text they are not.
FUNCTION_WORDS = frozenset(
    """
    a about above after again against all almost along also although always am among an and another any
    are as at away be because been before being below between both but by can cannot could did do does
    doing done down during each either else enough even ever every few for from further had has have
    having he her here hers herself him himself his how however i if in into is it its itself just least
    less many may me might mine more most much must my myself near neither never no nor not now of off
    often on once one only onto or other others ought our ours ourselves out over own per perhaps quite
    rather same shall she should since so some still such than that the their theirs them themselves
    then there therefore these they this those though through thus till to together too toward towards
    under unless until up upon us very was we well were what whatever when whence where whether which
    while who whom whose why will with within without would yes yet you your yours yourself
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class WordNet:
    """Synsets by name, all mappings in the order of the database (a hypernym need not come first).

    - `hypernyms`, `children`, `instance_hypernyms`: synset -> synsets (direct ones);
    - `lemmas`: synset -> lemmas as spelled, `_` for a space;
    - `first_sense`: lower-case lemma -> the synset of its most frequent sense as this part of speech;
    - `irregular_forms`: word -> forms that no rule gives: plurals of a noun, past and participles of a verb.
    """

    hypernyms: Mapping[str, tuple[str, ...]]
    children: Mapping[str, tuple[str, ...]]
    instance_hypernyms: Mapping[str, tuple[str, ...]]
    lemmas: Mapping[str, tuple[str, ...]]
    first_sense: Mapping[str, str]
    irregular_forms: Mapping[str, tuple[str, ...]]


@lru_cache(maxsize=2)
def load_wordnet(part: PartOfSpeech) -> WordNet:
    """The packaged graph (82,115 synsets of nouns, 13,767 of verbs); the same object at every call."""
    packed = resources.files("polytope_hsae.data").joinpath(f"wordnet_{part}s.json.gz").read_bytes()
    obj = json.loads(gzip.decompress(packed))
    lemmas: dict[str, tuple[str, ...]] = {}
    first_sense: dict[str, str] = {}
    for text in obj["synsets"]:
        parts = [word.partition("#") for word in text.split(" ")]
        senses = [(lemma, int(number or 1)) for lemma, _, number in parts]
        name = f"{senses[0][0].lower()}.{LETTERS[part]}.{senses[0][1]:02d}"
        lemmas[name] = tuple(lemma for lemma, _ in senses)
        first_sense.update((lemma.lower(), name) for lemma, number in senses if number == 1)
    names = list(lemmas)
    assert len(names) == len(obj["synsets"]), "two synsets share a name"
    rows_above = zip(names, obj["hypernyms"], strict=True)
    hypernyms = {name: tuple(names[i] for i in rows) for name, rows in rows_above}
    instances = obj["instance_hypernyms"].items()
    return WordNet(
        hypernyms=hypernyms,
        children=children_of(hypernyms),
        instance_hypernyms={names[int(row)]: tuple(names[i] for i in rows) for row, rows in instances},
        lemmas=lemmas,
        first_sense=first_sense,
        irregular_forms={word: tuple(forms) for word, forms in obj[IRREGULAR[part]].items()},
    )


def children_of(hypernyms: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Synset -> its direct hyponyms, both in the order of the mapping."""
    children: dict[str, list[str]] = {name: [] for name in hypernyms}
    for name, above in hypernyms.items():
        for parent in above:
            children[parent].append(name)
    return {name: tuple(below) for name, below in children.items()}


def single_words(wordnet: WordNet) -> list[str]:
    """Lemmas of one word, each spelled as in its first sense, without function words.

    Three letters or more: shorter ones are mostly symbols.
    """
    words: dict[str, str] = {}
    for synset, lemmas in wordnet.lemmas.items():
        for lemma in lemmas:
            lower = lemma.lower()
            if len(lemma) >= 3 and lemma.isalpha() and wordnet.first_sense[lower] == synset:
                words.setdefault(lower, lemma)
    return [lemma for lower, lemma in words.items() if lower not in FUNCTION_WORDS]


def word_forms(word: str, part: PartOfSpeech = "noun") -> list[tuple[int, str]]:
    """(rank, form): 0 the word, 1 Capitalised, 2 its inflected forms, 3 the same Capitalised; each form once.

    A noun has plurals; a verb has -s, -ing, past and participle.
    """
    inflected = _plurals(word) if part == "noun" else _verb_forms(word)
    ranked: dict[str, int] = {}
    for rank, form in [(0, word), *((2, form) for form in inflected)]:
        ranked.setdefault(form, rank)
        ranked.setdefault(form[0].upper() + form[1:], rank + 1)
    kept = [form for form, rank in ranked.items() if rank == 0 or form.lower() not in FUNCTION_WORDS]
    return sorted((ranked[form], form) for form in kept)


def _plurals(word: str) -> list[str]:
    lower = word.lower()
    plurals = [*load_wordnet("noun").irregular_forms.get(lower, ())]
    if _takes_ies(lower):
        plurals.append(word[:-1] + "ies")
    elif lower.endswith("man"):
        plurals += [word[:-2] + "en", word + "s"]  # the singular alone does not tell fireman from human
    else:
        plurals.append(word + _s(lower))
    return plurals


def _verb_forms(word: str) -> list[str]:
    lower = word.lower()
    irregular = load_wordnet("verb").irregular_forms.get(lower, ())
    third_person = word[:-1] + "ies" if _takes_ies(lower) else word + ("es" if lower.endswith("o") else _s(lower))
    forms = [*irregular, third_person]
    # An irregular form takes the place of the regular one: `hoping` and `hoped` are forms of hope, not of hop.
    if not any(form.endswith("ing") for form in irregular):
        stem = word[:-1] if lower.endswith("e") and not lower.endswith(("ee", "oe", "ye")) else word
        forms.append(stem + "ing")
    if not any(not form.endswith("ing") for form in irregular):
        forms.append(word + "d" if lower.endswith("e") else word[:-1] + "ied" if _takes_ies(lower) else word + "ed")
    return forms


def _takes_ies(lower: str) -> bool:
    return lower.endswith("y") and lower[-2:-1] not in tuple("aeiou")


def _s(lower: str) -> str:
    return "es" if lower.endswith(("s", "x", "z", "ch", "sh")) else "s"
