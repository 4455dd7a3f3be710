"""Concepts from a tiny file and a tiny tokenizer, from WordNet, and for the packaged model's tokenizer."""

import json
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from tiny import packaged_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from polytope_hsae.config import ConceptsConfig
from polytope_hsae.data.concepts import FOLDS, Concepts, build_concepts, split_words
from polytope_hsae.data.ontology import select_parents
from polytope_hsae.data.wordnet import WordNet, load_wordnet, word_forms
from polytope_hsae.data.words import word_tokens

ANIMALS = {
    "bird": ["robin", "goose", "crow"],
    "mammal": ["dog", "mouse", "fox", "horse"],
    "fish": ["trout", "carp", "pike"],
}
TREE = {
    "animal": ANIMALS,
    "small": {"one": ["cup", "glass", "glasses"], "two": ["pan", "pot", "lid"]},
    "tool": {
        "cutter": ["knife", "saw", "axe"],
        "driver": ["hammer", "mallet", "wrench", "unknown"],
        "holder": ["clamp", "vice", "city", "box", "table"],
        "thin": ["unseen", "unheard", "file"],
    },
}
WORDS = [word for children in TREE.values() for words in children.values() for word in words if "un" not in word[:2]]
FORMS = ["Dog", "dogs", "Dogs", "geese", "Geese", "mice", "foxes", "knives", "Cities", "boxes", "tables"]


def word_level(forms: list[str]) -> PreTrainedTokenizerFast:
    vocab = {text: i for i, text in enumerate(["<unk>", "</s>", "a", *forms])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_level(WORDS + FORMS)


@pytest.fixture
def ontology(tmp_path: Path) -> Path:
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(TREE))
    return path


def build(tokenizer: PreTrainedTokenizerBase, ontology: Path | str, seed: int = 0, **changes: object) -> Concepts:
    limits = {"max_parents": 10, "max_children_per_parent": 10}
    return build_concepts(tokenizer, ConceptsConfig(ontology=str(ontology), **{**limits, **changes}), seed)


def texts_of(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, list[int]]) -> dict[str, list[str]]:
    return {word: tokenizer.convert_ids_to_tokens(ids) for word, ids in tokens.items()}


def test_known_tree(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology)
    # `small` has two children; `thin` has one word in the vocabulary; most words first
    assert [(p.name, p.synset, [c.name for c in p.children]) for p in concepts.parents] == [
        ("tool", None, ["holder", "cutter", "driver"]),
        ("animal", None, ["mammal", "bird", "fish"]),
    ]
    assert (concepts.n_parents, concepts.n_children, concepts.child_parent_R) == (2, 6, [0, 0, 0, 1, 1, 1])
    texts = texts_of(tokenizer, {word: ids for child in concepts.children for word, ids in child.tokens.items()})
    for forms in ("dog Dog dogs Dogs", "goose geese Geese", "mouse mice", "knife knives", "city Cities", "box boxes"):
        assert texts[forms.split()[0]] == forms.split()
    assert "unknown" not in texts


