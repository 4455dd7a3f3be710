"""Sentences with a gap, for concepts whose words the corpus hardly has.

What is made here never joins the corpus: template documents are harvested into a store of their own, so that a
number from them can always be told from one of natural text. Splits stay apart as they do there: a word of a fold
stands only in its own split's documents, and every sentence belongs to one split.
Shapes: P parents, D documents.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from polytope_hsae.data.concepts import FOLDS, Concepts, Parent
from polytope_hsae.data.corpus import Documents
from polytope_hsae.data.ontology import read_tree
from polytope_hsae.data.wordnet import LETTERS, PartOfSpeech
from polytope_hsae.lm.tokens import plain_ids, with_start
from polytope_hsae.parsing import checked, shown

PACKAGED = Path(__file__).with_name("prompts.yaml")
GAP = "{word}"
PLACED = re.compile(r" \{word\}(?!\w)")

Templates = dict[PartOfSpeech, list[str]]


class _Templates(TypedDict, total=False):
    """A file of templates."""

    noun: Annotated[list[str], Field(min_length=len(FOLDS))]
    verb: Annotated[list[str], Field(min_length=len(FOLDS))]


@dataclass(frozen=True)
class TemplateDocuments:
    """`documents` made from templates; `members`: their numbers (int64) by split; `parent_D`: whose word each holds.

    `left_out` counts sentences in which the tokenizer does not make the word one token.
    """

    documents: Documents
    members: dict[str, Tensor]
    parent_D: list[int]
    left_out: int

    def counts(self, n_parents: int) -> dict[str, list[int]]:
        """Documents of every parent, by split."""
        parent_D = torch.tensor(self.parent_D)
        return {split: parent_D[found].bincount(minlength=n_parents).tolist() for split, found in self.members.items()}


def read_templates(source: str) -> Templates:
    """Sentences by part of speech: `packaged`, or a YAML or JSON file {noun: [...], verb: [...]}.

    Raises ValueError for another layout, fewer than three sentences, one that is there twice, and one without
    exactly one gap `{word}`, a word of its own after a space.
    """
    path = PACKAGED if source == "packaged" else Path(source)
    if not path.is_file():
        raise ValueError(f"concepts.prompts: found {source!r}, allowed: packaged, or a YAML or JSON file")
    tree = read_tree(path, "concepts.prompts")
    templates: Templates = checked(tree, _Templates, f"concepts.prompts: {path}")
    unknown = sorted(set(templates) - set(LETTERS))
    if unknown:
        raise ValueError(f"concepts.prompts: {path}: found {unknown[0]!r}, allowed: {', '.join(LETTERS)}")
    seen: set[str] = set()
    for part, sentences in templates.items():
        for sentence in sentences:
            if sentence.count(GAP) != 1 or not PLACED.search(sentence):
                found = f"{part}: found {shown(sentence)}"
                raise ValueError(
                    f"concepts.prompts: {path}: {found}, allowed: one {GAP}, a word of its own after a space"
                )
            if sentence in seen:
                raise ValueError(f"concepts.prompts: {path}: found {shown(sentence)} twice, allowed: once")
            seen.add(sentence)
    return templates


def split_templates(sentences: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Sentences dealt out among the splits in turn, in a seeded random order."""
    order = np.random.default_rng(seed).permutation(len(sentences))
    return {split: [sentences[i] for i in order[place :: len(FOLDS)]] for place, split in enumerate(FOLDS)}


def template_documents(
    concepts: Concepts,
    parents: Sequence[int],
    templates: Templates,
    tokenizer: Any,
    *,
    start_id: int | None,
    default_part: PartOfSpeech = "noun",
    seed: int = 0,
) -> TemplateDocuments:
    """Every word of these parents (rows of `concepts.json`) in every sentence of its split.

    A word stands in its first form that is one token. `start_id` starts a document. `default_part` is the part of
    speech of parents that are not from WordNet. Raises ValueError when the templates lack a part of speech, or a split
    gets no document.
    """
    dealt = {part: split_templates(sentences, seed) for part, sentences in templates.items()}
    texts: dict[str, list[list[int]]] = {split: [] for split in FOLDS}
    owners: dict[str, list[int]] = {split: [] for split in FOLDS}
    left_out = 0
    for row in parents:
        parent = concepts.parents[row]
        part = part_of_speech(parent, default_part)
        if part not in dealt:
            raise ValueError(f"concepts.prompts: found no sentences of {part} for {parent.name}, allowed: at least 3")
        for split in FOLDS:
            found, missed = _filled(parent, split, dealt[part][split], tokenizer)
            texts[split] += [with_start(ids, start_id) for ids in found]
            owners[split] += [row] * len(found)
            left_out += missed
    empty = [split for split in FOLDS if not texts[split]]
    if empty:
        raise ValueError(f"concepts.prompts: found no sentence for {empty[0]} in which the word is one token")
    parts = [torch.tensor(ids, dtype=torch.int32) for split in FOLDS for ids in texts[split]]
    numbers = torch.arange(len(parts)).split([len(texts[split]) for split in FOLDS])
    members = dict(zip(FOLDS, numbers, strict=True))
    parent_D = [row for split in FOLDS for row in owners[split]]
    return TemplateDocuments(Documents.of(parts, start_id), members, parent_D, left_out)


def part_of_speech(parent: Parent, default: PartOfSpeech) -> PartOfSpeech:
    """That of a parent's synset, else `default`."""
    letter = parent.synset.rsplit(".", 2)[1] if parent.synset is not None else None
    return next((part for part, name in LETTERS.items() if name == letter), default)


def _filled(parent: Parent, split: str, sentences: list[str], tokenizer: Any) -> tuple[list[list[int]], int]:
    """Token ids of every sentence with every word of the parent's fold; how many lack the word's token."""
    firsts = [child.tokens[word][0] for child in parent.children for word in child.words[split]]
    if not firsts or not sentences:
        return [], 0
    forms = [(token, tokenizer.decode([token]).strip()) for token in firsts]
    tokens = [token for token, _ in forms for _ in sentences]
    made = [sentence.replace(GAP, form) for _, form in forms for sentence in sentences]
    encoded = plain_ids(tokenizer, made)
    kept = [ids for ids, token in zip(encoded, tokens, strict=True) if token in ids]
    return kept, len(made) - len(kept)
