# Set-up, checks and documents. `make demo` and `make test` work on a fresh clone; they need pip and
# Python >= 3.11.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
DIST_PYTHONS ?= python3.11 python3.12 python3.13
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# One process per core, each with one thread. At most four, which take about 4 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint $(CONSTRAINTS)
# A module is compiled when it is first imported, and kept: else every process of the tests compiles
# all of diffusers anew, which takes longer than most of them.
unexport PYTHONDONTWRITEBYTECODE
OLD_PYTHON = ddim needs Python 3.11 or newer; set PYTHON=python3.11 or another.

.PHONY: demo test test-all test-oldest pytest lint types bench docs dist clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS) requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("$(OLD_PYTHON)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --requirement requirements-dev.txt
	$(PIP_INSTALL) --editable '.[train,plot,text,evaluate,shards,ray,studio]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/ddim sample

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

test: lint types pytest

pytest: $(VENV)/installed
	$(PYTEST) $(PYTEST_OPTIONS)

test-all: PYTEST_OPTIONS = -m 'slow or not slow'
test-all: test

# The fast tests with the oldest versions, in an environment of their own.
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON) CONSTRAINTS=constraints-oldest.txt

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Source and wheel, checked: metadata, contents, and use in an empty environment of each Python.
dist: $(VENV)/installed
	$(PIP_INSTALL) build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python packaging/check_dist.py dist --python $(DIST_PYTHONS)

clean:
	rm -rf $(VENV) .venv-oldest build dist docs/_build out
