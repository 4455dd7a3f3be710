"""`hsae doctor`: every line follows from what is there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from running import hsae

from polytope_hsae import __version__, doctor
from polytope_hsae.config import PACKAGE
from polytope_hsae.doctor import Check


def test_a_sound_installation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = hsae("doctor")
    assert answer.code == 0, answer.out
    assert answer.err == ""
    lines = {line.split("  ")[0]: line for line in answer.out.splitlines() if line[0] != " "}
    assert {"python", "polytope-hsae", "torch", "transformers", "numpy", "cpu", "memory", "disk", "assets"} <= set(
        lines
    )
    assert __version__ in lines["polytope-hsae"]
    assert torch.__version__ in lines["torch"]
    assert str(tmp_path) in lines["disk"]
    assert "all as they were packaged" in lines["assets"]

    document = hsae("doctor", "--json")
    assert (document.code, document.err) == (0, "")
    found = json.loads(document.out)
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == list(lines)
    assert [check for check in found["checks"] if check["broken"]] == []


def test_packages():
    missing = doctor.dependency(Requirement("no-such-package>=1"))
    assert missing == Check("no-such-package", "missing", "pip install 'no-such-package>=1'", broken=True)
    assert doctor.dependency(Requirement("scikit-learn>=1")).advice is None
    old = doctor.dependency(Requirement("numpy<1"))
    assert not old.broken
    assert old.advice == "made for <1: pip install 'numpy<1'"


def test_a_package_that_cannot_be_imported(tmp_path):
    """In a new process, because this one needs the real torch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')\n")
    command = [sys.executable, "-c", "from polytope_hsae.cli import main; main()", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    lines = answer.stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("torch "))
    assert lines[place].endswith("cannot be imported: libtorch.so: cannot open shared object file")
    assert lines[place + 1].split(maxsplit=1)[0] == "broken:"
    assert any(line.startswith("assets ") for line in lines)


def test_damaged_assets(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE / "assets", tmp_path / "assets")
    (tmp_path / "data").mkdir()
    for packed in PACKAGE.glob("data/*.gz"):
        shutil.copy(packed, tmp_path / "data")
    assert doctor.assets(tmp_path / "assets").advice is None
    weights = tmp_path / "assets/textbook-lm-9m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (tmp_path / "assets/quickstart_tokens.safetensors").unlink()
    check = doctor.assets(tmp_path / "assets")
    assert check.broken
    assert check.found == "damaged: quickstart_tokens.safetensors, textbook-lm-9m/model.safetensors"
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    assert hsae("doctor").code == 1
    assert json.loads(hsae("doctor", "--json").out)["ok"] is False


def test_all_packaged_data_has_a_checksum():
    folder = PACKAGE / "assets"
    recorded = {(folder / line.split()[1]).resolve() for line in (folder / "SHA256SUMS").read_text().splitlines()}
    packaged = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert recorded == packaged - {folder / "SHA256SUMS"} | set(PACKAGE.glob("data/*.gz"))


@pytest.mark.parametrize(
    "driver, hidden, words",
    [(False, "", None), (True, None, "made for it?"), (True, "", "CUDA_VISIBLE_DEVICES= right?")],
)
def test_advice_where_there_is_no_cuda_device(tmp_path, monkeypatch, driver, hidden, words):
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", Path(__file__) if driver else tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    cuda, _ = doctor.accelerators()
    assert cuda.found == "no device"
    assert cuda.advice is None if words is None else words in cuda.advice


def memory_of(folder: Path, free_kb: int, limit: str) -> Check:
    (folder / "meminfo").write_text(f"MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: {free_kb} kB\n\n")
    (folder / "limit").write_text(limit)
    return doctor.memory(folder / "meminfo", folder / "limit")


def test_advice_on_too_little_of_anything(tmp_path, monkeypatch):
    assert memory_of(tmp_path, 4_000_000, "max\n") == Check("memory", "8.2 GB, 4.1 GB free")
    assert memory_of(tmp_path, 1_000_000, "max\n").advice == "the quickstart takes 1.5 GB"
    assert memory_of(tmp_path, 4_000_000, "1000000000\n").found == "8.2 GB, 4.1 GB free, limited to 1.0 GB"
    for cores in (1, 8):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert f"--set run.threads={cores}" in doctor.cpu().advice
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e8, total=1e12))
    assert doctor.disk(tmp_path).found == f"100 MB free of 1.0 TB in {tmp_path}"
    assert "--out" in doctor.disk(tmp_path).advice


def test_cuda_devices(monkeypatch):
    cards = [SimpleNamespace(name="New", major=9, minor=0), SimpleNamespace(name="Old", major=6, minor=1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (10e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90a", "sm_75", "compute_120"])
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert list(doctor.accelerators()) == [
        Check("cuda:0", "New, 80 GB, 10 GB free, capability 9.0"),
        Check(
            "cuda:1",
            "Old, 80 GB, 10 GB free, capability 6.1",
            "this build of torch begins at sm_75: install one for older devices",
        ),
        Check("triton", "not installed", "there is a CUDA device: pip install triton"),
    ]
