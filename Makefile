# make demo: install into .venv and run the quickstart. make test: install what tests need and run them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: .venv/core
	$(BIN)/hsae run quickstart

test: .venv/dev
	$(BIN)/pytest --cov=polytope_hsae --cov-fail-under=85

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch comes first and pinned: elsewhere than on a CPU-only machine this pin also brings CUDA packages.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/core
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
