"""Bad files, folders and settings through the command line: exit code 2, one line, nothing half-written."""

import gzip
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from running import SMOKE, contents, copy, files, hsae, processes, refused, without_cards

from polytope_hsae.cli import main
from polytope_hsae.data.corpus import load_documents

NOBODY = 65534
HALF = "\\ud800"  # one half of a surrogate pair, as JSON and YAML spell it


@pytest.fixture(scope="module")
def harvested(finished, tmp_path_factory) -> Path:
    """A run folder in which only phase 1 is done; the tests leave it like that, but for the last one."""
    return copy(finished, tmp_path_factory.mktemp("bad") / "run", phases=1)


# -- configs and overrides

BOMB = "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe\x00\x81", "not readable as YAML ('utf-8' codec can't decode byte 0xff"),
        (b"\x00\x01\x02", "not readable as YAML"),
        (b"run:\n\tseed: 1\n", "not readable as YAML (line 2: found character '\\t' that cannot start any token)"),
        (b"run: {seed: 1}\nhsae: {}\nrun: {seed: 2}\n", "not readable as YAML (line 3: found the key 'run' twice)"),
        (BOMB.encode(), "not readable as YAML (line 2: found an alias or a tag, allowed: neither)"),
        (b"run: !!python/object:os.system {}", "found an alias or a tag, allowed: neither"),
        (b"[" * 5000, "found more than 32 levels"),
        (b"#" * 2_000_000, "found 2000000 bytes, allowed: 1000000"),
        (b"- 1\n- 2\n", "found a list, allowed: a mapping of config blocks"),
        (b"0", "found a int, allowed: a mapping of config blocks"),
        (b"1: 2", "1: found"),
    ],
)
def test_config_files(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused(hsae("run", path, "--out", tmp_path / "run"), words)
    assert list(tmp_path.iterdir()) == [path]


# -- names


def test_names_are_printed_as_they_are(tmp_path):
    path = tmp_path / "tree.yaml"
    words = "{'[bold]': [dog, wolf, fox], b/c: [cat, lion, bear], ..: [bird, duck, crow]}"
    path.write_text(f"'[/red] a/b': {words}")
    answer = hsae("concepts", "smoke", "--set", f"concepts.ontology={path}")
    assert answer.code == 0, answer.err
    assert "[/red] a/b (3 children" in answer.out
    assert all(f"{name} (words " in answer.out for name in ("[bold]", "b/c", ".."))


# -- corpora


CUT = gzip.compress(b"w1 w2\n\nw3 w4\n\n")[:-9]
CORPORA = {
    "noise.txt": (bytes(range(256)) * 9, "not readable as UTF-8 text ('utf-8' codec can't decode byte 0x80"),
    "empty.txt": (b"", "has no document of at least 2 tokens"),
    "cut.txt.gz": (CUT, "not readable as UTF-8 text (Compressed file ended before"),
    "noise.txt.gz": (b"noise", "not readable as UTF-8 text (Not a gzipped file"),
    "noise.txt.xz": (b"noise", "not readable as UTF-8 text (Input format not supported"),
    "long.txt.gz": (gzip.compress(b"a" * (1 << 24) + b"b", 1), "found a line of more than 16777216 characters"),
    "bad.jsonl": (b'{"text": "w1 w2"}\n{"text":\n', "line 2: not JSON (Expecting value"),
    "other.jsonl": (b'{"text": "w1"}\n{"text": 1}\n', "line 2: no text in field 'text'"),
    "half.jsonl": (f'{{"text": "{HALF}"}}'.encode(), "line 1: no text in field 'text'"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not JSON (maximum recursion depth"),
    "noise.safetensors": (b"noise", "not a complete safetensors file"),
    "tokens.pt": (b"pickle", "found a .pt file, allowed: .safetensors (pickles are never read)"),
}


def source_of(name: str) -> str:
    return {"jsonl": "jsonl", "safetensors": "tokens", "pt": "tokens"}.get(name.rsplit(".", 1)[1], "text")


@pytest.mark.parametrize("name", CORPORA)
def test_corpora(tmp_path, name):
    content, words = CORPORA[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_documents(source_of(name), path, tiny.tokenizer(), max_tokens=99, context_length=16)
    assert str(path) in str(error.value)


# -- run folders


def test_places_that_cannot_be_a_run_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "else")
    for name in ("file", "loop", "gone"):
        words = f"--out: found '{tmp_path / name}', not a folder; allowed: a folder or a new name"
        refused(hsae("run", "smoke", "--out", tmp_path / name), words)
    refused(hsae("run", "smoke", "--out", tmp_path / "file" / "run"), "Not a directory", str(tmp_path / "file"))
    refused(hsae("run", "smoke", "--out", tmp_path / ("x" * 300)), "File name too long")
    refused(hsae("run", "smoke", "--out", tmp_path / "\udcff"), "--out: found '", "\\udcff', allowed: a name in UTF-8")
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    refused(hsae("run", "smoke", "--out", tmp_path / "run"), "Is a directory", "run/config.yaml")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone", "loop", "run"]


def edited(change) -> Callable[[bytes], bytes]:
    """A change of the manifest as a change of its file."""

    def apply(whole: bytes) -> bytes:
        manifest = json.loads(whole)
        change(manifest)
        return json.dumps(manifest).encode()

    return apply


def shard(**fields) -> Callable[[bytes], bytes]:
    """A change of the manifest's first shard."""
    return edited(lambda manifest: manifest["shards"][0].update(fields))


MANIFEST = "activations/manifest.json"


@pytest.mark.parametrize(
    "name, change, words",
    [
        (MANIFEST, shard(file="../run/activations/train-00000.safetensors"), "shards.0.file: found '../run/"),
        (MANIFEST, shard(file="train-99999.safetensors"), "train-99999.safetensors: missing shard"),
        (MANIFEST, shard(rows=1), "manifest.json: rows: found {'train': "),
        (MANIFEST, shard(bytes="many"), "manifest.json: shards.0.bytes: found 'many', allowed: input should be a"),
        (MANIFEST, shard(sha256="0"), "train-00000.safetensors: sha256 differs from the manifest's"),
        (MANIFEST, edited(lambda m: m.update(width=7)), "train-00000.safetensors: acts: found float32 ["),
        (MANIFEST, edited(lambda m: m.update(dtype="float16")), "acts: found float32 ["),
        (MANIFEST, edited(lambda m: m.update(shards=None)), "manifest.json: shards: found None, allowed: input should"),
        (MANIFEST, edited(lambda m: m.pop("width")), "manifest.json: width: found nothing, allowed: a value"),
        (MANIFEST, edited(lambda m: m.update(complete=False)), "the harvest is not complete"),
        (MANIFEST, b"", "manifest.json: not valid JSON"),
        ("activations/val-00000.safetensors", b"", "val-00000.safetensors: found 0 bytes, the manifest has"),
        ("activations/train-00001.safetensors", lambda whole: whole[:-1] + b"?", "train-00001.safetensors: sha256"),
        ("provenance.json", b"[]", "provenance.json: found [], allowed: input should be a valid dictionary"),
        ("provenance.json", b'{"phases": {"phase1": 1}}', "provenance.json: phases.phase1: found 1, allowed: "),
        ("config.yaml", b"run: [", "config.yaml: not readable as YAML"),
        ("phase1/geometry.safetensors", b"", "geometry.safetensors: not a complete safetensors file"),
        ("metrics.jsonl", b'{"step": 1}\n', "metrics.jsonl: line 1: not a metric: phase: found nothing, allowed: a"),
        ("metrics.jsonl", b'{"step": 1\n', "metrics.jsonl: line 1: "),
    ],
)  # fmt: skip
def test_files_of_a_run(harvested, name, change, words):
    path = harvested / name
    whole = path.read_bytes()
    path.write_bytes(change(whole) if callable(change) else change)
    before = contents(harvested)
    refused(hsae("phase2", *SMOKE, "--out", harvested), words)
    assert {file: digest for file, digest in contents(harvested).items() if not file.startswith("phase2/")} == before
    path.write_bytes(whole)
    shutil.rmtree(harvested / "phase2", ignore_errors=True)


def test_phases_run_alone_ask_again(harvested, finished, tmp_path):
    for setting, words in (
        ("training.batch_size=99999", "training.batch_size: found 99999, allowed: 1 to "),
        ("hsae.n_parents=5", "hsae.n_parents: found 5, allowed: at least the teacher's 8 parents"),
        ("hsae.subspace_dim=256", "hsae.subspace_dim: found 256, allowed: at most 255, the width less 1"),
    ):
        for phase in ("phase2", "phase3"):
            refused(hsae(phase, *SMOKE, "--set", setting, "--out", harvested), words)
            assert not (harvested / phase).exists()
    run = copy(finished, tmp_path / "run", phases=3)
    for layer, words in (
        ("layers.9", "allowed: layers.-6 to layers.5"),
        ("model.layers.2.mlp.act_fn", "allowed: width 256"),
    ):
        answer = hsae("phase4", *SMOKE, "--set", f"eval.steering.layers=[{layer}]", "--out", run)
        refused(answer, "eval.steering.layers: found ", words)
    assert not (run / "phase4").exists()


def test_models_and_records(finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    model, arm = run / "phase2/baseline/model", run / "phase2/baseline"
    (run / "phase4/results.json").write_text("{}")
    refused(hsae("phase4", *SMOKE, "--out", run), "results.json: model: found nothing, allowed: a value")
    (run / "phase4/results.json").unlink()
    whole = {path: path.read_bytes() for path in (model / "config.json", arm / "train.json")}
    for path, content, words in (
        (model / "config.json", "[]", "model/config.json: found [], allowed: input should be a valid dictionary"),
        (arm / "train.json", "{}", "baseline/train.json: arm: found nothing, allowed: a value"),
        (arm / "train.json", '{"steps": 1e999}', "baseline/train.json: not valid JSON (1e999 is not a number in JSON)"),
    ):
        path.write_text(content)
        refused(hsae("phase4", *SMOKE, "--out", run), words)
        path.write_bytes(whole[path])
    torch.save({"E": torch.zeros(2)}, model / "model.safetensors")
    refused(hsae("phase4", *SMOKE, "--out", run), "model/model.safetensors: not a complete safetensors file")
    (run / "phase1/concepts.json").write_text('{"parents": []}')
    refused(hsae("concepts", "smoke", "--out", run), "not the layout of concepts.json: parents: found [], allowed: ")


# -- disks that are full and folders that cannot be written


def limited(log: Path, arguments: list[object], *, size: int | None = None, user: int | None = None) -> tuple[int, str]:
    """Exit code and standard error of a command that may write files of `size` bytes, or runs as another user."""
    process = processes.Process(target=_limited, args=(str(log), [str(part) for part in arguments], size, user))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text()


def _limited(log: str, arguments: list[str], size: int | None, user: int | None) -> None:
    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stream, 2)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if user is not None and os.geteuid() == 0:
        os.setuid(user)
    sys.argv = ["hsae", *arguments]
    main()


def test_a_checkpoint_that_does_not_fit(harvested, finished, tmp_path):
    """A limit on files stands for a full disk; with more room the same command goes on."""
    command = ["phase2", "smoke", "--set", "run.threads=1", "--set", "arms=[{name: baseline}]", "--out", harvested]
    code, err = limited(tmp_path / "log", command, size=200_000)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "phase2/baseline/checkpoints/step-00000008.safetensors: cannot be written" in err
    assert list(files(harvested, "phase2")) == ["phase2/baseline/checkpoints/identity.json"]
    code, err = limited(tmp_path / "again", command)
    assert code == 0, err
    made, expected = (contents(run, "phase2/baseline") for run in (harvested, finished))
    assert without_cards(made) == without_cards(expected)


def test_folders_without_permission():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "log").touch()
        (folder / "log").chmod(0o666)
        for mode in (0o555, 0o000):
            folder.chmod(0o755)
            (folder / "closed").mkdir(exist_ok=True)
            (folder / "closed").chmod(mode)
            (folder / "log").write_text("")
            code, err = limited(folder / "log", ["run", "smoke", "--out", folder / "closed" / "run"], user=NOBODY)
            assert code == 2
            assert err.startswith(f"error: [Errno 13] Permission denied: '{folder}/closed/run")
            assert err.count("\n") == 1
