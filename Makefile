# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
# `make test TORCH=next` runs the tests with the torch of constraints-next.txt, in .venv-next; `make
# check TORCH=next` checks the types against it.
TORCH ?=
OPTIONS ?=
VENV := .venv$(if $(TORCH),-$(TORCH))
PINS := constraints.txt $(if $(TORCH),constraints-$(TORCH).txt)
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
# Containers often set this, and each process would then compile all of torch again, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup run plan-of-run test check bench bench-check counters-check times-check self-test bench-instructions notebooks clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(VENV)/constraints.txt

setup: $(VENV)/.ready ## .venv with all that running and testing need

$(VENV)/constraints.txt: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@awk -F== '!seen[$$1]++' $(lastword $(PINS)) $(PINS) > $@ # the last file wins

# Modules are compiled when they are first imported: compiling all of them takes longer than installing them.
$(VENV)/.runtime: pyproject.toml $(VENV)/constraints.txt
	@echo "installing the packages that running needs into $(VENV): usually 1 to 3 minutes"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/constraints.txt
	@echo "installing the packages that running and testing need into $(VENV): usually 1 to 3 minutes"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.runtime $@

# Without an NVIDIA GPU, fewer steps than the recipe's, to end within minutes: validation loss 6.02 in place of 5.50;
# the unigram baseline has 6.82.
RUN_OPTIONS ?= $(shell command -v nvidia-smi >/dev/null || echo --max-steps 60 --optimizer.schedule-steps 60 --validate-every 30)

run: plan-of-run $(VENV)/.runtime ## train GPT on built-in data and report (runs/RESULTS.md)
	$(BIN)/python -m recipes.gpt --devices 1 $(RUN_OPTIONS)
	$(BIN)/python -m scaling report runs --out runs/RESULTS.md

plan-of-run:
	@echo "make run: sets up .venv if there is none, trains GPT (89 M parameters) on built-in text, writes runs/RESULTS.md."
	@echo "On two CPU cores this takes about 5 minutes, 1 to 3 of them set-up; training prints an estimate for this machine."

# Only these files are imported a second time.
ALONE = $(sort $(shell grep -rlE 'mark\.(alone|gpu)' --include='test_*.py' tests))

# OPTIONS=--whole-proof runs the long form of every proof.
test: setup ## all tests: three at a time, then those that want the machine for themselves
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not alone and not gpu' $(OPTIONS)
	$(BIN)/python -m pytest -m 'alone or gpu' $(OPTIONS) $(ALONE)

# Code, documents, and what the commands print; CHANGELOG and EXPERIMENTS quote old names.
SPELLED = unitransformer recipes scaling slurm tests findings README.md CONTRIBUTING.md RESULTS.md pyproject.toml Makefile

check: setup ## style, types, spelling, who may import whom, and whether RESULTS.md holds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $(SPELLED)
	$(BIN)/codespell --dictionary tests/contracts/old_words.txt --regex [A-Za-z]+ $(SPELLED)
	$(BIN)/python -m scaling lint RESULTS.md

bench: setup ## counters against their baselines, and step times beside the last ones of this machine
	$(BIN)/python -m pytest tests/benchmarks --benchmark-autosave --benchmark-compare --benchmark-columns=median,iqr,mean,rounds

# What the files are compared with, and in which recipes.
BASE ?= $(shell git merge-base HEAD main 2>/dev/null || git merge-base HEAD origin/HEAD 2>/dev/null)
RECIPES ?= bert gpt vit
STEP = --data synthetic --batch-size 8 --model.width 128 --model.num-layers 2 --model.num-heads 4 --model.feedforward-width 512
TEXT = --model.num-classes 2000 --model.num-positions 128
SHAPE_bert = $(TEXT)
SHAPE_gpt = $(TEXT)
SHAPE_vit = --model.image-size 64 --model.patch-size 16

bench-check: counters-check times-check ## whether these files are slower than BASE=REVISION (main)

counters-check: setup ## counters of a step against their baselines, or against BASE=REVISION (main) without some
	$(BIN)/python -m pytest tests/benchmarks/test_counters.py --must-compare $(addprefix --base ,$(BASE))

# Every recipe is compared, whatever the others' verdicts are; the first one that is no pass is the exit code.
times-check: setup ## step times in pairs against BASE=REVISION (main)
	@test -n "$(BASE)" || { echo "error: no branch main to compare with; name a revision: make $@ BASE=REVISION" >&2; exit 2; }
	@first=0; $(foreach recipe,$(RECIPES),$(BIN)/python -m scaling compare $(BASE) . -- $(recipe) $(STEP) $(SHAPE_$(recipe)) || \
		{ code=$$?; test $$first != 0 || first=$$code; };) exit $$first

self-test: setup ## whether the verdicts on step times hold on this machine, under load (3 minutes)
	$(BIN)/python -m scaling compare --self-test $(OPTIONS)

bench-instructions: setup ## instructions of a step against their baseline (valgrind, 3 minutes)
	$(BIN)/python -m pytest tests/benchmarks/test_instructions.py --whole-proof --must-compare $(OPTIONS)

notebooks: setup ## run the notebooks and store their outputs
	$(BIN)/python -m recipes.notebooks

clean: ## remove what setup and runs made
	rm -rf .venv .venv-* runs
