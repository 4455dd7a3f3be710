"""What several test files share."""

import os
import signal
from pathlib import Path

import pytest
from running import SMOKE, hsae


@pytest.fixture(scope="session", autouse=True)
def sigint_is_heard():
    """A background shell leaves SIGINT ignored; the tests of Ctrl-C need Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