def test_limits_keep_the_largest(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    wide = build(tokenizer, ontology, min_children=2, max_children_per_parent=2)
    largest = [("tool", ["holder", "cutter"]), ("animal", ["mammal", "bird"]), ("small", ["one", "two"])]
    assert [(p.name, [c.name for c in p.children]) for p in wide.parents] == largest
    # a parent keeps its folds when another one goes
    assert (
        build(tokenizer, ontology, min_children=2, max_children_per_parent=2, max_parents=2).parents
        == (wide.parents[:2])
    )
    with pytest.raises(ValueError, match=r"concepts.max_children_per_parent: found 2, allowed 3 or more"):
        build(tokenizer, ontology, max_children_per_parent=2)


def test_tokens_by_row_and_fold(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts, size = build(tokenizer, ontology), len(tokenizer)
    rows_V = concepts.token_to_child(size)
    assert (rows_V.dtype, rows_V.shape) == (torch.int32, (size,))
    for row, tokens in enumerate(concepts.child_tokens()):
        assert tokens == sorted(tokens) == torch.nonzero(rows_V == row).flatten().tolist()
    dog = tokenizer(" dog Dog dogs Dogs", add_special_tokens=False)["input_ids"]
    assert rows_V[dog].tolist() == [3] * 4
    of_folds = torch.stack([concepts.token_to_child(size, (fold,)) for fold in FOLDS])
    assert torch.equal((of_folds >= 0).sum(0), (rows_V >= 0).long())  # every token is in one fold
    assert torch.equal(of_folds.amax(0), rows_V)
    assert len({tuple(column) for column in (of_folds[:, dog] >= 0).T.tolist()}) == 1  # all forms in the same one
    with pytest.raises(ValueError, match=r"found token \d+, allowed 0 to 4$"):
        concepts.token_to_child(5)


def test_a_shared_token_goes_to_the_word_itself() -> None:
    tokenizer = word_level(["glass", "glasses", "Glass", "leaves", "leaf", "leave"])
    tokens = word_tokens(tokenizer, ["leave", "glass", "leaf", "glasses"])
    # `leaves` is a plural of both `leaf` and `leave`: the first in alphabetical order has it
    expected = {"glass": ["glass", "Glass"], "glasses": ["glasses"], "leaf": ["leaf", "leaves"], "leave": ["leave"]}
    assert texts_of(tokenizer, tokens) == expected
    assert word_tokens(tokenizer, ["nothing"]) == {}


def test_word_forms() -> None:
    assert word_forms("fox") == [(0, "fox"), (1, "Fox"), (2, "foxes"), (3, "Foxes")]
    assert [form for _, form in word_forms("Monday")] == ["Monday", "Mondays"]
    assert {"fireman", "firemen", "Firemen"} <= {form for _, form in word_forms("fireman")}
    assert (2, "cities") in word_forms("city")
    assert (2, "days") in word_forms("day")
    assert [form for _, form in word_forms("doe")] == ["doe", "Doe"]  # `does` is a function word


@pytest.mark.parametrize(
    "forms",
    [
        "jump jumps jumping jumped", "run runs running ran", "hope hopes hoping hoped", "try tries trying tried",
        "hop hops hopping hopped",  # an irregular form takes the regular one's place: `hoped` and `hoping` are hope's
        "tie ties tying tied", "see sees seeing saw seen", "go goes going went gone",
    ],
)  # fmt: skip
def test_verb_forms(forms: str) -> None:
    found = word_forms(forms.split()[0], "verb")
    assert {form for _, form in found if form[0].islower()} == set(forms.split())
    assert found[1] == (1, forms.split()[0].capitalize())


def test_words_of_a_file_inflect_as_asked(tmp_path: Path) -> None:
    tokenizer = word_level(["run", "running", "runs", "jump", "jumped", "hop", "sing", "sang", "hum", "call", "go"])
    path = tmp_path / "verbs.yaml"
    path.write_text("act: {move: [run, jump, hop], sound: [sing, hum, call]}")
    verbs = build(tokenizer, path, min_children=2, parts_of_speech=["verb"])
    texts = texts_of(tokenizer, {word: ids for child in verbs.children for word, ids in child.tokens.items()})
    assert (texts["run"], texts["sing"]) == (["run", "running", "runs"], ["sing", "sang"])
    nouns = build(tokenizer, path, min_children=2)
    assert nouns.children[0].tokens["run"] == tokenizer.convert_tokens_to_ids(["run", "runs"])


def test_byte_level_and_sentencepiece_spaces() -> None:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "d"), ("Ġd", "o"), ("Ġdo", "g"), ("Ġdog", "s"), ("c", "a"), ("ca", "t")]
    vocab = [*pieces, *(first + second for first, second in merges)]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    # `cat` is a token, but not after a space
    assert texts_of(tokenizer, word_tokens(tokenizer, ["cat", "dog"])) == {"dog": ["Ġdog", "Ġdogs"]}

    unigram = Tokenizer(models.Unigram([(p, -1.0) for p in ("<unk>", "▁a", "▁dog", "▁dogs", "cat", "▁")], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    assert word_tokens(tokenizer, ["cat", "dog"]) == {"dog": [2, 3]}


@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 3), (3, 40), (5, 4, 3, 3, 20), (7,) * 9, (3,) * 30])
@pytest.mark.parametrize("split", [(0.70, 0.15, 0.15), (0.4, 0.3, 0.3), (0.8, 0.15, 0.05)])
def test_fold_guarantees(sizes: tuple[int, ...], split: tuple[float, float, float]) -> None:
    children = [[f"w{row}_{i}" for i in range(size)] for row, size in enumerate(sizes)]
    folds = split_words(children, split, (0, 1))
    for words, fold in zip(children, folds, strict=True):
        assert sorted(word for name in FOLDS for word in fold[name]) == sorted(words)
        assert len(fold["train"]) >= 2
    n_val, n_test = (sum(len(fold[name]) for fold in folds) for name in ("val", "test"))
    assert n_val >= 1
    assert n_test >= 1
    n_words, n_free = sum(sizes), sum(sizes) - 2 * len(sizes)
    if (split[1] + split[2]) * n_words + 1 <= n_free:
        assert abs(n_val - split[1] * n_words) <= 0.5 or n_val == 1
        assert abs(n_test - split[2] * n_words) <= 0.5 or n_test == 1


