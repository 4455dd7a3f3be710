"""Are the concepts balanced, and train, val and test apart? What `hsae concepts` prints and phase 1 writes.

A *context* of a parent is an occurrence of one of its words in a document of the word's own split: what the labels
`current_token` and `next_token` count (a belief is the model's and cannot be counted before a harvest). Contexts are
natural here; those made from templates are counted beside them and never added.
Shapes: N tokens, D documents, P parents, V tokens of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from polytope_hsae.data.concepts import FOLDS, Child, Concepts
from polytope_hsae.data.corpus import Documents
from polytope_hsae.data.ontology import Families, listed_words
from polytope_hsae.data.wordnet import PartOfSpeech
from polytope_hsae.data.words import token_claims

NGRAM = 8  # tokens
NEAR = 0.5  # share of a document's n-grams
IMBALANCE = 3.0  # standard errors
LARGEST_CHILD = 0.7  # of its parent's words
MULTIPLIER = np.uint64(6364136223846793005)

Ints = NDArray[np.int64]


def require_apart(concepts: Concepts, members: Mapping[str, Tensor] | None = None) -> None:
    """Raise ValueError for a word in two places, whatever its capitals, and for a document in two splits.

    `Concepts` itself refuses a token in two places.
    """
    place: dict[str, str] = {}
    for word, child, fold in concepts.placed_words():
        here = f"{fold} of {child}"
        if word.lower() in place:
            both = f"{place[word.lower()]} and in {here}"
            raise ValueError(f"concepts: {word!r} is in {both}; one place is allowed")
        place[word.lower()] = here
    seen: dict[int, str] = {}
    for split, numbers in (members or {}).items():
        for number in numbers.tolist():
            if number in seen:
                both = f"{seen[number]} and in {split}"
                raise ValueError(f"corpus: document {number} is in {both}; one split is allowed")
            seen[number] = split


def count_contexts(concepts: Concepts, documents: Documents, members: Mapping[str, Tensor]) -> dict[str, Ints]:
    """Natural contexts of every parent [P], by split."""
    counts = _split_token_counts(documents, members, _vocabulary(concepts, documents))
    parent_R = concepts.child_parent_R
    found = {}
    for split in FOLDS:
        contexts_P = np.zeros(concepts.n_parents, dtype=np.int64)
        for parent, tokens in zip(parent_R, concepts.child_tokens((split,)), strict=True):
            contexts_P[parent] += counts[split][tokens].sum()
        found[split] = contexts_P
    return found


def short_parents(contexts: Mapping[str, Ints], min_rows: int) -> list[int]:
    """Parents with fewer natural contexts in train or test than concept metrics ask for."""
    least_P = np.minimum(contexts["train"], contexts["test"])
    return np.flatnonzero(least_P < min_rows).tolist()


def check_concepts(
    concepts: Concepts,
    documents: Documents,
    members: Mapping[str, Tensor],
    *,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[PartOfSpeech] = ("noun",),
    min_rows: int,
    templated: Mapping[str, Sequence[int]] | None = None,
    listed: Families | None = None,
) -> dict[str, Any]:
    """All checks as one JSON object, with a line in `warnings` for each that fails.

    `templated`: template documents of every parent by split; `listed`: the tree of a user's file, for what became
    of its words. Raises ValueError where splits share a word or a document (`require_apart`).
    """
    require_apart(concepts, members)
    contexts = count_contexts(concepts, documents, members)
    size = _vocabulary(concepts, documents)
    counts_V = sum(_split_token_counts(documents, members, size).values(), start=np.zeros(size, dtype=np.int64))
    report: dict[str, Any] = {
        "parents": _parents(concepts, contexts, counts_V, documents.n_tokens, templated),
        "excluded_words": concepts.excluded,
        "skipped_rows": documents.skipped,
        "min_rows": min_rows,
        "short_of_contexts": [concepts.parents[row].name for row in short_parents(contexts, min_rows)],
        "sizes": _sizes(concepts),
        "frequency": {fold: _balance(concepts, counts_V, fold) for fold in ("val", "test")},
        "shared_forms": _shared_forms(concepts, tokenizer, parts),
        "documents": _overlaps(documents, members),
    }
    if listed is not None:
        report["file"] = _of_file(concepts, listed, tokenizer, parts[0])
    return {**report, "warnings": _warnings(report)}


def _vocabulary(concepts: Concepts, documents: Documents) -> int:
    """A number above every token."""
    tokens = [token for listed in concepts.child_tokens() for token in listed]
    return max(int(documents.tokens.max()), *tokens) + 1


def _split_token_counts(documents: Documents, members: Mapping[str, Tensor], size: int) -> dict[str, Ints]:
    """Occurrences of every token [size] by split."""
    tokens_N = documents.tokens.numpy()
    lengths_D = documents.lengths.numpy()
    counts = {}
    for split, numbers in members.items():
        chosen_D = np.zeros(documents.n_documents, dtype=bool)
        chosen_D[numbers.numpy()] = True
        counts[split] = np.bincount(tokens_N[np.repeat(chosen_D, lengths_D)], minlength=size)
    return counts


def _uses(children: Sequence[Child], counts_V: Ints, fold: str) -> list[int]:
    """Occurrences of every word of a fold."""
    return [int(counts_V[child.tokens[word]].sum()) for child in children for word in child.words[fold]]


def _parents(
    concepts: Concepts,
    contexts: Mapping[str, Ints],
    counts_V: Ints,
    n_tokens: int,
    templated: Mapping[str, Sequence[int]] | None,
) -> list[dict[str, Any]]:
    rows = []
    for p, parent in enumerate(concepts.parents):
        uses = {fold: _uses(parent.children, counts_V, fold) for fold in FOLDS}
        sizes = [len(child.tokens) for child in parent.children]
        rows.append({
            "name": parent.name,
            "children": len(parent.children),
            "words": {fold: len(uses[fold]) for fold in FOLDS},
            "words_of_child": {"min": min(sizes), "max": max(sizes)},
            "contexts": {fold: int(contexts[fold][p]) for fold in FOLDS},
            "templated": {fold: int(templated[fold][p]) for fold in FOLDS} if templated is not None else None,
            "per_million_and_word": {
                fold: 1e6 * sum(uses[fold]) / n_tokens / len(uses[fold]) if uses[fold] else None for fold in FOLDS
            },
        })  # fmt: skip
    return rows


def _sizes(concepts: Concepts) -> dict[str, Any]:
    sizes = [len(child.tokens) for child in concepts.children]
    lopsided = [
        parent.name
        for parent in concepts.parents
        if max(len(c.tokens) for c in parent.children) > LARGEST_CHILD * sum(len(c.tokens) for c in parent.children)
    ]
    return {
        "words_of_child": {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)},
        "children_without_val_words": sum(not child.words["val"] for child in concepts.children),
        "children_without_test_words": sum(not child.words["test"] for child in concepts.children),
        "parents_of_one_large_child": lopsided,
    }


def _balance(concepts: Concepts, counts_V: Ints, fold: str) -> dict[str, Any]:
    """Are a fold's words as frequent in the corpus as train words? AUROC of their counts; 0.5 is balance."""
    train, held = (_uses(concepts.children, counts_V, name) for name in ("train", fold))
    n, m = len(train), len(held)
    ranks = rankdata([*held, *train])
    return {
        "median_uses": {"train": float(np.median(train)), fold: float(np.median(held))},
        "never_used": {"train": train.count(0), fold: held.count(0)},
        "auroc": float((ranks[:m].sum() - m * (m + 1) / 2) / (n * m)),
        "standard_error": float(np.sqrt((n + m + 1) / (12 * n * m))),
    }


