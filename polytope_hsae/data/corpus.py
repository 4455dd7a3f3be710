"""Corpora: documents of tokens from a token file, text, JSONL, Parquet or a hub dataset; splits and contexts.

A document is a run of tokens that starts with the document-start token (`tokens.document_start`) where there is
one. Its text is encoded whole, because a seam would change the tokens around it. A context is what the model sees at
once: the start token and the next part of one document. So every token of a document but its start is seen exactly
once, and never without a start token before it. Nothing is put at the end: an encoder gets no closing separator.
Shapes: N tokens, D documents, n contexts, B sequences, T positions.
"""

import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from polytope_hsae.config import ENDINGS
from polytope_hsae.fileio import check_tensors, read_tensors, sha256_file, sha256_json
from polytope_hsae.lm.tokens import document_start, plain_ids, with_start
from polytope_hsae.parsing import shown

ASSETS = Path(__file__).parents[1] / "assets"
PACKAGED_TOKENS = ASSETS / "quickstart_tokens.safetensors"
PACKAGED_TOKENIZER = ASSETS / "textbook-lm-9m"
SPLITS = ("train", "val", "test")
MIN_DOCUMENT_TOKENS = 2
ENCODE_BATCH = 256  # texts that are encoded at once, or fewer with so many characters
ENCODE_CHARACTERS = 1 << 20
BLANK = "\n\n"
MAX_FIELDLESS = 10_000  # rows read before a field that none of them has counts as not there
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates: JSON can spell it, tokenizers and UTF-8 cannot
MAX_TEXT = 1 << 24  # characters of a line or a document; a small compressed file can hold a line of any length


@dataclass(frozen=True)
class Documents:
    """`tokens` int32 [N], all documents one after another; `starts` int64 [D], the offset of each one's first token.

    `start_id` is the token that every document begins with, None for none; `skipped` counts the rows that were read
    and have no text.
    """

    tokens: Tensor
    starts: Tensor
    start_id: int | None
    skipped: int = 0

    @classmethod
    def of(cls, parts: Sequence[Tensor], start_id: int | None, skipped: int = 0) -> "Documents":
        """Documents of these tokens (each int32 [n], with its start token)."""
        lengths_D = torch.tensor([part.numel() for part in parts])
        return cls(torch.cat(list(parts)), lengths_D.cumsum(0) - lengths_D, start_id, skipped)

    @property
    def n_documents(self) -> int:
        return self.starts.numel()

    @property
    def n_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def lengths(self) -> Tensor:
        """Tokens of every document, int64 [D]."""
        ends_D = torch.cat([self.starts[1:], torch.tensor([self.n_tokens])])
        return ends_D - self.starts

    def sha256(self) -> str:
        """Hex SHA-256 over tokens and starts: equal for equal corpora."""
        digest = hashlib.sha256(self.tokens.numpy().astype("<i4").tobytes())
        digest.update(self.starts.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_documents(
    source: str,
    path: str | Path | None,
    tokenizer: Any,
    *,
    max_tokens: int,
    context_length: int,
    tokenizer_sha256: str | None = None,
    documents: str = "packed",
    text_field: str = "text",
    start: str = "auto",
) -> Documents:
    """Read a corpus until `max_tokens` tokens; the last document is cut to fit.

    `source`: tokens (a file with `tokens` and `doc_start`; `path` None = the packaged sample; text for another
    tokenizer than the file's is decoded and encoded anew), text (`documents` of it: `_text_documents`; .xz and .gz are
    unpacked), jsonl and parquet (`text_field`; a row without it is skipped), hub (NAME, NAME:SPLIT or
    NAME:CONFIG:SPLIT, streamed). `path` may name several files (`corpus_files`); no document spans two. `start` is
    `corpus.document_start`. Raises ValueError for an unknown source, a missing or malformed file, a missing
    extra, a field that no row has, or an empty corpus.
    """
    if source not in (*ENDINGS, "hub"):
        raise ValueError(f"corpus.source: found {source!r}, allowed: {', '.join(ENDINGS)}, hub")
    if path is None and source != "tokens":
        raise ValueError(f"corpus.path: found null, allowed with corpus.source {source}: a path")
    location = str(PACKAGED_TOKENS if path is None else path)
    files = [str(file) for file in corpus_files(source, location)]
    start_id, skipped = document_start(tokenizer, start), Counter[str]()
    found: Iterator[list[int]]
    if source == "tokens":
        found = chain.from_iterable(_token_documents(file, tokenizer, tokenizer_sha256, start_id) for file in files)
    elif source == "text":
        most = context_length - (start_id is not None)
        texts = chain.from_iterable(_text_documents(file, documents, tokenizer, most) for file in files)
        found = _encoded(texts, tokenizer, start_id)
    else:
        read = {"jsonl": _jsonl_records, "parquet": _parquet_records, "hub": _hub_records}[source]
        records = chain.from_iterable(read(name, text_field) for name in files or [location])
        found = _encoded(_field_texts(records, text_field, location, skipped), tokenizer, start_id)
    return replace(_gather(found, max_tokens, start_id, location), skipped=skipped["rows"])


def corpus_files(source: str, path: str | Path) -> list[Path]:
    """The files that `corpus.path` names, in the order in which they are read; none for a hub dataset.

    A file; a folder: its files with an ending of the source; or else a pattern of files (`**`: folders of any depth).
    `~` is the home folder. Files are sorted by name. Raises ValueError when there are none.
    """
    if source == "hub":
        return []
    place = Path(os.path.expanduser(path))
    if place.is_file():
        return [place]
    endings: tuple[str, ...] = ("",)
    pattern, missing = str(place), f"no such file {str(path)!r}"
    if place.is_dir():
        pattern, endings = f"{glob.escape(pattern)}/*", ENDINGS[source]
        missing = f"found no file that ends in {' or '.join(endings)} in the folder {str(path)!r}"
    found = (Path(name) for name in glob.glob(pattern, recursive=True) if name.endswith(endings))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"corpus.path: {missing}")
    return files


