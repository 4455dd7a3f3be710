"""What is packaged: every file of the package, and nothing else. Built here, not installed (`make wheel` does that)."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {
    "assets/SHA256SUMS",
    "assets/quickstart_tokens.safetensors",
    "assets/textbook-lm-9m/model.safetensors",
    "configs/quickstart.yaml",
    "data/WORDNET_LICENSE.txt",
    "data/wordnet_nouns.json.gz",
    "report/templates/report.html",
    "py.typed",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads, with a test beside it, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "polytope_hsae", folder / "polytope_hsae", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests/test_nothing.py").touch()
    return folder


def built(source: Path, kind: str, target: Path) -> Path:
    """Build a wheel or an sdist with the environment's setuptools."""
    command = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=source, check=True, capture_output=True, timeout=120)
    (made,) = target.iterdir()
    return made


def test_the_wheel_has_the_package_and_nothing_else(source, tmp_path):
    with zipfile.ZipFile(built(source, "wheel", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    package = {path.relative_to(source).as_posix() for path in source.glob("polytope_hsae/**/*") if path.is_file()}
    assert {f"polytope_hsae/{name}" for name in NEEDED} <= package
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == package
    assert {name.split("/", 1)[1] for name in metadata} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE",
    }  # fmt: skip
