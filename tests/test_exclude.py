"""Words that concepts leave out, by themselves, by a synset, or by the packaged list."""

import json

import pytest
import tiny
from running import hsae, refused

from polytope_hsae.config import load_config
from polytope_hsae.data.concepts import Concepts
from polytope_hsae.data.exclude import read_exclusions
from polytope_hsae.data.wordnet import load_wordnet, single_words
from polytope_hsae.phases.phase1_teacher import make_concepts
from polytope_hsae.phases.sources import source_files

BIRDS = {"birds": ["bird", "duck", "crow", "chicken"], "cats": ["cat", "lion", "bear"], "dogs": ["dog", "wolf", "fox"]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.packaged_tokenizer()


def concepts(tokenizer, *settings: str) -> Concepts:
    return make_concepts(load_config("quickstart", ["concepts.max_parents=300", *settings]), tokenizer)


def words(found: Concepts) -> set[str]:
    return {word.lower() for child in found.children for word in child.tokens}


def test_the_packaged_list_is_of_wordnets_words():
    listed = read_exclusions("packaged")
    assert not listed.synsets
    assert listed.words <= {word.lower() for word in single_words(load_wordnet("noun"))}
    assert len(listed.words) > 150
    assert not listed.words & {"gay", "lesbian", "jew", "muslim", "black", "woman", "native"}


def test_slurs_are_left_out_unless_asked_for(tokenizer):
    listed = read_exclusions("packaged").words
    everything, kept = concepts(tokenizer, "concepts.exclude=[]"), concepts(tokenizer)
    assert words(everything) & listed
    assert not words(kept) & listed
    assert everything.excluded == 0
    assert kept.excluded >= len(words(everything) & listed)
    assert Concepts.from_json(kept.to_json()) == kept
    tree = everything.to_json()
    del tree["excluded"]  # as older runs wrote it
    assert Concepts.from_json(tree) == everything


def test_a_word_and_a_synset_with_all_below_it_are_left_out(tokenizer):
    wordnet = load_wordnet("noun")
    before = concepts(tokenizer, "concepts.exclude=[]")
    after = concepts(tokenizer, "concepts.exclude=[Dog, person.n.01]")
    assert "dog" in words(before) - words(after)

    def above(synset: str) -> set[str]:
        found, level = {synset}, [synset]
        while level:
            level = [name for one in level for name in wordnet.hypernyms[one] if name not in found]
            found.update(level)
        return found

    persons = [[c for c in found.children if "person.n.01" in above(c.synset)] for found in (before, after)]
    assert [bool(found) for found in persons] == [True, False]
    assert not any("person.n.01" in above(wordnet.first_sense[word]) for word in words(after))
    assert after.excluded > 400


def test_lists_are_files_too_and_hold_for_a_users_words(tmp_path):
    tree, listed = tmp_path / "tree.json", tmp_path / "list.txt"
    tree.write_text(json.dumps({"animals": BIRDS}))
    listed.write_text("\ufeff# birds\nChicken\n\nwolverine  # no word here\n")
    settings = ["--set", f"concepts.ontology={tree}", "--set", f"concepts.exclude={listed}"]
    answer = hsae("concepts", "smoke", *settings, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["checks"]["excluded_words"] == found["excluded"] == 1
    assert "chicken" not in answer.out
    assert "1 words of this tokenizer are left out" in hsae("concepts", "smoke", *settings).out
    config = load_config("smoke", [f"concepts.exclude={listed}"])
    before = source_files(config)
    assert list(before) == ["concepts.exclude"]
    listed.write_text("crow\n")
    assert source_files(config) != before


def test_bad_lists_are_refused_in_one_line(tmp_path):
    bad, tree = tmp_path / "bad.txt", tmp_path / "tree.json"
    bad.write_bytes(b"\xff\xfe")
    tree.write_text(json.dumps({"animals": BIRDS}))
    for value, said in (
        ("person.n.01", "person.n.01', allowed: packaged, a list of words and synsets, or a file"),
        (bad, "is not readable as UTF-8 text"),
        ("[persn.n.01]", "concepts.exclude: found 'persn.n.01', allowed: a word or a synset of WordNet"),
    ):
        refused(hsae("concepts", "smoke", "--set", f"concepts.exclude={value}"), said)
    settings = ("--set", f"concepts.ontology={tree}", "--set", "concepts.exclude=[person.n.01]")
    refused(hsae("concepts", "smoke", *settings), "concepts.exclude: found 'person.n.01', allowed with a file's words:")
