"""Words at two levels: chosen from WordNet, or read from a file. `concepts.py` gives them their tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from polytope_hsae.data.wordnet import WordNet
from polytope_hsae.parsing import parse_json, parse_yaml, shown

Families = dict[str, dict[str, list[str]]]  # parent -> child -> words
MAX_PARENT_SHARE = 0.03  # of all the words that the ontology is given
MAX_CHILD_SHARE = 0.7  # of its parent's words
MAX_LEVELS = 8  # of names in a file


def select_parents(wordnet: WordNet, words: Iterable[str], *, min_children: int, min_words_per_child: int) -> Families:
    """Parent synset -> child synset -> words; parents do not overlap. From the graph and the words alone.

    `words` are words of the graph, in their first sense. A child is a direct hyponym with at least
    `min_words_per_child` of them in its subtree. A synset can be a parent if it has `min_children` such children,
    holds at most `MAX_PARENT_SHARE` of all words (which excludes abstract synsets such as `entity.n.01` for a
    vocabulary of any size), and no child has more than `MAX_CHILD_SHARE` of its words. Smallest first, each of these
    is taken that lies neither above nor below one already taken: many specific parents. Then each gives way
    to the largest one that lies above it and above no other: more words for the same number of parents. A
    word below two parents goes to the nearer.
    """
    row = {synset: i for i, synset in enumerate(wordnet.lemmas)}
    words = list(words)
    below = _words_below(wordnet, words)
    ancestors = _ancestors(wordnet)

    def size_then_row(synset: str) -> tuple[int, int]:
        return len(below[synset]), row[synset]

    def families(parents: Iterable[str], keep: Callable[[str, str], bool]) -> Families:
        found = {p: _children_of(wordnet, below, p, min_words_per_child, keep) for p in parents}
        return {p: children for p, children in found.items() if len(children) >= min_children}

    small_enough = [s for s in below if len(below[s]) <= MAX_PARENT_SHARE * len(words)]
    candidates = families(sorted(small_enough, key=size_then_row), lambda parent, word: True)
    sizes = {parent: [len(found) for found in children.values()] for parent, children in candidates.items()}
    candidates = {p: c for p, c in candidates.items() if max(sizes[p]) / sum(sizes[p]) <= MAX_CHILD_SHARE}
    chosen: list[str] = []
    for s in candidates:
        if not any(s in ancestors(c) or c in ancestors(s) for c in chosen):
            chosen.append(s)
    for s in candidates:
        inside = [c for c in chosen if s in ancestors(c)]
        if len(inside) == 1:
            chosen[chosen.index(inside[0])] = s

    owner: dict[str, str] = {}
    for parent in sorted(chosen, key=size_then_row):
        for word, distance in below[parent].items():
            if word not in owner or distance < below[owner[word]][word]:
                owner[word] = parent
    return families(sorted(chosen, key=row.__getitem__), lambda parent, word: owner[word] == parent)


def _words_below(wordnet: WordNet, words: Iterable[str]) -> dict[str, dict[str, int]]:
    """Synset -> {word of its subtree: steps down to it}, for synsets that have any."""
    below: dict[str, dict[str, int]] = {}
    for word in words:
        level, steps = [wordnet.first_sense[word.lower()]], 0
        seen = set(level)
        while level:
            for synset in level:
                below.setdefault(synset, {})[word] = steps
            level = list(dict.fromkeys(h for synset in level for h in wordnet.hypernyms[synset] if h not in seen))
            seen.update(level)
            steps += 1
    return below


def _ancestors(wordnet: WordNet) -> Callable[[str], frozenset[str]]:
    @cache
    def ancestors(synset: str) -> frozenset[str]:
        found: set[str] = set()
        level = [*wordnet.hypernyms[synset]]
        while level:  # not by recursion: some versions of WordNet have verbs above each other
            found.update(level)
            level = [h for above in level for h in wordnet.hypernyms[above] if h not in found]
        return frozenset(found - {synset})

    return ancestors


def _children_of(
    wordnet: WordNet,
    below: Mapping[str, Mapping[str, int]],
    parent: str,
    min_words: int,
    keep: Callable[[str, str], bool],
) -> dict[str, list[str]]:
    """Child -> its words; a word below two children goes to the nearer one, else to the first."""
    owner: dict[str, str] = {}
    for child in wordnet.children[parent]:
        for word, distance in below.get(child, {}).items():
            if keep(parent, word) and (word not in owner or distance < below[owner[word]][word]):
                owner[word] = child
    children: dict[str, list[str]] = {child: [] for child in wordnet.children[parent]}
    for word, child in owner.items():
        children[child].append(word)
    return {child: sorted(words) for child, words in children.items() if len(words) >= min_words}


def read_ontology(path: Path) -> Families:
    """The tree of a JSON or YAML file: {parent: {child: [words]}}, at most below names that group the parents.

    Words stand two names below the top or deeper: the last two names are parent and child, those above are read
    over. Raises ValueError for another layout, a parent that is named twice, and a word in two places.
    """
    if not path.is_file():
        raise ValueError(f"concepts.ontology: {path} is not a file; allowed: wordnet, or a JSON or YAML file")
    tree = read_tree(path, "concepts.ontology")
    families: Families = {}
    place: dict[str, tuple[str, str]] = {}
    for parent, children in _parents(tree, str(path), level=1):
        if parent in families:
            raise ValueError(f"concepts.ontology: {path}: found the parent {parent!r} twice, allowed: one place")
        families[parent] = children
        for child, listed in children.items():
            here = f"{parent} / {child}"
            if not isinstance(listed, list) or not all(isinstance(word, str) and word for word in listed):
                raise ValueError(f"concepts.ontology: {path}: {here}: found {shown(listed)}, allowed a list of words")
            for word in listed:
                if word.lower() in place:
                    there, spelt = place[word.lower()]
                    both = f"{there if spelt == word else f'{there} as {spelt!r}'} and in {here}"
                    raise ValueError(f"concepts.ontology: {path}: {word!r} is in {both}; one place is allowed")
                # words that differ only in their capitals share forms, and could come into two folds
                place[word.lower()] = (here, word)
    return families


def read_tree(path: Path, field: str) -> Any:
    """What a JSON or YAML file holds. Raises ValueError naming `field` and the file when it cannot be parsed."""
    parse = parse_json if path.suffix == ".json" else parse_yaml
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{field}: {path} cannot be parsed: {error}") from error


def listed_words(families: Families) -> list[str]:
    """All words of a tree, in its order."""
    return [word for children in families.values() for listed in children.values() for word in listed]


def _parents(node: Any, where: str, level: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(parent, {child: what stands below it}) of a tree, through the groups above the parents."""
    if level == MAX_LEVELS:
        raise ValueError(f"concepts.ontology: {where}: found more than {MAX_LEVELS} levels of names")
    for name, below in _items(node, where, "a mapping of parents"):
        here = f"{where}: {name}"
        children = dict(_items(below, here, "a mapping of children"))
        groups = [isinstance(value, dict) for value in children.values()]
        if not any(groups):
            yield name, children
        elif all(groups):
            yield from _parents(below, here, level + 1)
        else:
            allowed = "lists of words (of a parent's children) or mappings (parents of a group)"
            raise ValueError(f"concepts.ontology: {here}: found words beside mappings, allowed: {allowed}")


def _items(obj: Any, where: str, allowed: str) -> list[tuple[str, Any]]:
    if not isinstance(obj, dict) or not all(isinstance(key, str) for key in obj):
        found = "keys that are not text" if isinstance(obj, dict) else type(obj).__name__
        raise ValueError(f"concepts.ontology: {where}: found {found}, allowed {allowed} by name")
    return list(obj.items())
