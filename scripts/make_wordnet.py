"""Pack WordNet's nouns and verbs into the graphs that the package ships.

    python scripts/make_wordnet.py --wordnet /usr/share/wordnet

Reads `data.PART`, `index.PART` and `PART.exc` of WordNet 3.0 (Debian package `wordnet-base`) for noun and verb.
The outputs are JSON in gzip without a time stamp, so that equal inputs give equal bytes.
`polytope_hsae/data/wordnet.py` reads them:

- `synsets`: one string per synset in the order of the file: its lemmas in order, separated by spaces, each
  followed by `#n` where the synset is not the lemma's first sense but its n-th (`index.PART` orders the
  senses by frequency);
- `hypernyms`, `instance_hypernyms`: per synset the rows it points to (`@`; `@i`, only synsets that have any);
- `irregular_plurals` of nouns, `irregular_forms` of verbs: word -> forms that no rule gives, single words only.
"""

import argparse
import gzip
import json
from pathlib import Path

IRREGULAR = {"noun": "irregular_plurals", "verb": "irregular_forms"}  # part of speech -> key of its irregular forms


def read_senses(path: Path) -> dict[tuple[str, str], int]:
    """(lower-case lemma, synset offset) -> sense number, from 1."""
    senses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        fields = line.split()
        n_synsets, n_pointers = int(fields[2]), int(fields[3])
        offsets = fields[6 + n_pointers :]
        assert len(offsets) == n_synsets, line
        for number, offset in enumerate(offsets, start=1):
            senses[fields[0], offset] = number
    return senses


def read_synsets(path: Path) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Offset -> (lemmas, offsets of hypernyms, offsets of instance hypernyms), in file order."""
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split(" | ")[0].split()
        n_lemmas = int(fields[3], 16)
        lemmas = fields[4 : 4 + 2 * n_lemmas : 2]
        start = 4 + 2 * n_lemmas
        n_pointers = int(fields[start])
        pointers = fields[start + 1 : start + 1 + 4 * n_pointers]
        above: dict[str, list[str]] = {"@": [], "@i": []}
        for symbol, target in zip(pointers[0::4], pointers[1::4], strict=True):
            if symbol in above:
                above[symbol].append(target)
        synsets[fields[0]] = (lemmas, above["@"], above["@i"])
    return synsets


def read_irregular(path: Path) -> dict[str, list[str]]:
    """Word -> its irregular forms."""
    forms: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        form, *words = line.split()
        for word in words:
            if form.isalpha() and word.isalpha() and form != word:
                forms.setdefault(word, []).append(form)
    return {word: forms[word] for word in sorted(forms)}


def pack(folder: Path, part: str) -> dict[str, object]:
    senses = read_senses(folder / f"index.{part}")
    synsets = read_synsets(folder / f"data.{part}")
    row = {offset: i for i, offset in enumerate(synsets)}
    texts = []
    for offset, (lemmas, _, _) in synsets.items():
        numbers = [senses[lemma.lower(), offset] for lemma in lemmas]
        texts.append(" ".join(w if n == 1 else f"{w}#{n}" for w, n in zip(lemmas, numbers, strict=True)))
    return {
        "source": f"WordNet 3.0, {part}s; copyright 2006 by Princeton University; see WORDNET_LICENSE.txt",
        "synsets": texts,
        "hypernyms": [[row[o] for o in hypernyms] for _, hypernyms, _ in synsets.values()],
        "instance_hypernyms": {row[o]: [row[t] for t in i] for o, (_, _, i) in synsets.items() if i},
        IRREGULAR[part]: read_irregular(folder / f"{part}.exc"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack WordNet's nouns and verbs for the package.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="has data.noun")
    parser.add_argument("--out", type=Path, default=Path("polytope_hsae/data"), help="folder of wordnet_PARTs.json.gz")
    args = parser.parse_args()
    for part in IRREGULAR:
        text = json.dumps(pack(args.wordnet, part), ensure_ascii=False, separators=(",", ":"))
        path = args.out / f"wordnet_{part}s.json.gz"
        path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
