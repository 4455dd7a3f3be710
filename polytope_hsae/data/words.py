"""Words and their tokens: which forms of a word are one token, and who gets a token that two words share."""

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from polytope_hsae.data.wordnet import PartOfSpeech, WordNet, load_wordnet, single_words, word_forms
from polytope_hsae.data.wordnet_nltk import load_nltk_wordnet, nltk_is_there
from polytope_hsae.lm.tokens import plain_ids, space_before

Claim = tuple[int, str, str]  # rank of the form, word, form
Source = str  # embedded, nltk or auto


def load_graphs(
    parts: Sequence[PartOfSpeech], source: Source = "embedded", nltk_data: str | None = None
) -> dict[PartOfSpeech, WordNet]:
    """The graph of every part of speech, packaged or from nltk; `auto` is nltk where it and its data are there.

    Raises ValueError when `source` is nltk and that is missing or broken.
    """
    if uses_nltk(source, nltk_data):
        return {part: load_nltk_wordnet(part, nltk_data) for part in parts}
    return {part: load_wordnet(part) for part in parts}


def uses_nltk(source: Source, nltk_data: str | None) -> bool:
    """Whether `load_graphs` asks nltk."""
    return source == "nltk" or (source == "auto" and nltk_is_there(nltk_data))


def graph_tokens(
    tokenizer: PreTrainedTokenizerBase, graphs: Mapping[PartOfSpeech, WordNet]
) -> dict[PartOfSpeech, dict[str, list[int]]]:
    """Per part of speech, its words with their tokens. A word or a token that two parts share goes to the first.

    Most verbs of English are nouns, too, and a token alone does not say which: with nouns first, only the other verbs
    are left.
    """
    found: dict[PartOfSpeech, dict[str, list[int]]] = {}
    taken_words: set[str] = set()
    taken_tokens: set[int] = set()
    for part, graph in graphs.items():
        tokens = word_tokens(tokenizer, [w for w in single_words(graph) if w.lower() not in taken_words], part)
        free = {word: [token for token in ids if token not in taken_tokens] for word, ids in tokens.items()}
        found[part] = {word: ids for word, ids in free.items() if ids}
        taken_words.update(word.lower() for word in found[part])
        taken_tokens.update(token for ids in found[part].values() for token in ids)
    return found


def word_tokens(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], part: PartOfSpeech = "noun"
) -> dict[str, list[int]]:
    """Word -> ids of its forms that are one token after a space, by form; words without any are left out.

    A token that two words share (`glasses`: a word, and the plural of another) goes to the word whose form
    ranks first, then to the first in alphabetical order.
    """
    owner = {token: claims[0] for token, claims in token_claims(tokenizer, words, part).items()}
    tokens: dict[str, list[int]] = {}
    for token, (_, word, _) in sorted(owner.items(), key=lambda item: (item[1], item[0])):
        tokens.setdefault(word, []).append(token)
    return tokens


def token_claims(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], part: PartOfSpeech = "noun"
) -> dict[int, list[Claim]]:
    """Token -> the forms of these words that it is, after a space, the best claim first."""
    # No token has the text of most forms: looking there first saves most of the encoding.
    texts = {text.lstrip("\u2581\u0120").removesuffix("</w>").lower() for text in tokenizer.get_vocab()}
    forms = [
        (rank, word, form)
        for word in words
        for rank, form in word_forms(word, part)
        if not form.isascii() or form.lower() in texts
    ]
    if not forms:
        return {}
    space = space_before(tokenizer)
    encoded = plain_ids(tokenizer, [space + form for _, _, form in forms])
    special = set(tokenizer.all_special_ids)
    claims: dict[int, list[Claim]] = {}
    for form, ids in zip(forms, encoded, strict=True):
        if len(ids) == 1 and ids[0] not in special:
            claims.setdefault(ids[0], []).append(form)
    return {token: sorted(claimed) for token, claimed in claims.items()}