def test_folds_follow_the_seed_and_large_children_share_them() -> None:
    children = [[f"a{i}" for i in range(40)], [f"b{i}" for i in range(40)]]
    one, same, other = (split_words(children, (0.7, 0.15, 0.15), (seed, 7)) for seed in (0, 0, 1))
    assert one == same != other
    assert split_words([words[::-1] for words in children], (0.7, 0.15, 0.15), (0, 7)) == one
    assert all(abs(len(fold["val"]) - 6) <= 1 and abs(len(fold["test"]) - 6) <= 1 for fold in one)


def test_same_bytes_and_round_trip(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology)
    text = json.dumps(concepts.to_json())
    assert text == json.dumps(build(tokenizer, ontology).to_json())
    assert Concepts.from_json(json.loads(text)) == concepts
    folds = [child.words for child in concepts.children]
    assert any(folds != [child.words for child in build(tokenizer, ontology, seed).children] for seed in (1, 2, 3))


GROUPED = {"living": {"animal": ANIMALS}, "made": {"by hand": {"small": TREE["small"], "tool": TREE["tool"]}}}


@pytest.mark.parametrize("content", [yaml.safe_dump(TREE, sort_keys=False), json.dumps(GROUPED)])
def test_yaml_and_names_above_the_parents_give_the_same_tree(
    tokenizer: PreTrainedTokenizerFast, ontology: Path, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text("\ufeff" + content)  # a byte-order mark is no text
    assert build(tokenizer, path) == build(tokenizer, ontology)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "found list, allowed a mapping of parents by name"),
        ('{"p": ["a"]}', "p: found list, allowed a mapping of children by name"),
        ('{"p": {"c": "dog"}}', "p / c: found 'dog', allowed a list of words"),
        ('{"p": {"c": ["dog", 3]}}', r"p / c: found \['dog', 3\], allowed a list of words"),
        ('{"p": {"c": ["dog"], "d": ["dog"]}}', "'dog' is in p / c and in p / d; one place is allowed"),
        ('{"p": {"c": ["dog", "dog"]}}', "'dog' is in p / c and in p / c; one place is allowed"),
        ('{"p": {"c": ["dog"]}, "q": {"d": ["Dog"]}}', "'Dog' is in p / c as 'dog' and in q / d; one place"),
        ('{"p": {"c": ["dog"], "d": {"e": ["fox"]}}}', "p: found words beside mappings, allowed: lists of words"),
        ('{"g": {"p": {"c": ["dog"]}}, "p": {"d": ["fox"]}}', "found the parent 'p' twice, allowed: one place"),
        ('{"g": {"p": {"c": "dog"}}}', "p / c: found 'dog', allowed a list of words"),
        ('{"a": ' * 9 + "[]" + "}" * 9, "a: found more than 8 levels of names"),
        ('{"p": ', "cannot be parsed: Expecting value"),
        ("p: {c: [dog\nq: 1", "cannot be parsed"),
        ("1: {c: [dog]}", "found keys that are not text, allowed a mapping of parents"),
        ('{"p": {"c": ["dog", "fox", "crow"]}}', r"found 0 parents with 3 or more children .*\(3 words do\)"),
        ("{}", r"found 0 parents .*, allowed 1 or more"),
        ("", "found NoneType, allowed a mapping of parents by name"),
        ("p: {c: [dog]}\np: {c: [fox]}", "cannot be parsed: line 2: found the key 'p' twice"),
        ("p: {c: [no, 1.5, 2001-01-01]}", r"p / c: found \[False, 1.5, '2001-01-01'\], allowed a list of words"),
        ('p: {c: ["\\ud800"]}', "surrogates not allowed"),
        ("[" * 100_000, "cannot be parsed: it is nested too deeply"),
        ('{"p": {}, "p": {}}', "cannot be parsed: the key 'p' appears twice"),
        ('{"p": {"c": [NaN]}}', "cannot be parsed: NaN is not a number in JSON"),
        (None, "is not a file; allowed: wordnet, or a JSON or YAML file"),
    ],
)
def test_bad_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / ("tree.json" if content and content[0] in "[{" else "tree.yaml")
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        build(tokenizer, path)
    assert str(error.value).startswith("concepts.ontology: ")
    assert "\n" not in str(error.value)


