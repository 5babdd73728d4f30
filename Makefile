# `make` alone lists the commands. Everything runs inside .venv, which `make setup` builds and the others build if it is missing.

PYTHON ?= python3
DATA ?= shapes
KILLS ?= 100
SEED ?= 0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The two quickstarts differ in these alone.
CONFIGS_shapes := --config examples/configs/tiny.yaml
CONFIGS_emoji := --config examples/configs/tiny.yaml --config examples/configs/tiny_emoji.yaml
CONFIGS = $(or $(CONFIGS_$(DATA)),$(error DATA is "$(DATA)", but must be shapes or emoji))
RUN_DIR := runs/quickstart$(if $(filter-out shapes,$(DATA)),-$(DATA))

.PHONY: help setup quickstart chaos test check format clean

help: ## list the commands
	@echo 'make COMMAND, where COMMAND is one of'
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.complete ## build .venv with everything pinned; does nothing when it is up to date

# torch goes first and alone: it decides which build (CPU or CUDA) the rest is installed beside, and nothing may replace it.
.venv/.complete: requirements.txt requirements-demo.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or later: make PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	python -m pip install --quiet -r requirements-dev.txt
	python -m pip install --quiet --no-deps --editable .
	touch $@

data/$(DATA)/index.json: | .venv/.complete
	python tools/prepare_data.py $(DATA) --out data/$(DATA)

# One process uses all cores (or OMP_NUM_THREADS of them, which nproc heeds). A run that was interrupted goes on; a finished one
# is only drawn and scored again.
quickstart: .venv/.complete data/$(DATA)/index.json ## train a tiny model, draw and score it (DATA=shapes or emoji)
	OMP_NUM_THREADS=$$(nproc) bash examples/pretrain_mmar_tiny.sh $(CONFIGS) --run_dir $(RUN_DIR)
	python tools/plot_run.py $(RUN_DIR) --out $(RUN_DIR)/curves.png
	@missed=0; OMP_NUM_THREADS=$$(nproc) python tools/evaluate.py --run_dir $(RUN_DIR) || missed=$$?; \
	printf '\n$(RUN_DIR)/ has\n'; \
	printf '  %-15s %s\n' \
	  curves.png 'losses, rates and whether each side follows the other' \
	  samples.png 'held-out captions with the images drawn for them' \
	  scores.json 'the scores above' \
	  metrics.jsonl 'every logged step; TensorBoard has the same in tensorboard/' \
	  checkpoints/ 'the model, to go on from or to sample from'; \
	exit $$missed

chaos: .venv/.complete ## kill a tiny run 100 times, damage its checkpoints, compare every step (KILLS=N, SEED=N)
	rm -rf runs/chaos
	python tools/chaos.py --out runs/chaos --kills $(KILLS) --seed $(SEED)

# A file at a time in each of two processes. More would help little: most of the time goes to groups of up to four processes.
test: .venv/.complete ## run every test
	python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.complete ## formatting, lint, types and shell scripts
	ruff format --check
	ruff check
	mypy
	shellcheck examples/*.sh examples/*/*.sh .ci/run

format: .venv/.complete ## put the code into its format, with what lint can mend by itself
	ruff format
	ruff check --fix

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
