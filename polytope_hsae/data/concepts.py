"""Concepts: nouns or verbs at two levels, each word a set of tokens, in three folds (docs/method.md §3).

A *word* has *forms*: the word, Capitalised, its plurals or inflections and these Capitalised, with a leading space,
each kept where the tokenizer makes it one token. Every token belongs to at most one word, every word to at most one
child and one parent, and all the forms of a word to one fold. Children are numbered in file order; tensors of children
follow these *rows*. A parent's token set is the union of its children's.
Shapes: R children, V tokens of the vocabulary.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from pydantic import Field
from rich.text import Text
from rich.tree import Tree
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from polytope_hsae.config import ConceptsConfig
from polytope_hsae.data.exclude import read_exclusions
from polytope_hsae.data.ontology import Families, listed_words, read_ontology, select_parents
from polytope_hsae.data.words import graph_tokens, load_graphs, word_tokens
from polytope_hsae.parsing import checked

FOLDS = ("train", "val", "test")
MIN_TRAIN_WORDS = 2


@dataclass(frozen=True)
class Child:
    """`words`: fold -> words, sorted. `tokens`: word -> ids by form. `synset`: None from a file."""

    name: str
    synset: str | None
    words: dict[str, list[str]]
    tokens: dict[str, list[int]]


@dataclass(frozen=True)
class Parent:
    name: str
    synset: str | None
    children: list[Child]


@dataclass(frozen=True)
class Concepts:
    """Parents in the order of `concepts.json`; `excluded` counts words that were left out (`concepts.exclude`).

    Raises ValueError for a token in two places, a word without a fold, and for names that repeat.
    """

    parents: list[Parent]
    excluded: int = 0

    def __post_init__(self) -> None:
        _require_unique("parents", [parent.name for parent in self.parents])
        place: dict[int, str] = {}
        for parent in self.parents:
            _require_unique(parent.name, [child.name for child in parent.children])
            for child in parent.children:
                folded = [word for fold in FOLDS for word in child.words[fold]]
                where = f"{parent.name} / {child.name}"
                if sorted(folded) != sorted(child.tokens):
                    found = f"found {len(folded)} words in folds and {len(child.tokens)} with tokens"
                    raise ValueError(f"concepts: {where}: {found}, allowed every word once in both")
                for word, ids in child.tokens.items():
                    for token in ids:
                        if token in place:
                            both = f"{place[token]} and in {where} / {word}"
                            raise ValueError(f"concepts: token {token} is in {both}; one place is allowed")
                        place[token] = f"{where} / {word}"

    @cached_property
    def children(self) -> list[Child]:
        """All children by row."""
        return [child for parent in self.parents for child in parent.children]

    @property
    def n_parents(self) -> int:
        return len(self.parents)

    @property
    def n_children(self) -> int:
        return len(self.children)

    @property
    def child_parent_R(self) -> list[int]:
        """Parent row of every child row."""
        return [p for p, parent in enumerate(self.parents) for _ in parent.children]

    def placed_words(self) -> Iterator[tuple[str, str, str]]:
        """(word, "parent / child", fold) of every word."""
        for parent in self.parents:
            for child in parent.children:
                yield from (
                    (word, f"{parent.name} / {child.name}", fold) for fold in FOLDS for word in child.words[fold]
                )

    def child_tokens(self, folds: Sequence[str] = FOLDS) -> list[list[int]]:
        """Per child row, its token ids of these folds, sorted."""
        return [
            sorted(token for fold in folds for word in child.words[fold] for token in child.tokens[word])
            for child in self.children
        ]

    def token_to_child(self, vocab_size: int, folds: Sequence[str] = FOLDS) -> Tensor:
        """int32 [vocab_size]: child row of every token of these folds, -1 elsewhere."""
        rows_V = torch.full((vocab_size,), -1, dtype=torch.int32)
        for row, tokens in enumerate(self.child_tokens(folds)):
            if tokens and tokens[-1] >= vocab_size:
                raise ValueError(f"concepts: found token {tokens[-1]}, allowed 0 to {vocab_size - 1}")
            rows_V[tokens] = row
        return rows_V

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Any) -> "Concepts":
        """Inverse of `to_json`. Raises ValueError naming the first field of another kind."""
        tree: _Tree = checked(obj, _Tree, "concepts: not the layout of concepts.json")
        parents = []
        for parent in tree["parents"]:
            children = [
                Child(c["name"], c["synset"], {fold: words for fold, words in c["words"].items()}, c["tokens"])
                for c in parent["children"]
            ]
            parents.append(Parent(parent["name"], parent["synset"], children))
        return cls(parents, tree.get("excluded", 0))


class _Child(TypedDict):
    name: str
    synset: str | None
    words: Annotated[dict[Literal["train", "val", "test"], list[str]], Field(min_length=3)]
    tokens: dict[str, list[Annotated[int, Field(ge=0, lt=2**31)]]]


class _Parent(TypedDict):
    name: str
    synset: str | None
    children: Annotated[list[_Child], Field(min_length=1)]


class _Tree(TypedDict):
    """The content of concepts.json."""

    parents: Annotated[list[_Parent], Field(min_length=1)]
    excluded: NotRequired[Annotated[int, Field(ge=0)]]


def _require_unique(where: str, names: list[str]) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ValueError(f"concepts: {where}: found the name {repeated[0]!r} twice, allowed: names that differ")


def build_concepts(tokenizer: PreTrainedTokenizerBase, options: ConceptsConfig, seed: int) -> Concepts:
    """Parents and children for a tokenizer, from WordNet or a JSON or YAML file {parent: {child: [words]}}.

    Parents with the most words come first, and so do children within a parent; the limits cut the rest.
    `parts_of_speech` says what is taken from WordNet, and how a file's words are inflected (its first entry). A word
    that `exclude` names keeps its tokens from other words, and counts for nothing else. `seed` decides the folds only.
    Equal arguments give equal results. Raises ValueError when fewer children are kept than a parent needs, the file is
    not such a tree, nltk is asked for and missing, or no parent is left.
    """
    if options.max_children_per_parent < options.min_children:
        found = f"found {options.max_children_per_parent}, allowed {options.min_children} or more"
        raise ValueError(f"concepts.max_children_per_parent: {found}")
    from_wordnet = options.ontology == "wordnet"
    tree, tokens, excluded = _tree_and_tokens(tokenizer, options)
    families = []
    for parent, children in tree.items():
        found_words = [(child, [word for word in listed if word in tokens]) for child, listed in children.items()]
        large = [(child, words) for child, words in found_words if len(words) >= options.min_words_per_child]
        if len(large) >= options.min_children:
            large.sort(key=lambda child: -len(child[1]))
            families.append((parent, large[: options.max_children_per_parent]))
    if not families:
        raise ValueError(
            f"concepts.ontology: {options.ontology}: found 0 parents with {options.min_children} or more children of "
            f"{options.min_words_per_child} or more words of one token ({len(tokens)} words do), allowed 1 or more"
        )
    families = sorted(families, key=lambda f: -sum(len(words) for _, words in f[1]))[: options.max_parents]
    parent_names = _names([parent for parent, _ in families], from_wordnet)
    parents = []
    for name, (parent, kept) in zip(parent_names, families, strict=True):
        # seeded by name, so that a parent keeps its folds when others come or go
        fold_seed = (seed, zlib.crc32(parent.encode("utf-8")))
        folds = split_words([words for _, words in kept], options.split, fold_seed)
        child_names = _names([child for child, _ in kept], from_wordnet)
        rows = []
        for child_name, (child, words), fold in zip(child_names, kept, folds, strict=True):
            ids = {word: tokens[word] for word in sorted(words)}
            rows.append(Child(child_name, child if from_wordnet else None, fold, ids))
        parents.append(Parent(name, parent if from_wordnet else None, rows))
    return Concepts(parents, excluded)


def _tree_and_tokens(
    tokenizer: PreTrainedTokenizerBase, options: ConceptsConfig
) -> tuple[Families, dict[str, list[int]], int]:
    """Parents, children and words; the tokens of every word that has any and is kept; how many words are left out."""
    exclude = read_exclusions(options.exclude)
    if options.ontology != "wordnet":
        tree = read_ontology(Path(options.ontology))
        found = word_tokens(tokenizer, listed_words(tree), options.parts_of_speech[0])
        tokens = {word: found[word] for word in exclude.kept(found, None)}
        return tree, tokens, len(found) - len(tokens)
    tree, tokens, n_words = {}, {}, 0
    graphs = load_graphs(options.parts_of_speech, options.wordnet, options.nltk_data)
    sizes = {"min_children": options.min_children, "min_words_per_child": options.min_words_per_child}
    for part, found in graph_tokens(tokenizer, graphs).items():
        kept = exclude.kept(found, graphs[part])
        tree |= select_parents(graphs[part], kept, **sizes)
        tokens |= {word: found[word] for word in kept}
        n_words += len(found)
    return tree, tokens, n_words - len(tokens)


def split_words(
    children: Sequence[Sequence[str]], split: Sequence[float], seed: Sequence[int]
) -> list[dict[str, list[str]]]:
    """One parent's words by child -> folds by child, in the shares of `split`.

    Every child keeps at least two train words, the parent at least one val and one test word.
    """
    rng = np.random.default_rng(list(seed))
    fold_of = {word: "train" for words in children for word in words}
    free: list[tuple[float, int, str]] = []
    for row, words in enumerate(children):
        order = [sorted(words)[i] for i in rng.permutation(len(words))][MIN_TRAIN_WORDS:]
        # the first of these keys, sorted, hold about the same share of every child
        free += [((i + rng.random()) / len(order), row, word) for i, word in enumerate(order)]
    assert len(free) >= 2, "bounds on children and words leave a word for val and one for test"
    n_words = len(fold_of)
    n_val, n_test = (max(1, round(share * n_words)) for share in split[1:])
    if n_val + n_test > len(free):
        n_val = min(max(1, round(len(free) * split[1] / (split[1] + split[2]))), len(free) - 1)
        n_test = len(free) - n_val
    n_held = n_val + n_test
    held = sorted((row, word) for _, row, word in sorted(free)[:n_held])
    start = int(rng.integers(n_held))
    for i in range(n_held):  # val and test in turn, child after child
        is_val = (i + 1) * n_val // n_held > i * n_val // n_held
        fold_of[held[(start + i) % n_held][1]] = "val" if is_val else "test"
    return [{fold: sorted(w for w in words if fold_of[w] == fold) for fold in FOLDS} for words in children]


def _names(keys: Sequence[str], from_wordnet: bool) -> list[str]:
    """Synsets -> their words where these are unique, else the synsets; names of a file as they are."""
    if not from_wordnet:
        return list(keys)
    short = [key.rsplit(".", 2)[0].replace("_", " ") for key in keys]
    return [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]


def format_tree(concepts: Concepts, examples: int = 6) -> Tree:
    """Parents and children with their words and tokens counted (train/val/test) and a few words; for rich."""
    # as Text, because rich would read [brackets] in a name as markup
    tree = Tree(f"{concepts.n_parents} parents, {concepts.n_children} children; {_counts(concepts.children)}")
    for parent in concepts.parents:
        branch = tree.add(Text(f"{parent.name} ({len(parent.children)} children; {_counts(parent.children)})"))
        for child in parent.children:
            words = [word for fold in FOLDS for word in child.words[fold]][:examples]
            branch.add(Text(f"{child.name} ({_counts([child])}): {', '.join(words)}"))
    return tree


def _counts(children: Sequence[Child]) -> str:
    words = [sum(len(child.words[fold]) for child in children) for fold in FOLDS]
    tokens = [sum(len(c.tokens[word]) for c in children for word in c.words[fold]) for fold in FOLDS]
    return f"words {'/'.join(map(str, words))}, tokens {'/'.join(map(str, tokens))}"


def permuted_words(concepts: Concepts, seed: int) -> Concepts:
    """The control of a teacher: words of each fold reassigned at random among all children, every size kept."""
    generator = np.random.default_rng(seed)
    tokens = {word: ids for child in concepts.children for word, ids in child.tokens.items()}
    shuffled: dict[str, Iterator[str]] = {}
    for fold in FOLDS:
        listed = [word for child in concepts.children for word in child.words[fold]]
        shuffled[fold] = iter([listed[i] for i in generator.permutation(len(listed))])

    def redealt(child: Child) -> Child:
        words = {fold: sorted(next(shuffled[fold]) for _ in child.words[fold]) for fold in FOLDS}
        own = sorted(word for fold in FOLDS for word in words[fold])
        return replace(child, words=words, tokens={word: tokens[word] for word in own})

    return Concepts([replace(parent, children=[redealt(c) for c in parent.children]) for parent in concepts.parents])
