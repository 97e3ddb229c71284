# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup run test check bench notebooks clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready ## .venv with all that running and testing need

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: setup ## train GPT on built-in data and report (runs/RESULTS.md)
	$(BIN)/python -m recipes.gpt --devices 1
	$(BIN)/python -m scaling report runs --out runs/RESULTS.md

test: setup ## all tests: three at a time, then those that want the machine for themselves
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not alone and not gpu'
	$(BIN)/python -m pytest -m 'alone or gpu'

check: setup ## style, types, who may import whom, and whether RESULTS.md holds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scaling lint RESULTS.md

bench: setup ## counters against their baselines, and step times kept for this machine
	$(BIN)/python -m pytest tests/benchmarks --benchmark-autosave --benchmark-columns=median,iqr,mean,rounds

notebooks: setup ## run the notebooks and store their outputs
	$(BIN)/python -m recipes.notebooks

clean: ## remove what setup and runs made
	rm -rf .venv runs
