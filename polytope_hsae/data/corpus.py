"""Corpora: documents of tokens from a token file, text, JSONL, Parquet or a hub dataset; splits and contexts.

A document is a run of tokens that starts with the tokenizer's document-start token (bos, else cls, else eos)
where it has one. A context is what the model sees at once: the start token and the next part of one document, so
that every token of a document but its start is seen exactly once, and never without a start token before
it. Nothing is put at the end: an encoder gets no closing separator.
Shapes: N tokens, D documents, n contexts, B sequences, T positions.
"""

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from polytope_hsae.fileio import check_tensors, read_tensors, sha256_file
from polytope_hsae.parsing import shown

ASSETS = Path(__file__).parents[1] / "assets"
PACKAGED_TOKENS = ASSETS / "quickstart_tokens.safetensors"
PACKAGED_TOKENIZER = ASSETS / "textbook-lm-9m"
SOURCES = ("tokens", "text", "jsonl", "parquet", "hub")
SPLITS = ("train", "val", "test")
MIN_DOCUMENT_TOKENS = 2
ENCODE_BATCH = 256
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates: JSON can spell it, tokenizers and UTF-8 cannot
MAX_LINE = 1 << 24  # characters; a small compressed file can hold a line of any length


@dataclass(frozen=True)
class Documents:
    """`tokens` int32 [N], all documents one after another; `starts` int64 [D], the offset of each one's first token.

    `start_id` is the token that every document begins with, None for a tokenizer that has none.
    """

    tokens: Tensor
    starts: Tensor
    start_id: int | None

    @property
    def n_documents(self) -> int:
        """D."""
        return self.starts.numel()

    @property
    def n_tokens(self) -> int:
        """N."""
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
    text_field: str = "text",
) -> Documents:
    """Read a corpus until `max_tokens` tokens; the last document is cut to fit.

    `source`: tokens (a file with `tokens` and `doc_start`; `path` None = the packaged sample; another
    tokenizer than the file's gets the decoded text, encoded anew), text (paragraphs between blank lines,
    joined up to `context_length` tokens; .xz and .gz are unpacked), jsonl and parquet (`text_field`), hub
    (NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, streamed). Raises ValueError for an unknown source, a missing or
    malformed file, a missing extra, or an empty corpus.
    """
    if source not in SOURCES:
        raise ValueError(f"corpus.source: found {source!r}, allowed: {', '.join(SOURCES)}")
    if path is None and source != "tokens":
        raise ValueError(f"corpus.path: found null, allowed with corpus.source {source}: a path")
    location = str(PACKAGED_TOKENS if path is None else path)
    if source != "hub" and not Path(location).is_file():
        raise ValueError(f"corpus.path: no such file {location!r}")
    start_id = document_start(tokenizer)
    if source == "tokens":
        documents = _token_documents(location, tokenizer, tokenizer_sha256, start_id)
    elif source == "text":
        documents = _packed_paragraphs(_paragraphs(location), tokenizer, context_length, start_id)
    else:
        readers = {"jsonl": _jsonl_texts, "parquet": _parquet_texts, "hub": _hub_texts}
        texts = readers[source](location, text_field)
        documents = (_with_start(ids, start_id) for ids in _encoded(texts, tokenizer))
    return _gather(documents, max_tokens, start_id, location)


def document_start(tokenizer: Any) -> int | None:
    """The token that starts a document: bos, else cls (encoders such as BERT), else eos, else None."""
    candidates = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), None)


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
    return Documents(torch.cat(parts), length_D.cumsum(0) - length_D, documents.start_id)


