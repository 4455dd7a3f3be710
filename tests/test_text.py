"""From files of text to documents of tokens: what a document is, what starts it, and what is text."""

import gzip
import json
import lzma
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from running import hsae, refused
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from polytope_hsae.config import ConfigError, load_config
from polytope_hsae.data.corpus import Documents, contexts, corpus_files, load_documents
from polytope_hsae.lm import LanguageModel
from polytope_hsae.lm.tokens import document_start, plain_ids
from polytope_hsae.phases.sources import source_files

SENTENCES = ["The dog ran.", "The cat sat.", "A bird sang.", "It was <s>late</s> and dark."]
SIZES: dict[str, Any] = {"max_tokens": 1000, "context_length": 64}
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a space is put before a text, and bos before that."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n"], show_progress=False
    )
    backend.train_from_iterator([*SENTENCES, " ".join(SENTENCES)], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """As GPT-2's, but that the line ends after a full stop are one token with it, as Qwen's and Llama 3's are."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["\n\n".join(SENTENCES[:3])] * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def unigram() -> PreTrainedTokenizerFast:
    """Its model has the special tokens as pieces, as SentencePiece's Unigram does."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "as</>"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


GPT2 = {"bos_token": END, "eos_token": END}


def texts(documents: Documents, tokenizer: Any) -> list[str]:
    parts = documents.tokens.split(documents.lengths.tolist())
    prefix = documents.start_id is not None
    return [tokenizer.decode(part[prefix:].tolist()) for part in parts]


def load(source: str, path: Any, tokenizer: Any = None, **options: Any) -> Documents:
    return load_documents(source, path, tokenizer or tiny.tokenizer(), **{**SIZES, **options})


# -- what a document is


@pytest.mark.parametrize("make", [sentencepiece, lambda: byte_level(END, **GPT2)], ids=["sentencepiece", "bpe"])
def test_a_document_is_encoded_whole(tmp_path, make):
    tokenizer, text = make(), "\n\n".join(SENTENCES[:3])
    (tmp_path / "a.txt").write_text(text + "\n")
    start = document_start(tokenizer)
    whole = [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for kind in ("packed", "file"):
        assert load("text", tmp_path / "a.txt", tokenizer, documents=kind).tokens.tolist() == whole
    apart = [i for line in text.split("\n") for i in tokenizer(line or "\n\n", add_special_tokens=False)["input_ids"]]
    assert [start, *apart] != whole  # the seam makes a difference to these tokenizers


@pytest.mark.parametrize("make", [sentencepiece, lambda: byte_level(END, **GPT2)], ids=["sentencepiece", "bpe"])
def test_packed_documents_fit_into_one_context(tmp_path, make):
    tokenizer, context = make(), 40
    blocks = [" ".join(SENTENCES[i % 3] for i in range(n, n + 1 + n % 3)) for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(blocks))
    found = load("text", tmp_path / "a.txt", tokenizer, max_tokens=10**6, context_length=context)
    assert int(found.lengths.max()) <= context
    assert len(contexts(found, torch.arange(found.n_documents), context)) == found.n_documents
    assert found.n_documents < len(blocks) / 1.5
    kept = "\n\n".join(texts(found, tokenizer)), "\n\n".join(blocks)
    assert kept[0].replace(" ", "") == kept[1].replace(" ", "")  # some decoders lose spaces


def test_a_document_is_packed_a_block_a_line_or_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\nw3\n\n \nw4\nw5\n")
    for documents, tokens in {
        "packed": [0, 1, 2, 3, 4, 5],
        "blank": [0, 1, 2, 3, 0, 4, 5],
        "line": [0, 1, 2, 0, 3, 0, 4, 0, 5],
        "file": [0, 1, 2, 3, 4, 5],
    }.items():
        assert load("text", path, documents=documents).tokens.tolist() == tokens, documents


def test_packed_ends_with_a_context_and_file_does_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"w{i} w{i}" for i in range(1, 9)))
    assert load("text", path, context_length=8).lengths.tolist() == [7, 7, 5]
    assert load("text", path, context_length=8, max_tokens=10).lengths.tolist() == [7, 3]
    assert load("text", path, context_length=8, documents="file").lengths.tolist() == [17]


@pytest.mark.parametrize("documents", ["packed", "blank", "file"])
def test_a_document_too_long_to_be_encoded_at_once_is_refused(tmp_path, monkeypatch, documents):
    monkeypatch.setattr("polytope_hsae.data.corpus.MAX_TEXT", 30)
    (tmp_path / "a.txt").write_text("w1 w2\n" * 9)
    with pytest.raises(ValueError, match=r"corpus.documents: found .* of more than 30 characters, allowed: line"):
        load("text", tmp_path / "a.txt", documents=documents)
    assert load("text", tmp_path / "a.txt", documents="line").n_documents == 9


def test_no_more_is_read_than_the_tokens_need(tmp_path, monkeypatch):
    """max_tokens bounds what is read: the broken line at the end is never seen."""
    monkeypatch.setattr("polytope_hsae.data.corpus.ENCODE_CHARACTERS", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"w1 w2 w3 w4\n\n" * 5000 + b"\xff\n")
    for documents in ("packed", "blank", "line"):
        assert load("text", path, documents=documents, max_tokens=50).n_tokens <= 50


