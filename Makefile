# make demo        convert a small Transformer, measure it, and let it write: see examples/demo.py
#                  make demo TEACHER=<hub id or path> DATA=<file>
# make test        everything but the slow tests (builds .venv first if needed)
# make test-slow   the slow tests
# make lint        ruff, formatting, and the linter of transformers for modelling files
# make format      rewrite files the way `make lint` wants them
# make venv        build or refresh .venv from constraints.txt
# make clean       remove build products and caches (not .venv)
#
# ARGS goes to pytest, or to the demo: make test ARGS="tests/test_import.py -x"

PYTHON ?= python3
ARGS ?=
# One single-threaded process per core: the tensors of tests are too small to share one between threads.
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed-from-constraints

.DEFAULT_GOAL := test
.PHONY: venv demo test test-slow lint format clean

venv: $(READY)

# The stamp is removed first and written last, so that an interrupted install is done again.
$(READY): constraints.txt pyproject.toml
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "hf-memory needs Python 3.11 or newer, and '$(PYTHON)' is not. Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }; \
		echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress hf_memory

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