def with_held_out(train: Documents, held_out: Documents, seed: int) -> tuple[Documents, dict[str, Tensor]]:
    """Both corpora as one, and the document numbers of train, val and test: the held-out documents, in a seeded random
    order, are half val, half test. Raises ValueError for fewer than two of them.
    """
    if held_out.n_documents < 2:
        raise ValueError(f"corpus.heldout_path: found {held_out.n_documents} document, allowed: 2 or more")
    order_D = torch.randperm(held_out.n_documents, generator=torch.Generator().manual_seed(seed))
    val, test = (order_D + train.n_documents).tensor_split(2)
    starts = torch.cat([train.starts, held_out.starts + train.n_tokens])
    documents = Documents(torch.cat([train.tokens, held_out.tokens]), starts, train.start_id)
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
    prefix = 0 if documents.start_id is None else 1
    first = 0
    while first < order.numel():
        longest = int(rows_n3[order[first], 2]) + prefix
        members = order[first : first + max(1, batch_tokens // longest)]
        ids_BT = torch.zeros(members.numel(), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, member in enumerate(members.tolist()):
            ids = context_ids(documents, rows_n3[member])
            ids_BT[row, : ids.numel()] = ids
            mask_BT[row, : ids.numel()] = 1
        yield members, ids_BT, mask_BT
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
    lengths = torch.tensor([0] + [part.numel() for part in parts[:-1]], dtype=torch.int64)
    return Documents(torch.cat(parts), lengths.cumsum(0), start_id)


def _with_start(ids: list[int], start_id: int | None) -> list[int]:
    return ids if start_id is None or (ids and ids[0] == start_id) else [start_id, *ids]


def _encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every text, without special tokens."""
    iterator = iter(texts)
    while batch := list(islice(iterator, ENCODE_BATCH)):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


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
    stored = (tokens[a:b].tolist() for a, b in zip(starts, [*starts[1:], tokens.numel()], strict=True))
    if tokenizer_sha256 == metadata["tokenizer_sha256"]:
        return (_with_start(ids, start_id) for ids in stored)
    if metadata["tokenizer_sha256"] != sha256_file(PACKAGED_TOKENIZER / "tokenizer.json"):
        raise ValueError(f"corpus.path: {location!r} is for a tokenizer that is neither the model's nor packaged")
    packaged = AutoTokenizer.from_pretrained(str(PACKAGED_TOKENIZER))
    texts = (str(packaged.decode(ids, skip_special_tokens=True)) for ids in stored)
    return (_with_start(ids, start_id) for ids in _encoded(texts, tokenizer))


def _packed_paragraphs(
    paragraphs: Iterator[str], tokenizer: Any, context_length: int, start_id: int | None
) -> Iterator[list[int]]:
    """Documents of consecutive paragraphs: as many as fit into one context, at least one."""
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    document: list[int] = []
    for ids in _encoded(paragraphs, tokenizer):
        if document and len(document) + len(separator) + len(ids) > context_length:
            yield document
            document = []
        document = [*document, *separator, *ids] if document else _with_start(ids, start_id)
    if document:
        yield document


@contextmanager
def _open_text(location: str) -> Iterator[Iterator[str]]:
    """The lines of a text file, unpacked. Raises ValueError for a broken archive, other bytes and endless lines."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(Path(location).suffix, open)(location, "rt", encoding="utf-8") as stream:
            yield _lines(stream, location)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"corpus.path: {location!r}: not readable as UTF-8 text ({error})") from error


def _lines(stream: Any, location: str) -> Iterator[str]:
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"corpus.path: {location!r}: found a line of more than {MAX_LINE} characters")
        yield line


def _paragraphs(location: str) -> Iterator[str]:
    """Blocks of text between blank lines."""
    with _open_text(location) as lines:
        block: list[str] = []
        for line in lines:
            if line.strip():
                block.append(line.rstrip("\n"))
            elif block:
                yield "\n".join(block)
                block = []
        if block:
            yield "\n".join(block)


def _jsonl_texts(location: str, text_field: str) -> Iterator[str]:
    with _open_text(location) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"corpus.path: {location!r} line {number}: not JSON ({error})") from error
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str) or HALF_PAIR.search(text):
                raise ValueError(f"corpus.path: {location!r} line {number}: no text in field {text_field!r}")
            yield text


def _parquet_texts(location: str, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError('corpus.source: parquet needs pyarrow: pip install "polytope-hsae[data]"') from error
    file = parquet.ParquetFile(location)
    if text_field not in file.schema_arrow.names:
        raise ValueError(f"corpus.path: {location!r} has no column {text_field!r}")
    for batch in file.iter_batches(columns=[text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_texts(location: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError('corpus.source: hub needs datasets: pip install "polytope-hsae[data]"') from error
    name, *rest = location.split(":")
    config = rest[0] if len(rest) > 1 else None
    for record in datasets.load_dataset(name, config, split=rest[-1] if rest else "train", streaming=True):
        if not isinstance(record.get(text_field), str):
            raise ValueError(f"corpus.path: dataset {name!r} has no text in field {text_field!r}")
        yield record[text_field]
