"""WordNet through nltk: a tiny database in WordNet's own format."""

import shutil
import sys
from pathlib import Path

import pytest
from running import hsae, refused

from polytope_hsae.config import load_config
from polytope_hsae.data.wordnet import load_wordnet
from polytope_hsae.data.wordnet_nltk import load_nltk_wordnet, nltk_is_there, nltk_sha256
from polytope_hsae.data.words import load_graphs
from polytope_hsae.phases.sources import source_files

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
LICENCE = "  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"
# (part, lemmas, rows of hypernyms, rows of instance hypernyms), the first sense of a lemma first
SYNSETS: list[tuple[str, list[str], list[int], list[int]]] = [
    ("n", ["entity"], [], []),
    ("n", ["animal", "beast"], [0], []),
    ("n", ["dog"], [1], []),
    ("n", ["Rex", "animal"], [], [2]),
    ("v", ["move"], [], []),
    ("v", ["dog", "chase_after"], [4], []),
    ("a", ["big"], [], []),
    ("r", ["fast"], [], []),
]


def write_corpus(folder: Path) -> Path:
    """nltk's data folder with a WordNet of `SYNSETS`; every line's offset in its file is written into it."""
    corpus = folder / "corpora/wordnet"
    corpus.mkdir(parents=True)

    def lines(offsets: list[int]) -> list[str]:
        made = []
        for row, (part, lemmas, above, instance_of) in enumerate(SYNSETS):
            pointers = [("@", other) for other in above] + [("@i", other) for other in instance_of]
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            targets = "".join(f"{kind} {offsets[other]:08d} {part} 0000 " for kind, other in pointers)
            frames = "01 + 02 00 " if part == "v" else ""
            head = f"{offsets[row]:08d} 00 {part} {len(lemmas):02x} {words} {len(pointers):03d} {targets}"
            made.append(f"{head}{frames}| gloss  \n")
        return made

    offsets, end = [], dict.fromkeys(PARTS, len(LICENCE))
    for (part, *_), line in zip(SYNSETS, lines([0] * len(SYNSETS)), strict=True):
        offsets.append(end[part])
        end[part] += len(line)
    for letter, name in PARTS.items():
        rows = [row for row, synset in enumerate(SYNSETS) if synset[0] == letter]
        written = lines(offsets)
        (corpus / f"data.{name}").write_text(LICENCE + "".join(written[row] for row in rows))
        senses: dict[str, list[int]] = {}
        for row in rows:
            for lemma in SYNSETS[row][1]:
                senses.setdefault(lemma.lower(), []).append(offsets[row])
        index = [
            f"{lemma} {letter} {len(found)} 1 @ {len(found)} 0 {' '.join(f'{o:08d}' for o in found)}  \n"
            for lemma, found in sorted(senses.items())
        ]
        (corpus / f"index.{name}").write_text(LICENCE + "".join(index))
        (corpus / f"{name}.exc").write_text("")
    for name in ("index.sense", "cntlist.rev"):
        (corpus / name).write_text("")
    (corpus / "lexnames").write_text("00\tall\t1\n")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("nltk")
    return str(write_corpus(tmp_path_factory.mktemp("nltk")))


def test_a_tiny_database(tiny: str) -> None:
    nouns = load_nltk_wordnet("noun", tiny)
    above = {"entity.n.01": (), "animal.n.01": ("entity.n.01",), "dog.n.01": ("animal.n.01",), "rex.n.01": ()}
    assert nouns.hypernyms == above
    assert nouns.children["animal.n.01"] == ("dog.n.01",)
    assert nouns.instance_hypernyms == {"rex.n.01": ("dog.n.01",)}
    assert nouns.lemmas["rex.n.01"] == ("Rex", "animal")
    assert nouns.first_sense["animal"] == nouns.first_sense["beast"] == "animal.n.01"
    verbs = load_nltk_wordnet("verb", tiny)
    assert verbs.hypernyms == {"move.v.01": (), "dog.v.01": ("move.v.01",)}
    assert verbs.lemmas["dog.v.01"] == ("dog", "chase_after")
    assert verbs.irregular_forms == load_wordnet("verb").irregular_forms


def test_an_archive_is_the_same(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    shutil.make_archive(str(tmp_path / "corpora/wordnet"), "zip", Path(tiny) / "corpora", "wordnet")
    assert load_nltk_wordnet("verb", str(tmp_path)) == load_nltk_wordnet("verb", tiny)
    assert nltk_sha256("verb", str(tmp_path)) == nltk_sha256("verb", tiny)


def test_which_source_is_read(tiny: str, tmp_path: Path) -> None:
    def words(source: str, folder: str) -> int:
        return len(load_graphs(["verb"], source, folder)["verb"].lemmas)

    nowhere = str(tmp_path)
    read = [("embedded", tiny), ("nltk", tiny), ("auto", tiny), ("auto", nowhere)]
    assert [words(source, folder) for source, folder in read] == [13767, 2, 2, 13767]
    assert nltk_is_there(tiny)
    assert not nltk_is_there(nowhere)
    with pytest.raises(ValueError, match=r"concepts\.wordnet: found no corpora/wordnet in .*nltk\.downloader wordnet"):
        words("nltk", nowhere)


def test_the_database_is_an_input_of_phase_1(tiny: str, tmp_path: Path) -> None:
    def inputs(source: str, folder: str) -> dict[str, str]:
        return source_files(load_config("smoke", [f"concepts.wordnet={source}", f"concepts.nltk_data={folder}"]))

    assert inputs("embedded", tiny) == inputs("auto", str(tmp_path)) == {}
    assert inputs("nltk", tiny) == {"concepts.wordnet.noun": nltk_sha256("noun", tiny)} == inputs("auto", tiny)


def test_damaged_files(tiny: str, tmp_path: Path) -> None:
    for name, damage in (("index.verb", "dog v 1 1 @ 1 0 00000007  \n"), ("lexnames", "07\tall\t1\n")):
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        (folder / "corpora/wordnet" / name).write_text(damage)
        with pytest.raises(ValueError, match=r"concepts\.wordnet: .* is not readable as WordNet's files") as error:
            load_nltk_wordnet("verb", str(folder))
        assert "\n" not in str(error.value)
    (tmp_path / "lexnames/corpora/wordnet/data.verb").unlink()
    with pytest.raises(ValueError, match=r"has no data\.verb"):
        nltk_sha256("verb", str(tmp_path / "lexnames"))


def test_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert not nltk_is_there()
    answer = hsae("concepts", "smoke", "--set", "concepts.wordnet=nltk")
    refused(answer, "concepts.wordnet", 'pip install "polytope-hsae[wordnet]"')
    assert hsae("concepts", "smoke", "--set", "concepts.wordnet=auto").code == 0
