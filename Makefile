# make demo: install into .venv and run the quickstart. make test: install what tests need and run them.
# make test-families: tiny models of 24 families. make test-kernels: the kernels on a GPU. make fuzz: 10,000 broken inputs for every reader, for an hour. make lint: formatting, types, layers. make docs: build the documentation, links checked. make wheel: build the wheel and try it in an empty environment.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-families test-kernels fuzz lint docs wheel clean

demo: .venv/core
	$(BIN)/hsae run quickstart

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --ignore tests/ops --cov=polytope_hsae --cov-fail-under=85
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto tests/ops  # in Triton's interpreter, which coverage slows down

test-families: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m '' tests/test_families.py tests/test_family_hooks.py

test-kernels: .venv/dev
	$(BIN)/pytest -m '' tests/ops

fuzz: .venv/dev
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest tests/test_fuzz.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/docs
	$(BIN)/mkdocs build --strict

wheel:
	scripts/try_wheel.sh $(PYTHON)

# torch comes first and pinned: elsewhere than on a CPU-only machine this pin also brings CUDA packages.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/core
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/docs: .venv/core
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
