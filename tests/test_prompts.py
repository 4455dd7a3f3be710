"""Contexts from templates: which sentences are made, that splits stay apart, and that nothing is mixed with text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from running import hsae, refused

from polytope_hsae.config import ConceptsConfig
from polytope_hsae.data.concepts import FOLDS, Concepts, Parent, build_concepts
from polytope_hsae.data.prompts import GAP, read_templates, split_templates, template_documents
from polytope_hsae.data.store import ActivationStore
from polytope_hsae.fileio import read_json, read_tensors

SENTENCES = [f"we saw the {GAP} {n} times" for n in ("two", "three", "four", "five", "six", "seven")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.packaged_tokenizer()


@pytest.fixture(scope="module")
def concepts(tokenizer) -> Concepts:
    options = ConceptsConfig(max_parents=60, max_children_per_parent=8, parts_of_speech=["noun", "verb"])
    return build_concepts(tokenizer, options, seed=0)


def test_every_word_stands_in_the_sentences_of_its_split(tokenizer, concepts) -> None:
    templates = {"noun": SENTENCES, "verb": SENTENCES}
    made, again = (template_documents(concepts, [3, 5], templates, tokenizer, start_id=0, seed=1) for _ in range(2))
    assert again.documents.sha256() == made.documents.sha256()
    assert made.left_out == 0
    dealt = split_templates(SENTENCES, 1)
    documents = made.documents.tokens.split(made.documents.lengths.tolist())
    for split in FOLDS:
        texts = set()
        for number in made.members[split].tolist():
            ids = documents[number].tolist()
            assert ids[0] == made.documents.start_id
            texts.add(tokenizer.decode(ids, skip_special_tokens=True).strip())
            children = concepts.parents[made.parent_D[number]].children
            assert {token for child in children for w in child.words[split] for token in child.tokens[w]} & set(ids)
        children = [child for row in (3, 5) for child in concepts.parents[row].children]
        firsts = [child.tokens[word][0] for child in children for word in child.words[split]]
        forms = [tokenizer.decode([token]).strip() for token in firsts]
        assert texts == {sentence.replace(GAP, form) for sentence in dealt[split] for form in forms}
        assert sum(made.counts(concepts.n_parents)[split]) == len(made.members[split]) == 2 * len(forms)
    numbers = [number for found in made.members.values() for number in found.tolist()]
    assert sorted(numbers) == list(range(len(documents)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("noun: [a]", "noun: found"),
        ("[]", "found []"),
        ("adverb: [so, so, so]", "found 'adverb', allowed: noun, verb"),
        (f"noun: ['the {GAP}', a thing, 'one {GAP}']", f"found 'a thing', allowed: one {GAP}, a word of its own"),
        (f"noun: ['the {GAP} {GAP}', 'a {GAP}', 'one {GAP}']", f"allowed: one {GAP}, a word of its own after"),
        (f"noun: ['{GAP} is', 'a {GAP}', 'one {GAP}']", f"allowed: one {GAP}, a word of its own after"),
        (f"noun: ['the {GAP}s', 'a {GAP}', 'one {GAP}']", f"allowed: one {GAP}, a word of its own after"),
        (f"noun: ['the {GAP}', 'a {GAP}', 'a {GAP}']", f"found 'a {GAP}' twice, allowed: once"),
        ("noun: [", "cannot be parsed: line 1"),
    ],
)
def test_bad_templates(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^concepts\.prompts: ") as error:
        read_templates(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_templates_that_cannot_be_used(tokenizer, concepts) -> None:
    with pytest.raises(ValueError, match=r"concepts\.prompts: found no sentences of noun for"):
        template_documents(concepts, [0], {"verb": SENTENCES}, tokenizer, start_id=0)
    child = concepts.children[0]
    words = {"train": child.words["train"], "val": [], "test": child.words["test"]}
    tokens = {word: child.tokens[word] for found in words.values() for word in found}
    no_val = Concepts([Parent("p", None, [replace(child, words=words, tokens=tokens)])])
    with pytest.raises(ValueError, match=r"found no sentence for val in which the word is one token"):
        template_documents(no_val, [0], {"noun": SENTENCES}, tokenizer, start_id=0)
    refused(hsae("concepts", "smoke", "--set", "concepts.prompts=nowhere.yaml"), "concepts.prompts", "packaged")


def test_templates_stay_apart_from_text(tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "run"
    settings = ("--set", "concepts.prompts=packaged", "--set", "run.threads=1")
    answer = hsae("phase1", "smoke", *settings, "--out", run)
    assert answer.code == 0, answer.err
    checks = read_json(run / "phase1/checks.json")
    short = checks["short_of_contexts"]
    assert short
    made = {parent["name"]: sum(parent["templated"].values()) for parent in checks["parents"]}
    assert {name for name, count in made.items() if count} == set(short)
    store = ActivationStore.open(run / "templates", verify=True)
    assert len(set(store.column("test", "doc").tolist())) == sum(p["templated"]["test"] for p in checks["parents"])
    # the store of text is the one of a run without templates, byte for byte
    for name in ("train", "test"):
        shard = f"activations/{name}-00000.safetensors"
        assert (run / shard).read_bytes() == (finished / shard).read_bytes()
    assert (run / "phase1/concepts.json").read_bytes() == (finished / "phase1/concepts.json").read_bytes()
    assert all(p["templated"] is None for p in read_json(finished / "phase1/checks.json")["parents"])
    assert not (finished / "templates").exists()
    shown = hsae("concepts", "smoke", *settings, "--json")
    assert json.loads(shown.out)["checks"] == checks


def test_a_teacher_and_phase_4_at_an_inner_hook_read_them(tmp_path: Path) -> None:
    arms = [{"name": "baseline"}, {"name": "teacher", "init": "teacher"}]
    settings = ("concepts.prompts=packaged", "run.threads=1", "model.hook=layers.1", "concepts.label=current_token")
    fields = (*settings, f"arms={json.dumps(arms)}")
    answer = hsae("run", "smoke", *(part for field in fields for part in ("--set", field)), "--out", tmp_path)
    assert answer.code == 0, answer.err
    made = Concepts.from_json(read_json(tmp_path / "phase1/concepts.json"))
    train_V = made.token_to_child(16384, ("train",)) >= 0

    def labelled(folder: str) -> int:
        store = ActivationStore.open(tmp_path / folder)
        return int(train_V[store.column("train", "token").long()].sum())

    found = read_tensors(tmp_path / "phase1/teacher.safetensors")[1]
    templated = sum(parent["templated"]["train"] for parent in read_json(tmp_path / "phase1/checks.json")["parents"])
    assert int(found["rows_from_templates"]) == labelled("templates") >= templated > 0
    assert int(found["rows"]) == ActivationStore.open(tmp_path / "activations").n_rows("train") + labelled("templates")
    checks = read_json(tmp_path / "phase1/checks.json")
    for metrics in read_json(tmp_path / "phase4/results.json")["arms"].values():
        assert metrics["purity_templated"]["n"] <= len(checks["short_of_contexts"])
        assert metrics["purity_templated"]["value"] is not None
        assert metrics["purity"]["n"] <= len(checks["parents"]) - len(checks["short_of_contexts"])
