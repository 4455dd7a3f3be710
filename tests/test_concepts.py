"""Concepts from a tiny file and a tiny tokenizer, from WordNet, and for the packaged model's tokenizer."""

import json
from collections import Counter
from dataclasses import replace
from importlib import resources
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from polytope_hsae.data.concepts import FOLDS, Concepts, build_concepts, format_tree, split_words
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


def build(tokenizer: PreTrainedTokenizerBase, ontology: Path | str, **changes: object) -> Concepts:
    fields: dict[str, object] = {"max_parents": 10, "max_children_per_parent": 10, **changes}
    return build_concepts(tokenizer, ontology, **fields)  # type: ignore[arg-type]


def test_known_tree(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology)
    # `small` has two children; `thin` has one word in the vocabulary; most words first
    assert [(p.name, p.synset, [c.name for c in p.children]) for p in concepts.parents] == [
        ("tool", None, ["holder", "cutter", "driver"]),
        ("animal", None, ["mammal", "bird", "fish"]),
    ]
    assert (concepts.n_parents, concepts.n_children, concepts.child_parent_R) == (2, 6, [0, 0, 0, 1, 1, 1])
    texts = {
        word: tokenizer.convert_ids_to_tokens(ids) for child in concepts.children for word, ids in child.tokens.items()
    }
    assert texts["dog"] == ["dog", "Dog", "dogs", "Dogs"]
    assert texts["goose"] == ["goose", "geese", "Geese"]
    assert texts["mouse"] == ["mouse", "mice"]
    assert texts["knife"] == ["knife", "knives"]
    assert texts["city"] == ["city", "Cities"]
    assert texts["box"] == ["box", "boxes"]
    assert "unknown" not in texts


def test_limits_keep_the_largest(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology, max_parents=1, max_children_per_parent=3)
    assert [(p.name, len(p.children)) for p in concepts.parents] == [("tool", 3)]
    wide = build(tokenizer, ontology, min_children=2, max_children_per_parent=2)
    assert [(p.name, [c.name for c in p.children]) for p in wide.parents] == [
        ("tool", ["holder", "cutter"]),
        ("animal", ["mammal", "bird"]),
        ("small", ["one", "two"]),
    ]


def test_tokens_by_row_and_fold(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology)
    size = len(tokenizer)
    rows_V, folds_V = concepts.token_to_child(size), concepts.token_fold(size)
    assert rows_V.dtype == torch.int32
    assert folds_V.dtype == torch.int8
    assert rows_V.shape == folds_V.shape == (size,)
    for row, tokens in enumerate(concepts.child_tokens()):
        assert tokens == sorted(tokens) == torch.nonzero(rows_V == row).flatten().tolist()
    assert torch.equal(rows_V >= 0, folds_V >= 0)
    assert int((rows_V < 0).sum()) > 0
    dog = tokenizer(" dog Dog dogs Dogs", add_special_tokens=False)["input_ids"]
    assert rows_V[dog].tolist() == [3] * 4
    assert len(set(folds_V[dog].tolist())) == 1
    train_V = concepts.token_to_child(size, ("train",))
    assert torch.equal(train_V, torch.where(folds_V == 0, rows_V, -1))
    with pytest.raises(ValueError, match=r"found token \d+, allowed 0 to 4$"):
        concepts.token_to_child(5)


def test_a_shared_token_goes_to_the_word_itself() -> None:
    tokenizer = word_level(["glass", "glasses", "Glass", "leaves", "leaf", "leave"])
    tokens = word_tokens(tokenizer, ["leave", "glass", "leaf", "glasses"])
    texts = {word: tokenizer.convert_ids_to_tokens(ids) for word, ids in tokens.items()}
    # `leaves` is a plural of both `leaf` and `leave`: the first in alphabetical order has it
    assert texts == {
        "glass": ["glass", "Glass"],
        "glasses": ["glasses"],
        "leaf": ["leaf", "leaves"],
        "leave": ["leave"],
    }
    assert word_tokens(tokenizer, ["nothing"]) == {}


def test_word_forms() -> None:
    assert word_forms("fox") == [(0, "fox"), (1, "Fox"), (2, "foxes"), (3, "Foxes")]
    assert [form for _, form in word_forms("Monday")] == ["Monday", "Mondays"]
    assert {"fireman", "firemen", "Firemen"} <= {form for _, form in word_forms("fireman")}
    assert (2, "cities") in word_forms("city")
    assert (2, "days") in word_forms("day")
    assert [form for _, form in word_forms("doe")] == ["doe", "Doe"]  # `does` is a function word


