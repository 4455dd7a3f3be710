"""Checks of concepts and splits: planted imbalance, planted copies, and what must be refused."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from running import hsae, refused

from polytope_hsae.data.checks import NGRAM, check_concepts, count_contexts, ngram_hashes, require_apart, short_parents
from polytope_hsae.data.concepts import Child, Concepts, Parent
from polytope_hsae.data.corpus import Documents

TOKENIZER = tiny.tokenizer()


def documents(*texts: list[int]) -> Documents:
    """Each begins with token 0, the start of a document."""
    return Documents.of([torch.tensor([0, *text], dtype=torch.int32) for text in texts], 0)


def members(train: list[int], val: list[int], test: list[int]) -> dict[str, torch.Tensor]:
    return {"train": torch.tensor(train), "val": torch.tensor(val), "test": torch.tensor(test)}


def check(concepts: Concepts, corpus: Documents, split: dict[str, torch.Tensor], **changes) -> dict:
    return check_concepts(concepts, corpus, split, tokenizer=TOKENIZER, **{"min_rows": 1, **changes})


# tiny.concepts(2): p0 has the tokens 1 to 6, p1 7 to 12; 3 and 9 are val words, 6 and 12 test words, the rest train
CONCEPTS = tiny.concepts(2)
FILLER = list(range(20, 60))


def test_contexts_are_counted_in_the_words_own_split() -> None:
    corpus = documents([1, 2, 3, 6, 7], [3, 3, 1, 9], [6, 12, 12, 3, 1])
    split = members([0], [1], [2])
    found = count_contexts(CONCEPTS, corpus, split)
    assert {name: counts.tolist() for name, counts in found.items()} == {"train": [2, 1], "val": [2, 1], "test": [1, 2]}
    assert short_parents(found, 1) == []
    assert short_parents(found, 2) == [0, 1]  # p1 has one train context, p0 one test context
    report = check(CONCEPTS, corpus, split, min_rows=2)
    assert report["short_of_contexts"] == ["p0", "p1"]
    assert report["parents"][0]["contexts"] == {"train": 2, "val": 2, "test": 1}
    assert report["parents"][0]["templated"] is None
    # 1, 1, 1, 2 of 14 words and 3 starts: 4 uses of 4 train words in 17 tokens
    assert report["parents"][0]["per_million_and_word"]["train"] == pytest.approx(1e6 * 4 / 17 / 4)
    assert any("2 of 2 parents have fewer than 2 natural contexts" in line for line in report["warnings"])


def test_planted_copies_are_found() -> None:
    text = list(range(20, 44))  # 24 tokens: 17 runs of 8
    half = [*text[:18], *range(1, 7)]  # shares 11 of 17 runs
    little = [*text[:9], *range(45, 60)]  # shares 2
    corpus = documents(text, list(range(43, 19, -1)), half, text, little, [5, 6])
    report = check(CONCEPTS, corpus, members([0], [1], [2, 3, 4, 5]))
    found = report["documents"]
    assert found["n"] == {"train": 1, "val": 1, "test": 4}
    shares = {"share": pytest.approx(2 / 3), "share_of_ngrams": pytest.approx((11 + 17 + 2) / 51)}
    assert found["test_in_train"] == {"near_duplicates": 2, "compared": 3, **shares}  # the shortest has no run
    assert found["val_in_train"]["near_duplicates"] == found["test_in_val"]["near_duplicates"] == 0
    line = "2 of 3 test documents have half of their 8-token runs in train"
    assert any(warning.startswith(line) for warning in report["warnings"])


def test_ngrams_stay_inside_documents_and_see_order() -> None:
    corpus = documents(FILLER[:NGRAM], FILLER[:NGRAM][::-1], FILLER[: NGRAM - 1], [0] * (NGRAM + 3))
    hashes, owners = ngram_hashes(corpus, torch.arange(4).numpy())
    assert owners.tolist() == [0, 1, 3]  # runs of one kind count once
    assert len(set(hashes.tolist())) == 3
    assert ngram_hashes(corpus, torch.tensor([2]).numpy())[0].size == 0


def wide(n: int) -> Concepts:
    """One parent with two children of `n` words, tokens from 1 up: train, val, test in turn."""
    made = []
    for c in range(2):
        ids = list(range(1 + c * n, 1 + (c + 1) * n))
        folds = {"train": ids[0::3], "val": ids[1::3], "test": ids[2::3]}
        words = {fold: [f"w{i}" for i in found] for fold, found in folds.items()}
        made.append(Child(f"c{c}", None, words, {f"w{i}": [i] for i in ids}))
    return Concepts([Parent("p", None, made)])


def test_frequency_of_folds() -> None:
    concepts, split = wide(30), members([0], [1], [2])
    even = documents(*[list(range(1, 61))] * 3)
    report = check(concepts, even, split)
    assert report["frequency"]["test"]["auroc"] == 0.5
    assert not any("frequent" in line for line in report["warnings"])
    often = [i for i in range(1, 61) if i % 3 == 0]  # the test words
    report = check(concepts, documents(*[[*range(1, 61), *often]] * 3), split)
    assert report["frequency"]["test"]["auroc"] == 1.0
    assert report["frequency"]["test"]["median_uses"] == {"train": 3.0, "test": 6.0}
    assert report["frequency"]["val"]["auroc"] == 0.5
    line = "test words are more frequent than train words: AUROC 1.000"
    assert any(warning.startswith(line) for warning in report["warnings"])


def test_splits_that_share_something_are_refused() -> None:
    require_apart(CONCEPTS, members([0], [1], [2]))
    with pytest.raises(ValueError, match=r"corpus: document 1 is in train and in test; one split is allowed"):
        check(CONCEPTS, documents(FILLER, FILLER), members([0, 1], [], [1]))
    march = Child("a", None, {"train": ["march"], "val": [], "test": []}, {"march": [1]})
    again = Child("b", None, {"train": ["june"], "val": [], "test": ["March"]}, {"june": [3], "March": [5]})
    with pytest.raises(ValueError, match=r"concepts: 'March' is in train of p / a and in test of p / b; one place"):
        require_apart(Concepts([Parent("p", None, [march, again])]))
    repeated = Child("a", None, {"train": ["w1"], "val": [], "test": ["w1"]}, {"w1": [1]})
    with pytest.raises(ValueError, match="found 2 words in folds and 1 with tokens"):
        Concepts([Parent("p", None, [repeated])])


def test_what_became_of_a_file(tmp_path: Path) -> None:
    tree = {
        "thing": {
            "person": ["man", "woman", "king", "unheardofperson"],
            "place": ["house", "room", "door"],
            "matter": ["water", "fire", "gold", "iron"],
            "rare": ["quagga", "okapi", "dodo"],
        },
        "nothing": {"x": ["zzxx"], "y": ["yyxx"], "z": ["xxyy"]},
    }
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree))
    settings = ("--set", f"concepts.ontology={path}", "--set", "concepts.min_test_rows=1")
    answer = hsae("concepts", "smoke", *settings, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["checks"]
    assert found["file"]["words"] == 17
    assert found["file"]["unknown_words"]["thing / person"] == ["unheardofperson"]
    assert found["file"]["parents_left_out"] == ["nothing"]
    assert found["file"]["children_left_out"] == ["thing / rare"]
    text = hsae("concepts", "smoke", *settings).out
    assert "warning: parents left out: nothing" in text
    path.write_text(json.dumps({"thing": {**tree["thing"], "again": ["Man", "Woman", "King"]}}))
    refused(hsae("concepts", "smoke", *settings), "'Man' is in thing / person as 'man' and in thing / again")
