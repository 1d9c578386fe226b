PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

CHECK_PYTHON := import sys; print("ok" if sys.version_info >= (3, 10) else "")

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(if $(shell $(PYTHON) -c '$(CHECK_PYTHON)' 2>&1 | grep -x ok),,$(error torchbilevel needs Python 3.10 or newer, '$(PYTHON)' is not: try make PYTHON=python3.11))
	@echo "Setting up $(VENV) from constraints.txt; the first time takes some minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## run the two examples that show what the package is for
	$(BIN)/python -m examples.octopus
	$(BIN)/python -m examples.hyper_cleaning

test: lint types  ## everything that CI checks: lint, types, tests
	$(BIN)/pytest -q

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## mypy on the package
	$(BIN)/mypy --strict torchbilevel

bench: $(STAMP)  ## run the benchmarks
	$(BIN)/python -m benchmarks

clean:  ## remove caches and build output, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