def test_verb_forms() -> None:
    def forms(word: str) -> set[str]:
        return {form for _, form in word_forms(word, "verb") if form[0].islower()}

    assert word_forms("jump", "verb")[:2] == [(0, "jump"), (1, "Jump")]
    assert forms("jump") == {"jump", "jumps", "jumping", "jumped"}
    assert forms("run") == {"run", "runs", "running", "ran"}
    # an irregular form takes the regular one's place: `hoped` and `hoping` belong to hope
    assert forms("hop") == {"hop", "hops", "hopping", "hopped"}
    assert forms("hope") == {"hope", "hopes", "hoping", "hoped"}
    assert forms("try") == {"try", "tries", "trying", "tried"}
    assert forms("tie") == {"tie", "ties", "tying", "tied"}
    assert forms("see") == {"see", "sees", "seeing", "saw", "seen"}
    assert forms("go") == {"go", "goes", "going", "went", "gone"}


def test_words_of_a_file_inflect_as_asked(tmp_path: Path) -> None:
    tokenizer = word_level(["run", "running", "runs", "jump", "jumped", "hop", "sing", "sang", "hum", "call", "go"])
    path = tmp_path / "verbs.yaml"
    path.write_text("act: {move: [run, jump, hop], sound: [sing, hum, call]}")
    verbs = build(tokenizer, path, min_children=2, parts_of_speech=["verb"])
    ids_of = {word: ids for child in verbs.children for word, ids in child.tokens.items()}
    texts = {word: tokenizer.convert_ids_to_tokens(ids) for word, ids in ids_of.items()}
    assert texts["run"] == ["run", "running", "runs"]
    assert texts["sing"] == ["sing", "sang"]
    nouns = build(tokenizer, path, min_children=2)
    assert nouns.children[0].tokens["run"] == tokenizer.convert_tokens_to_ids(["run", "runs"])


def byte_level(texts: list[str]) -> Tokenizer:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for text in texts:
        for end in range(2, len(text) + 1):
            if text[:end] not in pieces:
                pieces.append(text[:end])
                merges.append((text[: end - 1], text[end - 1]))
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))


def test_byte_level_and_sentencepiece_spaces() -> None:
    bpe = byte_level(["Ġdog", "Ġdogs", "cat"])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokens = word_tokens(tokenizer, ["cat", "dog"])  # `cat` is a token, but not after a space
    assert {word: tokenizer.convert_ids_to_tokens(ids) for word, ids in tokens.items()} == {"dog": ["Ġdog", "Ġdogs"]}

    pieces = {"<unk>": 0, "▁a": 1, "▁dog": 2, "▁dogs": 3, "cat": 4, "▁": 5}
    unigram = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
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
    assert any(folds != [child.words for child in build(tokenizer, ontology, seed=s).children] for s in (1, 2, 3))
    # a parent keeps its folds when another one goes
    assert build(tokenizer, ontology, max_parents=1).parents[0] == concepts.parents[0]


def test_yaml_is_the_same_tree(tokenizer: PreTrainedTokenizerFast, ontology: Path, tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    lines = []
    for parent, children in TREE.items():
        lines.append(f"{parent}:")
        lines += [f"  {child}: [{', '.join(words)}]" for child, words in children.items()]
    path.write_text("\n".join(lines))
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
        (
            '{"p": {"c": ["dog", "fox", "crow"]}}',
            r"found 0 parents with 3 or more children .*\(3 words do\)",
        ),
        ("{}", r"found 0 parents .*, allowed 1 or more"),
    ],
)
def test_bad_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tree.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        build(tokenizer, path)
    assert str(error.value).startswith("concepts.ontology: ")
    assert "\n" not in str(error.value)


def test_names_above_the_parents_only_group(tokenizer: PreTrainedTokenizerFast, ontology: Path, tmp_path: Path) -> None:
    grouped = {
        "living": {"animal": TREE["animal"]},
        "made": {"by hand": {"small": TREE["small"], "tool": TREE["tool"]}},
    }
    path = tmp_path / "grouped.json"
    path.write_text(json.dumps(grouped))
    assert build(tokenizer, path) == build(tokenizer, ontology)