def _shared_forms(
    concepts: Concepts, tokenizer: PreTrainedTokenizerBase, parts: Sequence[PartOfSpeech]
) -> list[dict[str, Any]]:
    """Tokens that are forms of two words of the concepts: who has them, and who else would."""
    home = {word: {"concept": child, "fold": fold} for word, child, fold in concepts.placed_words()}
    owner = {token: word for child in concepts.children for word, ids in child.tokens.items() for token in ids}
    rows = []
    for part in parts:
        for token, claims in sorted(token_claims(tokenizer, sorted(home), part).items()):
            word = owner.get(token)
            others = sorted({other for _, other, _ in claims} - {word})
            if word is not None and others:
                across = any(home[other]["fold"] != home[word]["fold"] for other in others)
                rows.append({
                    "token": token,
                    "form": claims[0][2],
                    "word": word,
                    **home[word],
                    "others": [{"word": other, **home[other]} for other in others],
                    "across_folds": across,
                })  # fmt: skip
    return rows


def ngram_hashes(documents: Documents, numbers: Ints, n: int = NGRAM) -> tuple[NDArray[np.uint64], Ints]:
    """Hashes of all runs of `n` tokens within these documents, and the document each is from, once per document."""
    tokens_N = documents.tokens.numpy().astype(np.uint64)
    starts_D, lengths_D = documents.starts.numpy(), documents.lengths.numpy()
    prefix = 0 if documents.start_id is None else 1  # every document begins with the same token
    hashes, owners = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    for number in numbers.tolist():
        ids = tokens_N[starts_D[number] + prefix : starts_D[number] + lengths_D[number]]
        if len(ids) >= n:
            runs = np.zeros(len(ids) - n + 1, dtype=np.uint64)
            for place in range(n):  # unsigned integers wrap around
                runs = (runs ^ ids[place : place + len(runs)] + np.uint64(1)) * MULTIPLIER
                runs ^= runs >> np.uint64(29)
            hashes.append(np.unique(runs))
            owners.append(np.full(len(hashes[-1]), number, dtype=np.int64))
    return np.concatenate(hashes), np.concatenate(owners)