def corpus_sha256(source: str, path: str | Path) -> str | None:
    """SHA-256 of what `corpus.path` names: of the file, or over those of its files in order; None for a hub dataset."""
    hashes = [sha256_file(file) for file in corpus_files(source, path)]
    return (hashes[0] if len(hashes) == 1 else sha256_json(hashes)) if hashes else None


def split_documents(n_documents: int, fractions: Sequence[float], seed: int) -> dict[str, Tensor]:
    """Document numbers of train, val and test (int64, in a seeded random order), disjoint and complete.

    Raises ValueError unless `fractions` are three positive numbers that sum to 1 and every split gets a
    document.
    """
    if len(fractions) != len(SPLITS) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"corpus.split: found {list(fractions)}, allowed: three positive fractions that sum to 1")
    order_D = torch.randperm(n_documents, generator=torch.Generator().manual_seed(seed))
    first = round(fractions[0] * n_documents)
    second = round((fractions[0] + fractions[1]) * n_documents)
    parts = (order_D[:first], order_D[first:second], order_D[second:])
    if min(part.numel() for part in parts) == 0:
        raise ValueError(f"corpus.split: {n_documents} documents leave a split of {list(fractions)} empty")
    return dict(zip(SPLITS, parts, strict=True))


def shortened(documents: Documents, most: int, doc_ids: Tensor | None = None) -> Documents:
    """The documents with the first `most` tokens of those numbered `doc_ids` (None: of all)."""
    length_D = documents.lengths
    which = slice(None) if doc_ids is None else doc_ids
    length_D[which] = length_D[which].clamp_max(most)
    parts = [documents.tokens[start : start + n] for start, n in zip(documents.starts, length_D, strict=True)]
    return Documents.of(parts, documents.start_id, documents.skipped)