def test_bad_yaml_and_missing_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text("p: {c: [dog\nq: 1")
    with pytest.raises(ValueError, match="cannot be parsed") as error:
        build(tokenizer, path)
    assert "\n" not in str(error.value)
    path.write_text("1: {c: [dog]}")
    with pytest.raises(ValueError, match="found keys that are not text, allowed a mapping of parents"):
        build(tokenizer, path)
    with pytest.raises(ValueError, match="wordnets is not a file; allowed: wordnet, or a JSON or YAML file"):
        build(tokenizer, "wordnets")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_parents": 0}, "concepts.max_parents: found 0, allowed 1 or more"),
        ({"min_children": 1}, "concepts.min_children: found 1, allowed 2 or more"),
        ({"max_children_per_parent": 2}, "concepts.max_children_per_parent: found 2, allowed 3 or more"),
        ({"min_words_per_child": 2}, "concepts.min_words_per_child: found 2, allowed 3 or more"),
        (
            {"split": (0.7, 0.3, 0.0)},
            r"concepts.split: found \[0.7, 0.3, 0.0\], allowed three positive shares",
        ),
        ({"split": (0.7, 0.2, 0.2)}, "concepts.split"),
    ],
)
def test_bounds(tokenizer: PreTrainedTokenizerFast, ontology: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tokenizer, ontology, **changes)


