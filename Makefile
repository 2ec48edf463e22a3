# `make quickstart` and `make test` are all a fresh machine needs. What was interrupted goes on where it stopped.
#   make setup   .venv with what runs need      make dev   and what tests need

PYTHON ?= python3
BIN := .venv/bin
RUNS := .venv/.runs
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
# Two cores are busy with six processes of one thread each, since many tests wait. Files begin in the order of their names here.
PYTEST := $(BIN)/python -m pytest -p tests.workers --workers 6 -p tests.lines
LONGEST := tests/e2e/test_ray.py
# Packages come without bytecode. The first process that imports them writes it; otherwise each one would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup dev hello quickstart test check static unit tests coverage format clean

setup: $(RUNS)
	@echo "ready. next: source .venv/bin/activate"

dev: $(READY)

# With the tests' tools, what runs need is there too.
quickstart: hello $(if $(wildcard $(READY)),,$(RUNS))
	$(BIN)/qwench quickstart

hello:
	@echo "quickstart: Python packages into .venv (1.2 GB, more with CUDA; once), then a model is trained (about 3 minutes on two cores)"

define VENV
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Qwench needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@echo "== a virtual environment in .venv"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "== PyTorch"
	$(PIP) -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
endef

$(RUNS): pyproject.toml constraints.txt
	$(VENV)
	@echo "== the other packages"
	$(PIP) -c constraints.txt -e .
	@touch $@

$(READY): pyproject.toml constraints.txt
	$(VENV)
	@echo "== the other packages, and the tests' tools"
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

# Checks and tests run side by side: mypy alone would leave a core idle.
test: dev
	$(MAKE) --no-print-directory --jobs=2 static tests
	@echo "lines of the package that ran, in percent: $$($(BIN)/coverage report --format=total)"

check: dev
	$(MAKE) --no-print-directory --jobs=2 static unit

tests: dev
	$(PYTEST) $(LONGEST) tests/contract $(filter-out $(LONGEST),$(wildcard tests/e2e/test_*.py)) tests/unit

unit: dev
	$(PYTEST) tests/unit

static: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/sizes.py
	$(BIN)/python tests/structure.py
	$(BIN)/python tests/unused.py
	$(BIN)/mypy

# What the last `make test` did not run, by file and line.
coverage: dev
	$(BIN)/coverage report --show-missing

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
