"""Every reader of the package, given thousands of broken files: it reads something valid or refuses in one line.

200 cases for each reader; `make fuzz` runs 10,000.
"""

import gzip
import io
import json
import lzma
import shutil
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import yaml
from breaking import broken_bytes, broken_json, broken_lines, broken_tensors, broken_yaml
from fakes import write_store
from hypothesis import given
from hypothesis import strategies as st
from models import factored
from rich.console import Console
from trainers import make_trainer

from polytope_hsae.config import (
    FLAT_KINDS,
    ConceptsConfig,
    Config,
    dump_yaml,
    find_config,
    load_config,
)
from polytope_hsae.data.concepts import Concepts, build_concepts, format_tree, permuted_words
from polytope_hsae.data.corpus import load_documents
from polytope_hsae.data.store import LABELS, ActivationStore
from polytope_hsae.fileio import read_json, write_json, write_tensors
from polytope_hsae.geometry.causal import CausalGeometry, Space
from polytope_hsae.models.base import SparseAutoencoder
from polytope_hsae.models.hsae import HierarchicalSAE
from polytope_hsae.phases.flat_arms import MODELS
from polytope_hsae.provenance import Provenance
from polytope_hsae.teacher import Teacher
from polytope_hsae.tracking import JsonlTracker

WIDTH = 5
ROWS = {"train": 12, "val": 3, "test": 4}
SHAPE = factored(n_parents=4, topk_parent=2, n_children_per_parent=2, subspace_dim=2, causal_ortho_lambda=0.1)
SLOW = 10.0  # seconds; these small files take milliseconds
LONG = 2000  # characters of an error


class Reader(NamedTuple):
    """`make` fills a folder, `how` breaks one file of it, and `read` reads all of it and uses what it got.

    `then` may mend what depends on the broken file; `writes` says that a reader that succeeds changes the folder.
    """

    file: str
    how: Callable[[bytes], st.SearchStrategy[bytes]]
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    then: Callable[[Path], object] = lambda folder: None
    writes: bool = False


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# -- configs, concepts, records


def read_config(folder: Path) -> None:
    dump_yaml(load_config(str(folder / "config.yaml"))).encode("utf-8")


def read_concepts(folder: Path) -> None:
    concepts = Concepts.from_json(read_json(folder / "concepts.json"))
    concepts.token_to_child(tiny.VOCAB)
    permuted_words(concepts, seed=0)
    Console(file=io.StringIO()).print(format_tree(concepts))


def write_ontology(folder: Path, name: str) -> None:
    words = [[[f"w{9 * p + 3 * c + i}" for i in range(1, 4)] for c in range(3)] for p in range(2)]
    tree = {f"p{p}": {f"c{c}": listed for c, listed in enumerate(children)} for p, children in enumerate(words)}
    (folder / name).write_text(yaml.safe_dump(tree) if name.endswith("yaml") else json.dumps(tree))


def read_ontology(folder: Path, name: str) -> None:
    limits = {"max_parents": 2, "max_children_per_parent": 3, "min_children": 2, "min_words_per_child": 3}
    concepts = build_concepts(tokenizer(), ConceptsConfig(ontology=str(folder / name), **limits), seed=0)
    assert Concepts.from_json(json.loads(json.dumps(concepts.to_json()))) == concepts


@cache
def tokenizer() -> Any:
    return tiny.tokenizer()


def read_provenance(folder: Path) -> None:
    record = Provenance(folder)
    record.is_done(2, Config(), {"a": "b"}, [], force=False)
    record.require(2, Config(), {})


# -- tensors


def write_rows(folder: Path) -> None:
    write_store(folder, {split: {"acts": random(rows, WIDTH).float()} for split, rows in ROWS.items()}, 12)


def note_sizes(folder: Path) -> None:
    """Let the manifest agree with a broken shard, so that it is opened and not refused for its size."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["bytes"] = (folder / shard["file"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_store(folder: Path) -> None:
    store = ActivationStore.open(folder)
    for split, rows in ROWS.items():
        assert store.n_rows(split) == rows
        assert all(len(store.column(split, name)) == rows for name in LABELS)
        assert store.acts(split, torch.arange(rows)).shape == (rows, WIDTH)


def read_geometry(folder: Path) -> None:
    geometry = CausalGeometry.load(folder / "geometry.safetensors")
    assert geometry.whiten(torch.ones(geometry.width), Space.COVECTOR).isfinite().all()
    assert geometry.condition_number >= 1


def write_teacher(folder: Path) -> None:
    names = [f"p{i}" for i in range(3)], [f"c{i}" for i in range(6)]
    roots = torch.eye(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64)
    teacher = Teacher.build(*names, [0, 0, 1, 1, 2, 2], random(3, WIDTH), random(6, WIDTH), roots)
    teacher.save(folder / "teacher.safetensors")


def read_teacher(folder: Path) -> None:
    teacher = Teacher.load(folder / "teacher.safetensors")
    teacher.projectors(2, 2)
    teacher.matched(teacher.parent_names, [[] for _ in teacher.parent_names])


def write_model(folder: Path, kind: str) -> None:
    flat = {"n_latents": 8, "k": 3}
    model = HierarchicalSAE(SHAPE, WIDTH) if kind == "hsae" else MODELS[kind](FLAT_KINDS[kind](**flat), WIDTH)
    model.save_pretrained(folder / "model")


def read_model(folder: Path) -> None:
    model = SparseAutoencoder.from_pretrained(folder / "model")
    rows = random(3, model.width).float()
    assert model.reconstruct(rows).shape == rows.shape


def write_checkpoint(folder: Path) -> None:
    trained = make_trainer(folder)
    trained.model.freeze(trained.stages[0].freeze)
    for _ in range(2):
        trained.train_step(trained.stages[0])
    trained.save()


def read_checkpoint(folder: Path) -> None:
    resumed = make_trainer(folder)
    assert resumed.resume()
    assert resumed.stream.next().shape == (16, 6)
    resumed.optimizer.step()


# -- corpora and metrics


def write_tokens(folder: Path) -> None:
    tokens = {"tokens": torch.arange(60, dtype=torch.int32), "doc_start": torch.tensor([0, 20, 40])}
    write_tensors(folder / "corpus.safetensors", tokens, {"tokenizer_sha256": "abc"})


def write_text(folder: Path, name: str) -> None:
    lines = [" ".join(f"w{i + j}" for j in range(9)) for i in range(5)]
    text = "\n\n".join(lines) if "txt" in name else "".join(json.dumps({"text": line}) + "\n" for line in lines)
    pack = {"gz": partial(gzip.compress, mtime=0), "xz": lzma.compress}.get(name.rsplit(".", 1)[1], bytes)
    (folder / name).write_bytes(pack(text.encode()))


def read_corpus(folder: Path, source: str, name: str) -> None:
    limits = {"max_tokens": 50, "context_length": 16}
    documents = load_documents(source, folder / name, tokenizer(), tokenizer_sha256="abc", **limits)
    assert 2 <= documents.n_tokens <= 50
    assert documents.tokens.min() >= 0
    assert (documents.lengths >= 2).all()


def write_metrics(folder: Path) -> None:
    for arm in "ab":
        tracker = JsonlTracker(folder / "metrics.jsonl", 2, arm, 0)
        for step in (1, 2, 3):
            tracker.log({"loss": 0.5}, step, 8 * step)


def read_metrics(folder: Path) -> None:
    JsonlTracker(folder / "metrics.jsonl", 2, "a", 0, resume_step=1)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["step"] <= 1 or (record["phase"], record["arm"], record["seed"]) != (2, "a", 0)


# -- all of them

CHECKPOINT = "checkpoints/step-00000002.safetensors"
READERS = {
    "config": Reader("config.yaml", broken_yaml, lambda f: shutil.copy(find_config("smoke"), f / "config.yaml"),
                     read_config),
    "concepts": Reader("concepts.json", broken_json, lambda f: write_json(
        f / "concepts.json", tiny.concepts().to_json()), read_concepts),
    "provenance": Reader("provenance.json", broken_json, lambda f: Provenance(f).record(
        2, Config(), {"a": "b"}, "cpu", 1.0), read_provenance),
    "manifest": Reader("manifest.json", broken_json, write_rows, read_store),
    "shard": Reader("train-00000.safetensors", broken_tensors, write_rows, read_store, note_sizes),
    "geometry": Reader("geometry.safetensors", broken_tensors, lambda f: CausalGeometry(random(40, WIDTH)).save(
        f / "geometry.safetensors"), read_geometry),
    "teacher": Reader("teacher.safetensors", broken_tensors, write_teacher, read_teacher),
    "checkpoint": Reader(CHECKPOINT, broken_tensors, write_checkpoint, read_checkpoint),
    "tokens": Reader("corpus.safetensors", broken_tensors, write_tokens,
                     partial(read_corpus, source="tokens", name="corpus.safetensors")),
    "metrics": Reader("metrics.jsonl", broken_lines, write_metrics, read_metrics, writes=True),
}  # fmt: skip
for kind in ("hsae", *FLAT_KINDS):
    write = partial(write_model, kind=kind)
    READERS[f"{kind} config"] = Reader("model/config.json", broken_json, write, read_model)
    READERS[f"{kind} tensors"] = Reader("model/model.safetensors", broken_tensors, write, read_model)
for name in ("corpus.txt", "corpus.txt.gz", "corpus.txt.xz", "corpus.jsonl", "corpus.jsonl.gz"):
    how, source = (broken_lines, "jsonl") if name.endswith("jsonl") else (broken_bytes, name.split(".")[1])
    read = partial(read_corpus, source="text" if source == "txt" else "jsonl", name=name)
    READERS[name] = Reader(name, how, partial(write_text, name=name), read)
for name in ("ontology.yaml", "ontology.json"):
    how = broken_yaml if name.endswith("yaml") else broken_json
    READERS[name] = Reader(name, how, partial(write_ontology, name=name), partial(read_ontology, name=name))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_refused_in_one_line(name, tmp_path_factory):
    reader, folder = READERS[name], tmp_path_factory.mktemp("fuzz")
    reader.make(folder)
    reader.read(folder)  # whole, it is read
    reader.make(folder)
    whole = contents(folder)

    @given(content=reader.how(whole[folder / reader.file]))
    def holds(content: bytes) -> None:
        (folder / reader.file).write_bytes(content)
        reader.then(folder)
        before, started, refused = contents(folder), time.monotonic(), None
        try:
            reader.read(folder)
        except (ValueError, OSError) as error:
            refused = " ".join(str(error).split())
        assert time.monotonic() - started < SLOW
        assert refused is None or 10 < len(refused) < LONG
        assert contents(folder) == before or (reader.writes and refused is None)
        for path, text in whole.items():
            path.write_bytes(text)

    holds()