def test_bad_json(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    obj = build(tokenizer, ontology).to_json()
    first = obj["parents"][0]["children"][0]
    word = first["words"]["train"].pop()
    with pytest.raises(ValueError, match="tool / holder: found 4 words in folds and 5 with tokens"):
        Concepts.from_json(obj)
    first["words"]["train"].append(word)
    obj["parents"][1]["children"][0]["tokens"]["dog"] += first["tokens"]["city"]
    with pytest.raises(ValueError, match=r"token \d+ is in tool / holder / city and in animal / mammal / dog;"):
        Concepts.from_json(obj)
    del first["words"]
    with pytest.raises(ValueError, match=r"concepts\.json: parents\.0\.children\.0\.words: found nothing"):
        Concepts.from_json(obj)
    with pytest.raises(ValueError, match=r"not the layout of concepts\.json"):
        Concepts.from_json([])


def test_format_tree(tokenizer: PreTrainedTokenizerFast, ontology: Path) -> None:
    concepts = build(tokenizer, ontology)
    file = StringIO()
    Console(width=120, file=file).print(format_tree(concepts, examples=2))
    text = file.getvalue()
    counts = [sum(len(child.words[fold]) for child in concepts.children) for fold in FOLDS]
    assert f"2 parents, 6 children; words {counts[0]}/{counts[1]}/{counts[2]}, tokens " in text
    assert "animal (3 children; words " in text
    assert "mammal (words " in text
    assert text.count("\n") == 1 + 2 + 6


def test_wordnet_facts() -> None:
    wordnet = load_wordnet("noun")
    assert wordnet is load_wordnet("noun")
    assert len(wordnet.lemmas) == 82115
    assert wordnet.hypernyms["dog.n.01"] == ("canine.n.02", "domestic_animal.n.01")
    assert wordnet.lemmas["dog.n.01"] == ("dog", "domestic_dog", "Canis_familiaris")
    assert "dog.n.01" in wordnet.children["canine.n.02"]
    assert wordnet.hypernyms["entity.n.01"] == ()
    assert wordnet.first_sense["dog"] == "dog.n.01"
    assert wordnet.first_sense["domestic_dog"] == "dog.n.01"
    assert wordnet.first_sense["canine"] == "canine.n.01" != "canine.n.02"
    assert wordnet.irregular_forms["goose"] == ("geese",)
    # France is an instance of a country, not a kind of one
    assert wordnet.instance_hypernyms["france.n.01"] == ("european_country.n.01",)
    assert wordnet.hypernyms["france.n.01"] == ()
    assert "france.n.01" not in wordnet.children["european_country.n.01"]


def test_verb_facts() -> None:
    verbs = load_wordnet("verb")
    assert len(verbs.lemmas) == 13767
    assert verbs.hypernyms["sprint.v.01"] == ("run.v.01",)
    assert "walk.v.01" in verbs.children["travel.v.01"]
    assert verbs.first_sense["sprint"] == "sprint.v.01"
    assert verbs.irregular_forms["go"] == ("gone", "went")


def test_packaged_graph_carries_its_licence() -> None:
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


def test_selection_on_a_known_graph() -> None:
    wordnet = tiny_wordnet()
    chosen = select_parents(wordnet, wordnet.first_sense, min_children=3, min_words_per_child=3)
    # `root` is too large; `a4` has too few words; `b3` has two thirds of b's words; `top` takes the place of
    # `mid`, as it holds no other candidate; `x_0` is two steps below `top` and three below `a`.
    assert chosen == {
        "a": {"a1": ["a1_0", "a1_1", "a1_2"], "a2": ["a2_0", "a2_1", "a2_2"], "a3": ["a3_0", "a3_1", "a3_2"]},
        "b": {
            "b1": ["b1_0", "b1_1", "b1_2"],
            "b2": ["b2_0", "b2_1", "b2_2"],
            "b3": sorted(f"b3_{i}" for i in range(12)),
        },
        "top": {
            "mid": [*(f"m{j}_{i}" for j in (1, 2, 3) for i in range(3)), "x_0"],
            "side1": ["side1_0", "side1_1", "side1_2"],
            "side2": ["side2_0", "side2_1", "side2_2"],
        },
    }


def test_a_parent_is_not_one_child_and_crumbs() -> None:
    wordnet = tiny_wordnet(b3=15)
    chosen = select_parents(wordnet, wordnet.first_sense, min_children=3, min_words_per_child=3)
    assert list(chosen) == ["a", "top"]


def test_synsets_above_each_other_end_the_search() -> None:
    wordnet = tiny_wordnet()
    circular = replace(wordnet, hypernyms={**wordnet.hypernyms, "a1": ("a", "x1")})
    chosen = select_parents(circular, wordnet.first_sense, min_children=3, min_words_per_child=3)
    assert list(chosen) == ["a", "b", "top"]


ASSET = resources.files("polytope_hsae").joinpath("assets/textbook-lm-9m/tokenizer.json")


@pytest.mark.skipif(not ASSET.is_file(), reason="the packaged model is not there")
def test_packaged_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(Path(str(ASSET)).parent))
    concepts = build_concepts(tokenizer, "wordnet", max_parents=80, max_children_per_parent=32)
    assert concepts.n_parents >= 50
    wordnet = load_wordnet("noun")
    used: Counter[str] = Counter()
    for parent in concepts.parents:
        assert parent.synset is not None
        assert len(parent.children) >= 3
        sizes = [len(child.tokens) for child in parent.children]
        assert min(sizes) >= 3
        assert all(parent.synset in wordnet.hypernyms[str(child.synset)] for child in parent.children)
        assert min(len(child.words["train"]) for child in parent.children) >= 2
        assert all(any(child.words[fold] for child in parent.children) for fold in ("val", "test"))
        used.update(word for child in parent.children for word in child.tokens)
    assert max(used.values()) == 1
    synsets = [str(parent.synset) for parent in concepts.parents]
    assert not {"entity.n.01", "object.n.01", "person.n.01"} & set(synsets)
    for synset in synsets:  # none is above another
        above, level = set(), list(wordnet.hypernyms[synset])
        while level:
            above.update(level)
            level = [h for s in level for h in wordnet.hypernyms[s]]
        assert not above & set(synsets)
    shares = [sum(len(child.words[fold]) for child in concepts.children) for fold in FOLDS]
    assert abs(shares[0] / sum(shares) - 0.70) < 0.02
    assert abs(shares[1] - shares[2]) <= 2
    dog = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    row = int(concepts.token_to_child(len(tokenizer))[dog].item())
    assert concepts.parents[concepts.child_parent_R[row]].synset == "vertebrate.n.01"


@pytest.mark.skipif(not ASSET.is_file(), reason="the packaged model is not there")
def test_nouns_and_verbs_of_the_packaged_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(Path(str(ASSET)).parent))

    def parents(parts: list[str], most: int = 200) -> dict[str, set[str]]:
        made = build(tokenizer, "wordnet", max_parents=most, max_children_per_parent=32, parts_of_speech=parts)
        return {str(p.synset): {word for child in p.children for word in child.tokens} for p in made.parents}

    nouns, verbs, both, turned = (parents(parts) for parts in (["noun"], ["verb"], ["noun", "verb"], ["verb", "noun"]))
    assert len(verbs) >= 10
    assert all(synset.split(".")[-2] == "v" for synset in verbs)
    assert both.items() >= nouns.items()  # verbs get what nouns leave, and the other way round
    assert turned.items() >= verbs.items()
    assert {synset.split(".")[-2] for synset in both} == {"n", "v"}
    words = [word.lower() for listed in both.values() for word in listed]
    assert len(words) == len(set(words))
