# Set-up, checks and documents. `make demo` and `make test` work on a fresh clone with Python >= 3.11 and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process a core, each of one thread; four at most, which takes some 4 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
PUBLIC := core configuration inversion fitting doctor scheduler models pipelines evaluation errors

.PHONY: demo test test-all lint types bench docs clean

$(VENV)/installed: pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ddim needs Python 3.11 or newer; set PYTHON=python3.11 or another.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,plot,text]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/ddim sample

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

test: lint types
	$(PYTEST)

test-all: lint types
	$(PYTEST) -m 'slow or not slow'

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py

docs: $(VENV)/installed
	$(BIN)/pdoc --docformat google --math --output-directory docs/api $(PUBLIC:%=ddim.%)

clean:
	rm -rf $(VENV) build dist docs/api out
