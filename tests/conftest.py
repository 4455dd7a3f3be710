"""What several test files share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # asked when kernels are defined: they run in the interpreter

import sweeps
from running import SMOKE, hsae
from tiny import save_family

from polytope_hsae.phases.run import Run


@pytest.fixture(scope="session", autouse=True)
def sigint_is_heard():
    """A background shell leaves SIGINT ignored; the tests of Ctrl-C need Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Other numbers of threads round sums otherwise, and training amplifies it: tests have one on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def tables_have_room():
    """A test runner may set COLUMNS, which would fold the tables that tests look for words in."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted `hsae run smoke`, with one more arm whose teacher rows are frozen. Read only."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    answer = hsae("run", *SMOKE, "--out", folder)
    assert answer.code == 0, answer.err
    assert "Targets" in answer.out
    return folder


@pytest.fixture
def run(finished) -> Iterator[Run]:
    """That folder, opened to read."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield Run.open(finished, "cpu", quiet=True)
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory) -> Path:
    """A tiny language model, and the cache that all sweeps share."""
    folder = tmp_path_factory.mktemp("fixtures")
    save_family(folder / "lm", "llama")
    return folder


@pytest.fixture(scope="session")
def grid(tmp_path_factory, fixtures) -> Path:
    """The folder of a finished grid of learning rates. Read only."""
    folder = tmp_path_factory.mktemp("grid")
    answer = sweeps.run(sweeps.written(folder, sweeps.GRID), folder / "out", fixtures)
    assert answer.code == 0, answer.err
    return folder / "out"
