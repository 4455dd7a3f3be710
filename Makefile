PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-families test-kernels fuzz lint docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/core  ## install into .venv and run the quickstart
	$(BIN)/hsae run quickstart

test: .venv/dev  ## install the development tools and run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --ignore tests/ops --cov=polytope_hsae --cov-fail-under=85
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto tests/ops  # in Triton's interpreter, which coverage slows down

test-families: .venv/dev  ## run tiny models of 24 families of language models
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m '' tests/test_families.py tests/test_family_hooks.py

test-kernels: .venv/dev  ## run the kernels' tests on a CUDA GPU
	$(BIN)/pytest -m '' tests/ops

fuzz: .venv/dev  ## give every reader 10,000 broken files; takes an hour
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest tests/test_fuzz.py

lint: .venv/dev  ## check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/docs  ## build the documentation and check its links
	$(BIN)/mkdocs build --strict

wheel:  ## build the wheel and try it in an empty environment
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

clean:  ## remove .venv and built files
	rm -rf .venv build dist *.egg-info