def test_bad_json(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    obj = build(tokenizer, ontology).to_json()
    first = obj["parents"][0]["children"][0]
    obj["parents"][1]["children"][0]["tokens"]["dog"] += first["tokens"]["city"]
    with pytest.raises(ValueError, match=r"token \d+ is in tool / holder / city and in animal / mammal / dog;"):
        Concepts.from_json(obj)
    first["words"]["train"].pop()
    with pytest.raises(ValueError, match="tool / holder: found 4 words in folds and 5 with tokens"):
        Concepts.from_json(obj)


def test_wordnet_facts() -> None:
    wordnet = load_wordnet("noun")
    assert len(wordnet.lemmas) == 82115
    assert wordnet.hypernyms["dog.n.01"] == ("canine.n.02", "domestic_animal.n.01")
    assert wordnet.lemmas["dog.n.01"] == ("dog", "domestic_dog", "Canis_familiaris")
    assert "dog.n.01" in wordnet.children["canine.n.02"]
    assert wordnet.hypernyms["entity.n.01"] == ()
    first = {"dog": "dog.n.01", "domestic_dog": "dog.n.01", "canine": "canine.n.01"}
    assert {word: wordnet.first_sense[word] for word in first} == first
    assert wordnet.irregular_forms["goose"] == ("geese",)
    # France is an instance of a country, not a kind of one
    assert wordnet.instance_hypernyms["france.n.01"] == ("european_country.n.01",)
    verbs = load_wordnet("verb")
    assert len(verbs.lemmas) == 13767
    assert verbs.hypernyms["sprint.v.01"] == ("run.v.01",)
    assert "walk.v.01" in verbs.children["travel.v.01"]
    assert verbs.irregular_forms["go"] == ("gone", "went")
    notice = resources.files("polytope_hsae.data").joinpath("WORDNET_LICENSE.txt").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice


def tiny_wordnet(b3: int = 12) -> WordNet:
    """root > a > a1..a4; root > b > b1..b3; root > top > mid, side1, side2; mid > m1..m3; x in both."""
    above = {"root": (), "a": ("root",), "b": ("root",), "top": ("root",), "mid": ("top",)}
    above |= {f"a{i}": ("a",) for i in range(1, 5)} | {f"b{i}": ("b",) for i in range(1, 4)}
    above |= {"side1": ("top",), "side2": ("top",)} | {f"m{i}": ("mid",) for i in range(1, 4)}
    above |= {"x1": ("a1",), "x": ("x1", "mid"), "rest": ("root",)}
    sizes = {**dict.fromkeys(above, 0), **{leaf: 3 for leaf in above if leaf[-1].isdigit() and leaf != "x1"}}
    sizes |= {"x": 1, "a4": 2, "b3": b3, "rest": 1000}
    words = {f"{synset}_{i}": synset for synset, size in sizes.items() for i in range(size)}
    return WordNet(
        hypernyms=above,
        children={s: tuple(c for c in above if s in above[c]) for s in above},
        instance_hypernyms={},
        lemmas={s: tuple(w for w in words if words[w] == s) for s in above},
        first_sense=words,
        irregular_forms={},
    )


@pytest.mark.parametrize("kind", ["known", "one child and crumbs", "synsets above each other"])
def test_selection_on_a_known_graph(kind: str) -> None:
    wordnet = tiny_wordnet(b3=15 if kind == "one child and crumbs" else 12)
    if kind == "synsets above each other":
        wordnet = replace(wordnet, hypernyms={**wordnet.hypernyms, "a1": ("a", "x1")})
    chosen = select_parents(wordnet, wordnet.first_sense, min_children=3, min_words_per_child=3)
    # `root` is too large; `b3` has at most two thirds of b's words, or with 15 words more than 70 %
    assert list(chosen) == (["a", "top"] if kind == "one child and crumbs" else ["a", "b", "top"])
    if kind == "known":
        # `a4` has too few words; `top` takes the place of `mid`, as it holds no other candidate; `x_0` is two steps
        # below `top` and three below `a`.
        assert chosen["a"] == {f"a{i}": [f"a{i}_{n}" for n in range(3)] for i in (1, 2, 3)}
        assert {child: len(words) for child, words in chosen["b"].items()} == {"b1": 3, "b2": 3, "b3": 12}
        assert chosen["top"]["mid"] == [*(f"m{j}_{i}" for j in (1, 2, 3) for i in range(3)), "x_0"]
        assert [*chosen["top"]] == ["mid", "side1", "side2"]


def test_packaged_tokenizer() -> None:
    concepts = build(packaged_tokenizer(), "wordnet", max_parents=80, max_children_per_parent=32)
    assert concepts.n_parents >= 50
    wordnet = load_wordnet("noun")
    for parent in concepts.parents:
        assert len(parent.children) >= 3
        assert all(parent.synset in wordnet.hypernyms[str(child.synset)] for child in parent.children)
        assert all(len(child.tokens) >= 3 and len(child.words["train"]) >= 2 for child in parent.children)
        assert all(any(child.words[fold] for child in parent.children) for fold in ("val", "test"))
    used = Counter(word for child in concepts.children for word in child.tokens)
    assert max(used.values()) == 1
    shares = [sum(len(child.words[fold]) for child in concepts.children) for fold in FOLDS]
    assert abs(shares[0] / sum(shares) - 0.70) < 0.02
    assert abs(shares[1] - shares[2]) <= 2
    place = next(p for p in concepts.parents for child in p.children if "dog" in child.tokens)
    assert place.synset == "vertebrate.n.01"


def test_nouns_and_verbs_of_the_packaged_tokenizer() -> None:
    def parents(*parts: str) -> dict[str, set[str]]:
        limits = {"max_parents": 200, "max_children_per_parent": 32}
        made = build(packaged_tokenizer(), "wordnet", **limits, parts_of_speech=list(parts))
        return {str(p.synset): {word for child in p.children for word in child.tokens} for p in made.parents}

    nouns, verbs, both, turned = (parents(*p) for p in (["noun"], ["verb"], ["noun", "verb"], ["verb", "noun"]))
    assert len(verbs) >= 10
    assert {synset.split(".")[-2] for synset in verbs} == {"v"}
    assert both.items() >= nouns.items()  # verbs get what nouns leave, and the other way round
    assert turned.items() >= verbs.items()
    assert {synset.split(".")[-2] for synset in both} == {"n", "v"}
    words = [word.lower() for listed in both.values() for word in listed]
    assert len(words) == len(set(words))