def _overlaps(documents: Documents, members: Mapping[str, Tensor]) -> dict[str, Any]:
    """Documents of a split with at least `NEAR` of their n-grams somewhere in another split's documents."""
    hashed = {split: ngram_hashes(documents, members[split].numpy()) for split in FOLDS}
    n = {split: int(members[split].numel()) for split in FOLDS}
    found: dict[str, Any] = {"ngram": NGRAM, "threshold": NEAR, "n": n}
    for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
        hashes, owners = hashed[split]
        known = np.isin(hashes, hashed[other][0])
        total_D = np.bincount(owners, minlength=documents.n_documents)
        known_D = np.bincount(owners, weights=known, minlength=documents.n_documents)
        near = int((known_D[total_D > 0] >= NEAR * total_D[total_D > 0]).sum())
        compared = int((total_D > 0).sum())
        found[f"{split}_in_{other}"] = {
            "near_duplicates": near,
            "compared": compared,  # shorter documents have no n-gram
            "share": near / compared if compared else None,
            "share_of_ngrams": float(known.mean()) if compared else None,
        }
    return found


def _of_file(
    concepts: Concepts, listed: Families, tokenizer: PreTrainedTokenizerBase, part: PartOfSpeech
) -> dict[str, Any]:
    """What became of a user's tree: words that are no token, children and parents that were left out."""
    words = listed_words(listed)
    known = {word for claims in token_claims(tokenizer, words, part).values() for _, word, _ in claims}
    kept = {parent.name: {child.name for child in parent.children} for parent in concepts.parents}
    return {
        "words": len(words),
        "unknown_words": {
            f"{parent} / {child}": missing
            for parent, children in listed.items()
            for child, below in children.items()
            if (missing := [word for word in below if word not in known])
        },
        "parents_left_out": [parent for parent in listed if parent not in kept],
        "children_left_out": [
            f"{parent} / {child}"
            for parent, children in listed.items()
            for child in children
            if parent in kept and child not in kept[parent]
        ],
    }