# -- what is text


@pytest.mark.parametrize("source", ["text", "jsonl", "hub"])
def test_special_tokens_that_are_spelt_in_a_text_are_text(tmp_path, monkeypatch, source):
    text = f"The dog {END} ran{END}"
    tokenizer = byte_level(END, **GPT2)
    path = tmp_path / "a"
    if source == "hub":
        hub(monkeypatch, [{"text": text}])
    else:
        path.write_text(text if source == "text" else json.dumps({"text": text}))
    found = load(source, "me/words" if source == "hub" else path, tokenizer, max_tokens=len(text))
    first = found.tokens[: int(found.lengths[0])].tolist()
    assert first[0] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in first[1:]
    assert tokenizer.decode(first[1:]) == text


def test_no_kind_of_tokenizer_makes_a_special_token_of_text():
    pieces = unigram()
    assert pieces.eos_token_id in pieces("a </s> a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for tokenizer, text in ((pieces, "a </s> a<s>"), (sentencepiece(), "A </s> <s>"), (ByT5Tokenizer(), "a </s> a")):
        (ids,) = plain_ids(tokenizer, [text])
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
        assert len(ids) > 4
    backend = sentencepiece()
    assert plain_ids(backend, ["A bird"])[0] == backend("A bird", add_special_tokens=False)["input_ids"]
    other = byte_level(END, **GPT2)
    other.add_tokens(["<think>"])  # added, but not special: it keeps its token
    assert other.convert_tokens_to_ids("<think>") in plain_ids(other, ["a <think> b"])[0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "\ufeffw1 w2\n\nw3"
    record = "\ufeff" + json.dumps({"text": "w1 w2"})
    tokenizer = byte_level(END, **GPT2)
    for ending, pack in (("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)):
        for source, content, first in (("text", text, "w1 w2\n\nw3"), ("jsonl", record, "w1 w2")):
            path = tmp_path / f"a.{source}{ending}"
            path.write_bytes(pack(content.encode()))
            assert texts(load(source, path, tokenizer), tokenizer) == [first]


# -- rows and fields


def hub(monkeypatch: Any, rows: Any) -> list[tuple[Any, ...]]:
    """A hub that answers with these rows; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        asked.append((name, config, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def rows_of(source: str, rows: list[dict[str, Any]], folder: Path, monkeypatch: Any) -> Any:
    """A corpus of these rows."""
    if source == "hub":
        hub(monkeypatch, rows)
        return "me/words"
    path = folder / f"a.{source}"
    if source == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hub"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, monkeypatch, source):
    rows = [{"body": "w1 w2"}, {"body": None}, {"body": "w3", "n": 1}, *([{"n": 3}] if source != "parquet" else [])]
    path = rows_of(source, rows, tmp_path, monkeypatch)
    found = load(source, path, text_field="body")
    assert found.tokens.tolist() == [0, 1, 2, 0, 3]
    assert found.skipped == len(rows) - 2
    with pytest.raises(ValueError, match=r"^corpus.text_field: found 'text', which .*, allowed: body, n$"):
        load(source, path)


def test_a_field_is_not_sought_for_ever_and_a_hub_name_has_parts(monkeypatch):
    monkeypatch.setattr("polytope_hsae.data.corpus.MAX_FIELDLESS", 100)
    seen = []
    asked = hub(monkeypatch, (seen.append(1) or {"content": "w1"} for _ in range(10**6)))
    for name in ("me/words", "me/words:validation", "me/words:small:test"):
        with pytest.raises(ValueError, match="none of the 100 rows read"):
            load("hub", name)
    assert len(seen) <= 3 * 101
    assert asked == [("me/words", None, "train"), ("me/words", None, "validation"), ("me/words", "small", "test")]


# -- which files


def test_folders_patterns_and_home_are_read_in_order(tmp_path, monkeypatch):
    for name, text in {"b.txt": "w3", "a.txt": "w1\n\nw2", "c.md": "w9", "d/e.txt": "w4", ".h.txt": "w9"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"w5"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, tokens in {
        tmp_path: [0, 1, 2, 0, 3, 0, 5],  # a document never spans files
        f"{tmp_path}/*.txt": [0, 1, 2, 0, 3],
        f"{tmp_path}/**/*.txt": [0, 1, 2, 0, 3, 0, 4],
        "~/a.txt": [0, 1, 2],
        "~": [0, 1, 2, 0, 3, 0, 5],
    }.items():
        assert load("text", path).tokens.tolist() == tokens, path
    assert corpus_files("hub", "me/words") == []
    for path, words in (("~/*.csv", "no such file"), (tmp_path / "d", "no file that ends in .jsonl or .jsonl.xz")):
        with pytest.raises(ValueError, match=f"corpus.path: .*{words}"):
            load("jsonl", path)


def test_every_file_counts_for_what_a_phase_was_made_from(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("w1")
    config = load_config("smoke", ["corpus.source=text", f"corpus.path={tmp_path}", f"corpus.heldout_path={tmp_path}"])
    before = source_files(config)
    assert set(before) == {"corpus.path", "corpus.heldout_path"}
    (tmp_path / "b.txt").write_text("w2")
    after = source_files(config)
    assert all(before[field] != after[field] for field in before)


def test_the_ending_of_a_path_says_its_source():
    for path, source in {
        "a.txt": "text", "a.txt.xz": "text", "d/*.txt.gz": "text", "a.jsonl": "jsonl", "a.jsonl.gz": "jsonl",
        "a.parquet": "parquet", "a.safetensors": "tokens",
    }.items():  # fmt: skip
        assert load_config("smoke", [f"corpus.path={path}"]).corpus.kind == source
    assert load_config("smoke", ["corpus.path=a.txt", "corpus.source=jsonl"]).corpus.kind == "jsonl"
    assert load_config("smoke").corpus.kind == "tokens"
    for path in ("my.csv", "monology/pile", "folder"):
        with pytest.raises(ConfigError, match=rf"^corpus.*source: found null with the path '{path}', allowed: a path "):
            load_config("smoke", [f"corpus.path={path}"])
    with pytest.raises(ConfigError, match=r"^corpus.*documents: found line, allowed: packed with source jsonl"):
        load_config("smoke", ["corpus.path=a.jsonl", "corpus.documents=line"])


# -- what starts a document


STARTS = {
    "llama": (sentencepiece, "<s>"),
    "gpt2": (lambda: byte_level(END, **GPT2), END),
    "qwen": (lambda: byte_level(END, TURN, TURN_END, eos_token=TURN_END, pad_token=END), END),
    "smollm2": (lambda: byte_level(END, TURN, TURN_END, bos_token=TURN, eos_token=TURN_END), END),
    "bos": (lambda: byte_level("<b>", "<e>", bos_token="<b>", eos_token="<e>"), "<b>"),
    "eos": (lambda: byte_level("<e>", eos_token="<e>"), "<e>"),
    "none": (byte_level, None),
    "packaged": (tiny.packaged_tokenizer, END),
}


@pytest.mark.parametrize("kind", STARTS)
def test_plain_text_starts_as_in_training(kind):
    make, token = STARTS[kind]
    tokenizer = make()
    assert document_start(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))


def test_an_encoder_starts_with_cls():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    assert document_start(PreTrainedTokenizerFast(tokenizer_object=backend, **named)) == 1
    special = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    assert document_start(PreTrainedTokenizerFast(tokenizer_object=backend, **named)) == 1


def test_another_start_can_be_chosen(tmp_path):
    tokenizer = byte_level(END, TURN, TURN_END, bos_token=TURN, eos_token=TURN_END)
    (tmp_path / "a.txt").write_text("The dog")
    plain = plain_ids(tokenizer, ["The dog"])[0]
    for choice, token in {"auto": END, "none": None, "bos": TURN, "eos": TURN_END, END: END, TURN: TURN}.items():
        start = None if token is None else tokenizer.convert_tokens_to_ids(token)
        found = load("text", tmp_path / "a.txt", tokenizer, start=choice)
        assert (found.start_id, found.tokens.tolist()) == (start, plain if start is None else [start, *plain])
    for choice in ("<nope>", "bos"):
        with pytest.raises(ValueError, match=rf"^corpus.document_start: found '{choice}', allowed: auto, none, bos"):
            document_start(byte_level(END), choice)
    refused(hsae("concepts", "smoke", "--set", "corpus.document_start=nope"), "corpus.document_start: found 'nope'")


def test_a_text_that_spells_the_start_gets_one_too(tmp_path):
    """tiny.tokenizer makes its start token of all that it does not know; no text may do without one."""
    (tmp_path / "a.txt").write_text("unknown w1")
    assert load("text", tmp_path / "a.txt").tokens.tolist() == [0, 0, 1]


# -- a language model's text and words


def test_a_language_model_reads_its_start_once():
    for tokenizer in (sentencepiece(), tiny.tokenizer(), byte_level(END, **GPT2)):
        lm = LanguageModel(tiny.model("llama"), tokenizer, name="tiny", has_head=True)
        ids = lm.token_ids("The dog ran.")
        assert ids.dtype == torch.int64
        assert ids.tolist() == [[document_start(tokenizer), *plain_ids(tokenizer, ["The dog ran."])[0]]]
        assert lm.token_ids("The dog ran.", start="none").tolist() == [ids[0, 1:].tolist()]


def test_the_token_of_a_word_is_that_after_a_space():
    lm = LanguageModel(tiny.model("llama"), tiny.tokenizer(), name="tiny", has_head=True)
    assert [lm.token_id(word) for word in ("w3", "w5")] == [3, 5]
    lm.tokenizer = tiny.packaged_tokenizer()
    assert lm.tokenizer.decode([lm.token_id("dog")]) == " dog"
    with pytest.raises(ValueError, match=r"word: found 'dog w', .* tokens of tiny, allowed: a word of one token"):
        lm.token_id("dog w")
