# `make quickstart` and `make test` work on a machine with Python 3.11 or 3.12
# and pip, can be repeated, and install nothing the second time.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES = setup.py pyproject.toml constraints.txt

.PHONY: quickstart test test-all check clean

quickstart: $(VENV)/.run
	$(BIN)/mergejax quickstart

# Every promise once; further options, sizes and moments are marked `slow`.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not slow'
	@echo 'Tests marked slow were left out: make test-all runs them too.'

test-all: $(VENV)/.test
	MERGEJAX_TEST_OPTIMISED=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/floors_test.py

$(VENV)/.run: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[data,plots]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) quickstart
