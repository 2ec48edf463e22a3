# `make quickstart` and `make test` are all a fresh machine needs; both fill .venv through `make setup`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
# Two cores are busy with three processes of one thread each, since some tests wait. A file's tests share its fixtures, so they
# stay in one process. Files are begun in the order of the command line: the long ones first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=

.PHONY: setup quickstart test check static unit tests coverage format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Qwench needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: setup
	$(BIN)/qwench quickstart

# Checks and tests run side by side: mypy alone would leave a core idle.
test: setup
	$(MAKE) --no-print-directory --jobs=2 static tests
	@echo "lines of the package that ran, in percent: $$($(BIN)/coverage report --format=total)"

check: setup
	$(MAKE) --no-print-directory --jobs=2 static unit

tests: setup
	$(PYTEST) tests/contract tests/e2e tests/unit

unit: setup
	$(PYTEST) tests/unit

static: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/sizes.py
	$(BIN)/python tests/structure.py
	$(BIN)/python tests/unused.py
	$(BIN)/mypy

# What the last `make test` did not run, by file and line.
coverage: setup
	$(BIN)/coverage report --show-missing

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
