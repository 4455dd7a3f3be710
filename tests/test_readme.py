"""Every command and the library example of README.md run, on the finished smoke run in place of the quickstart's.

`import-jax` runs in test_jax_compat.py, which makes a checkpoint for it, `study`, `findings` and `synthetic` in their
own tests, on tiny studies.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from running import SMOKE, hsae

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line.strip()
]
ELSEWHERE = ("hsae import-jax", "hsae study", "hsae findings", "hsae synthetic")
HSAE = [command for command in COMMANDS if command.startswith("hsae ") and not command.startswith(ELSEWHERE)]
RUN = "runs/quickstart"


def test_the_commands_are_found():
    assert [command for command in COMMANDS if not command.startswith("hsae ")] == ["make demo", "make test"]
    assert len(HSAE) >= 8


@pytest.mark.parametrize("command, does", [("make demo", "hsae run quickstart"), ("make test", "pytest")])
def test_the_make_targets_do_what_the_readme_says(command, does):
    shown = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert does in shown.stdout


@pytest.mark.parametrize("command", HSAE)
def test_every_hsae_command_runs(finished, tmp_path, monkeypatch, command):
    """`quickstart` becomes the smoke config on a copy of its finished folder; another model a tiny one."""
    run = shutil.copytree(finished, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    arguments = []
    for part in shlex.split(command)[1:]:
        if part == "quickstart":
            arguments += [*SMOKE]
        elif part.startswith("model.name="):
            arguments.append(f"model.name={tiny.save_family(tmp_path / 'model', 'llama')}")
        elif part.startswith("corpus.path="):
            (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
            arguments.append("corpus.path=my.txt")
        else:
            arguments.append(part)
    if "quickstart" in command.split() and "--out" not in arguments and not command.startswith("hsae concepts"):
        arguments += ["--out", str(run)]
    answer = hsae(*arguments)
    assert answer.code == 0, answer.err
    assert answer.out


TEXT = "\n\n".join(f"The farmer fed the horse and the dog by the river. It was day {day}." for day in range(400))


def test_the_library_example_runs(finished, tmp_path, monkeypatch, capsys):
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    shutil.copytree(finished, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_file_tree_is_the_real_one():
    (tree,) = [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL) if "cli.py  " in text]
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        place = ROOT / "polytope_hsae" if line.startswith("  ") else ROOT
        assert (place / name.rstrip("/")).exists(), name
    for name in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / name).exists(), name