def _warnings(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for fold, found in report["frequency"].items():
        errors = (found["auroc"] - 0.5) / found["standard_error"]
        if abs(errors) > IMBALANCE:
            medians = found["median_uses"]
            lines.append(
                f"{fold} words are {'more' if errors > 0 else 'less'} frequent than train words: AUROC "
                f"{found['auroc']:.3f}, {abs(errors):.1f} standard errors from 0.5; median uses "
                f"{medians[fold]:g} and {medians['train']:g}"
            )
    for split, other, found in _pairs(report):
        if found["near_duplicates"]:
            lines.append(
                f"{found['near_duplicates']} of {found['compared']} {split} documents have half of their "
                f"{NGRAM}-token runs in {other} documents"
            )
    short = report["short_of_contexts"]
    if short:
        lines.append(
            f"{len(short)} of {len(report['parents'])} parents have fewer than {report['min_rows']} natural contexts "
            f"in train or test: {', '.join(short)}"
        )
    lopsided = report["sizes"]["parents_of_one_large_child"]
    if lopsided:
        lines.append(f"one child has more than {LARGEST_CHILD:.0%} of the words of {', '.join(lopsided)}")
    across = [row["form"] for row in report["shared_forms"] if row["across_folds"]]
    if across:
        lines.append(f"{len(across)} forms belong to words of two folds (each counts for one): {', '.join(across)}")
    if of_file := report.get("file"):
        unknown = [word for words in of_file["unknown_words"].values() for word in words]
        if unknown:
            lines.append(f"{len(unknown)} of {of_file['words']} words have no form of one token: {', '.join(unknown)}")
        for what in ("parents", "children"):
            if of_file[f"{what}_left_out"]:
                lines.append(f"{what} left out: {', '.join(of_file[f'{what}_left_out'])}")
    return lines


def _pairs(report: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(split, the split that it is compared with, overlap of their documents)."""
    compared = ((name.partition("_in_"), found) for name, found in report["documents"].items())
    return [(split, other, found) for (split, between, other), found in compared if between]


def format_checks(report: Mapping[str, Any]) -> Group:
    """A table of the parents, lines on the splits as wholes, then the warnings; for rich."""
    templated = any(row["templated"] is not None for row in report["parents"])
    table = Table(caption="train/val/test; per million: uses of a word in a million tokens of the corpus")
    table.add_column("parent", min_width=16, overflow="fold")
    for column in ("children", "words", "natural contexts", *(["templated"] if templated else []), "per million"):
        table.add_column(column, justify="right")
    for row in report["parents"]:
        of_child = row["words_of_child"]
        numbers = ("words", "contexts", *(["templated"] if templated else []), "per_million_and_word")
        children = f"{row['children']} of {of_child['min']}-{of_child['max']}"
        table.add_row(Text(row["name"]), children, *(_three(row[name]) for name in numbers))
    return Group(table, *map(Text, [*_lines(report), *(f"warning: {line}" for line in report["warnings"])]))


def _three(values: Mapping[str, float | None]) -> str:
    return "/".join("-" if values[fold] is None else f"{values[fold]:.0f}" for fold in FOLDS)


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = ["no word or token is in two folds, no document in two splits"]
    if report["excluded_words"]:
        lines.append(f"{report['excluded_words']} words of this tokenizer are left out (concepts.exclude)")
    if report["skipped_rows"]:
        lines.append(f"{report['skipped_rows']:,} rows of the corpus have no text and are skipped")
    for fold, found in report["frequency"].items():
        medians = found["median_uses"]
        lines.append(
            f"{fold} words against train words: used {medians[fold]:g} and {medians['train']:g} times (median), "
            f"AUROC {found['auroc']:.3f} (balance 0.5, standard error {found['standard_error']:.3f})"
        )
    for split, other, found in _pairs(report):
        share = "-" if found["share_of_ngrams"] is None else f"{found['share_of_ngrams']:.2%}"
        lines.append(
            f"{split} documents near to {other} documents: {found['near_duplicates']} of {found['compared']}, "
            f"shared runs of {NGRAM} tokens: {share}"
        )
    sizes = report["sizes"]
    of_child = sizes["words_of_child"]
    lines.append(
        f"words of a child: {of_child['min']} to {of_child['max']}, median {of_child['median']:g}; "
        f"children without val words {sizes['children_without_val_words']}, "
        f"without test words {sizes['children_without_test_words']}"
    )
    return lines
