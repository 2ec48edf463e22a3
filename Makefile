# `make quickstart` and `make test` are all a fresh machine needs; both fill .venv through `make setup`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
# Two processes of one thread each suit a small machine; a file's tests share its fixtures, so they stay in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=

.PHONY: setup quickstart test check coverage format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Qwench needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: setup
	$(BIN)/qwench quickstart

test: check
	$(PYTEST) --cov-append tests/contract tests/e2e
	@echo "lines of the package that ran, in percent: $$($(BIN)/coverage report --format=total)"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/sizes.py
	$(BIN)/python tests/structure.py
	$(BIN)/python tests/unused.py
	$(BIN)/mypy
	$(PYTEST) tests/unit

# What the last `make test` did not run, by file and line.
coverage: setup
	$(BIN)/coverage report --show-missing

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs
