"""Text as token ids, the same way for every tokenizer, and the token that starts a document."""

import re
from collections.abc import Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text. Nothing is put around it, and a special token that is spelt in it is its letters."""
    ids = _ids(tokenizer, texts)
    added = tokenizer.added_tokens_decoder.items()
    spelt = {i: token.content for i, token in added if token.special and len(token.content) > 1}
    spelt.pop(tokenizer.unk_token_id, None)  # stands for what the vocabulary lacks
    for row, text in enumerate(texts):
        if not spelt.keys().isdisjoint(ids[row]):  # the model itself has that piece, as SentencePiece's Unigram does
            ids[row] = [token for part in _cut_inside(text, spelt.values()) for token in _ids(tokenizer, [part])[0]]
    return ids


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids


def _cut_inside(text: str, spellings: Any) -> list[str]:
    """The text in parts, cut after the first character of each of these spellings."""
    places = (f"(?<={re.escape(spelt[0])})(?={re.escape(spelt[1:])})" for spelt in spellings)
    return re.split("|".join(places), text)


def document_start(tokenizer: Any, choice: str = "auto") -> int | None:
    """The token that starts a document, None for none.

    auto: what the tokenizer itself puts before plain text (Llama's bos, BERT's cls); else `<|endoftext|>`, which stood
    between the documents that models with it were trained on, also where a chat model's bos or eos ends a turn; else
    bos, cls or eos. Any other `choice`: none, bos, eos or a token's text. Raises ValueError for a token that the
    tokenizer does not have.
    """
    if choice == "none":
        return None
    vocabulary = tokenizer.get_vocab()
    if choice == "auto":
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        if whole[: len(plain)] != plain:
            return int(whole[0])
        known = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)
        return vocabulary.get(END_OF_TEXT, next((token for token in known if token is not None), None))
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    found: int | None = named[choice] if choice in named else vocabulary.get(choice)
    if found is None:
        allowed = "auto, none, bos, eos or the text of a token, as far as the tokenizer has them"
        raise ValueError(f"corpus.document_start: found {choice!r}, allowed: {allowed}")
    return found


def with_start(ids: list[int], start_id: int | None) -> list[int]:
    """A document's tokens after its start token."""
    return ids if start_id is None else [start_id, *ids]


def space_before(tokenizer: Any) -> str:
    """What to put before a word: SentencePiece puts a space there itself, and a second one is a token of its own."""
    first = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, ["a"])[0])[:1]
    return "" if first and first[0].startswith("\u2581") else " "