def with_held_out(train: Documents, held_out: Documents, seed: int) -> tuple[Documents, dict[str, Tensor]]:
    """Both corpora as one, and the document numbers of train, val and test: the held-out documents, in a seeded random
    order, are half val, half test. Raises ValueError for fewer than two of them.
    """
    if held_out.n_documents < 2:
        raise ValueError(f"corpus.heldout_path: found {held_out.n_documents} document, allowed: 2 or more")
    order_D = torch.randperm(held_out.n_documents, generator=torch.Generator().manual_seed(seed))
    val, test = (order_D + train.n_documents).tensor_split(2)
    starts = torch.cat([train.starts, held_out.starts + train.n_tokens])
    tokens, skipped = torch.cat([train.tokens, held_out.tokens]), train.skipped + held_out.skipped
    documents = Documents(tokens, starts, train.start_id, skipped)
    return documents, dict(zip(SPLITS, (torch.arange(train.n_documents), val, test), strict=True))


def contexts(documents: Documents, doc_ids: Tensor, context_length: int) -> Tensor:
    """Contexts of the given documents, int64 [n,3]: document, offset of its first token, number of tokens.

    The start token that is put before the later parts of a document is not among those tokens; with it a
    context has at most `context_length`. The parts follow the order of `doc_ids`.
    """
    if context_length < 2:
        raise ValueError(f"corpus.context_length: found {context_length}, allowed: 2 or more")
    prefix = 0 if documents.start_id is None else 1
    body = context_length - prefix
    rows: list[tuple[int, int, int]] = []
    lengths = documents.lengths
    for doc in doc_ids.tolist():
        start = int(documents.starts[doc])
        end = start + int(lengths[doc])
        for offset in range(start + prefix, end, body):
            if min(body, end - offset) + prefix >= 2:
                rows.append((doc, offset, min(body, end - offset)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def context_ids(documents: Documents, context: Tensor) -> Tensor:
    """The token ids (int64) that the model sees for one row of `contexts`."""
    _, offset, length = context.tolist()
    ids = documents.tokens[offset : offset + length].long()
    return ids if documents.start_id is None else torch.cat([torch.tensor([documents.start_id]), ids])


def padded_contexts(documents: Documents, rows_n3: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and mask int64 [n,T] of n contexts, padded on the right to the longest."""
    texts = [context_ids(documents, row) for row in rows_n3]
    ids_nT = torch.zeros(len(texts), max(len(text) for text in texts), dtype=torch.int64)
    mask_nT = torch.zeros_like(ids_nT)
    for row, text in enumerate(texts):
        ids_nT[row, : len(text)] = text
        mask_nT[row, : len(text)] = 1
    return ids_nT, mask_nT


def context_batches(
    documents: Documents, rows_n3: Tensor, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of contexts of similar length: (indices into `rows_n3` [B], ids int64 [B,T], mask int64 [B,T]).

    Contexts are taken from the longest to the shortest; B·T is at most `batch_tokens` unless a single
    context is longer. Padding is on the right.
    """
    order = torch.argsort(rows_n3[:, 2], descending=True, stable=True)
    first = 0
    while first < order.numel():
        longest = int(rows_n3[order[first], 2]) + int(documents.start_id is not None)
        members = order[first : first + max(1, batch_tokens // longest)]
        yield members, *padded_contexts(documents, rows_n3[members])
        first += members.numel()


def _gather(documents: Iterable[list[int]], max_tokens: int, start_id: int | None, location: str) -> Documents:
    """Concatenate documents until `max_tokens`."""
    parts: list[Tensor] = []
    total = 0
    for ids in documents:
        ids = ids[: max_tokens - total]
        if len(ids) >= MIN_DOCUMENT_TOKENS:
            parts.append(torch.tensor(ids, dtype=torch.int32))
            total += len(ids)
        if total >= max_tokens - MIN_DOCUMENT_TOKENS:
            break
    if not parts:
        raise ValueError(f"corpus.path: {location!r} has no document of at least {MIN_DOCUMENT_TOKENS} tokens")
    return Documents.of(parts, start_id)


def _encoded(texts: Iterable[str], tokenizer: Any, start_id: int | None) -> Iterator[list[int]]:
    """Token ids of every text after the start token."""
    for batch in _batches(texts):
        yield from (with_start(ids, start_id) for ids in plain_ids(tokenizer, batch))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, in lists that are encoded at once."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == ENCODE_BATCH or characters >= ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _token_documents(
    location: str, tokenizer: Any, tokenizer_sha256: str | None, start_id: int | None
) -> Iterator[list[int]]:
    tensors, metadata = read_tensors(location)
    if not {"tokens", "doc_start"} <= tensors.keys() or "tokenizer_sha256" not in metadata:
        raise ValueError(f"corpus.path: {location!r} lacks tokens, doc_start or the metadata tokenizer_sha256")
    whole = (torch.int32, torch.int64)
    n_tokens = check_tensors(location, tensors, {"tokens": (whole, ("N",)), "doc_start": (whole, ("D",))})["N"]
    tokens, starts = tensors["tokens"], tensors["doc_start"].tolist()
    if not starts or starts[0] != 0 or starts != sorted(starts) or starts[-1] >= n_tokens:
        raise ValueError(f"{location}: doc_start: found {shown(starts)}, allowed: 0 and rising to below {n_tokens}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= 2**31:
        found = f"{int(tokens.min())} to {int(tokens.max())}"
        raise ValueError(f"{location}: tokens: found {found}, allowed: token ids of 31 bits")
    stored = (tokens[a:b].tolist() for a, b in pairwise([*starts, tokens.numel()]))
    if tokenizer_sha256 == metadata["tokenizer_sha256"]:
        return (ids if ids[:1] == [start_id] else with_start(ids, start_id) for ids in stored)
    if metadata["tokenizer_sha256"] != sha256_file(PACKAGED_TOKENIZER / "tokenizer.json"):
        raise ValueError(f"corpus.path: {location!r} is for a tokenizer that is neither the model's nor packaged")
    packaged = AutoTokenizer.from_pretrained(str(PACKAGED_TOKENIZER))
    texts = (str(packaged.decode(ids, skip_special_tokens=True)) for ids in stored)
    return _encoded(texts, tokenizer, start_id)


def _text_documents(location: str, documents: str, tokenizer: Any, most: int) -> Iterator[str]:
    """The texts of a file's documents, by `corpus.documents`.

    packed: consecutive blocks between blank lines, as many as have at most `most` tokens; blank: every such block;
    line: every line that is not blank; file: all of it, but for blank lines before and after.
    """
    with _open_text(location) as lines:
        if documents == "packed":
            yield from _packed(_blocks(lines, location), tokenizer, most)
        elif documents == "blank":
            yield from _blocks(lines, location)
        elif documents == "line":
            yield from (line.rstrip("\n") for line in lines if line.strip())
        else:
            yield _joined(lines, location, "document").strip("\n")


def _packed(paragraphs: Iterable[str], tokenizer: Any, most: int) -> Iterator[str]:
    """Consecutive paragraphs joined, as many as have at most `most` tokens, at least one.

    A paragraph is counted with the blank line before it: what joins them can only make fewer tokens of both.
    """
    joined: list[str] = []
    total = 0
    for batch in _batches(paragraphs):
        counted = plain_ids(tokenizer, [BLANK + text for text in batch])
        for text, n_tokens in zip(batch, map(len, counted), strict=True):
            if joined and total + n_tokens > most:
                yield BLANK.join(joined)
                joined, total = [], 0
            joined.append(text)
            total += n_tokens
    if joined:
        yield BLANK.join(joined)


@contextmanager
def _open_text(location: str) -> Iterator[Iterator[str]]:
    """The lines of a text file, unpacked. Raises ValueError for a broken archive, other bytes and endless lines."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(Path(location).suffix, open)(location, "rt", encoding="utf-8-sig") as stream:
            yield _lines(stream, location)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"corpus.path: {location!r}: not readable as UTF-8 text ({error})") from error


def _lines(stream: Any, location: str) -> Iterator[str]:
    while line := stream.readline(MAX_TEXT + 1):
        if len(line) > MAX_TEXT:
            raise ValueError(f"corpus.path: {location!r}: found a line of more than {MAX_TEXT} characters")
        yield line


def _blocks(lines: Iterable[str], location: str) -> Iterator[str]:
    """Blocks of text between blank lines."""
    for blank, block in groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield _joined(block, location, "block without a blank line").rstrip("\n")


def _joined(lines: Iterable[str], location: str, what: str) -> str:
    """Lines as one text. Raises ValueError when it is too long to be encoded at once."""
    parts: list[str] = []
    characters = 0
    for line in lines:
        parts.append(line)
        characters += len(line)
        if characters > MAX_TEXT:
            found = f"{location!r} with a {what} of more than {MAX_TEXT} characters"
            raise ValueError(f"corpus.documents: found {found}, allowed: line, or shorter ones")
    return "".join(parts)


def _field_texts(records: Iterable[tuple[str, Any]], field: str, location: str, skipped: Counter[str]) -> Iterator[str]:
    """The text of every record that has one, from (where it stands, record); `skipped` counts the others.

    Raises ValueError for a record that is no object, a field that is not text, and a field that no record has.
    """
    fields: set[str] = set()  # of the records until one has the field
    missing = True
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"corpus.path: {where}: found {type(record).__name__}, allowed: an object with fields")
        if missing:
            fields.update(record)
            missing = field not in record
            if missing and skipped["rows"] == MAX_FIELDLESS:
                break
        text = record.get(field)
        if text is None:
            skipped["rows"] += 1
        elif not isinstance(text, str) or HALF_PAIR.search(text):
            raise ValueError(f"corpus.path: {where}: no text in field {field!r}")
        else:
            yield text
    if missing and fields:
        found = f"{field!r}, which none of the {skipped['rows']:,} rows read of {location!r} has"
        raise ValueError(f"corpus.text_field: found {found}, allowed: {', '.join(sorted(fields))}")


def _jsonl_records(location: str, text_field: str) -> Iterator[tuple[str, Any]]:
    with _open_text(location) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{location!r} line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"corpus.path: {where}: not JSON ({error})") from error


def _parquet_records(location: str, text_field: str) -> Iterator[tuple[str, Any]]:
    parquet = _extra("pyarrow.parquet", "parquet")
    file = parquet.ParquetFile(location)
    names = file.schema_arrow.names
    if text_field not in names:
        found = f"{text_field!r}, which {location!r} does not have"
        raise ValueError(f"corpus.text_field: found {found}, allowed: {', '.join(names)}")
    for batch in file.iter_batches(columns=[text_field]):
        yield from ((repr(location), {text_field: value}) for value in batch.column(0).to_pylist())


def _hub_records(location: str, text_field: str) -> Iterator[tuple[str, Any]]:
    datasets = _extra("datasets", "hub")
    name, *rest = location.split(":")
    config = rest[0] if len(rest) > 1 else None
    for record in datasets.load_dataset(name, config, split=rest[-1] if rest else "train", streaming=True):
        yield f"dataset {name!r}", record


def _extra(module: str, source: str) -> Any:
    """A module of the extra `data`."""
    try:
        return import_module(module)
    except ImportError as error:
        needs = f'{module.partition(".")[0]}: pip install "polytope-hsae[data]"'
        raise ValueError(f"corpus.source: {source} needs {needs}") from error
