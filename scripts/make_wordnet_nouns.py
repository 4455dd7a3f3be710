"""Pack WordNet's nouns into the graph that the package ships.

    python scripts/make_wordnet_nouns.py --wordnet /usr/share/wordnet

Reads `data.noun`, `index.noun` and `noun.exc` of WordNet 3.0 (Debian package `wordnet-base`). The output is
JSON in gzip without a time stamp, so that equal inputs give equal bytes. `polytope_hsae/data/wordnet.py`
reads it:

- `synsets`: one string per synset in the order of the file: its lemmas in order, separated by spaces, each
  followed by `#n` where the synset is not the lemma's first sense but its n-th (`index.noun` orders the
  senses by frequency);
- `hypernyms`, `instance_hypernyms`: per synset the rows it points to (`@`; `@i`, only synsets that have any);
- `irregular_plurals`: singular -> plurals, single words only.
"""

import argparse
import gzip
import json
from pathlib import Path


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


def read_plurals(path: Path) -> dict[str, list[str]]:
    plurals: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        plural, *singulars = line.split()
        for singular in singulars:
            if plural.isalpha() and singular.isalpha() and plural != singular:
                plurals.setdefault(singular, []).append(plural)
    return {singular: plurals[singular] for singular in sorted(plurals)}


def pack(folder: Path) -> dict[str, object]:
    senses = read_senses(folder / "index.noun")
    synsets = read_synsets(folder / "data.noun")
    row = {offset: i for i, offset in enumerate(synsets)}
    texts = []
    for offset, (lemmas, _, _) in synsets.items():
        numbers = [senses[lemma.lower(), offset] for lemma in lemmas]
        texts.append(" ".join(w if n == 1 else f"{w}#{n}" for w, n in zip(lemmas, numbers, strict=True)))
    return {
        "source": "WordNet 3.0, nouns; copyright 2006 by Princeton University; see WORDNET_LICENSE.txt",
        "synsets": texts,
        "hypernyms": [[row[o] for o in hypernyms] for _, hypernyms, _ in synsets.values()],
        "instance_hypernyms": {row[o]: [row[t] for t in i] for o, (_, _, i) in synsets.items() if i},
        "irregular_plurals": read_plurals(folder / "noun.exc"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack WordNet's nouns into the graph that the package ships.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="has data.noun")
    parser.add_argument("--out", type=Path, default=Path("polytope_hsae/data/wordnet_nouns.json.gz"))
    args = parser.parse_args()
    text = json.dumps(pack(args.wordnet), ensure_ascii=False, separators=(",", ":"))
    args.out.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
