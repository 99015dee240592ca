# `make demo` trains a small model with every real part; `make test` runs all tests. Both set up what they need.
# Needed beforehand: Python 3.11 or newer as python3 (PYTHON=... names another) with pip, and a package index.
# Runtimes also need Python 3.12 or 3.13 somewhere: hpc-gym looks on PATH and among pyenv's and uv's versions.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help bootstrap demo demo-seeds test test-fast test-slurm lint unit bench runtimes locks tables clean
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv --quiet --no-progress
UV_VERSION := $(shell sed -n 's/^uv==//p' locks/base.txt)
STAMP := $(VENV)/.installed

# Byte code is written once here, or compiled again at every start. The others would lead out of the venv.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME VIRTUAL_ENV

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

bootstrap: $(STAMP) ## set up .venv: the base install and the development tools

$(STAMP): locks/base.txt locks/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "hpc-gym needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo not there)." >&2; \
	  echo "Install one (apt-get install python3, or pyenv), or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) -V) and uv $(UV_VERSION)"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(BIN)/uv --version 2>/dev/null | grep -q '^uv $(UV_VERSION)' || \
	  $(PYTHON) -m pip --python $(BIN)/python --quiet --disable-pip-version-check install uv==$(UV_VERSION) || { \
	  echo "uv could not be installed with '$(PYTHON) -m pip'. Is pip there (apt-get install python3-pip), and the" >&2; \
	  echo "package index within reach (PIP_INDEX_URL)?" >&2; exit 2; }
	@echo "Installing the base set and the development tools"
	@$(UV) pip install --python $(BIN)/python --compile-bytecode -r locks/base.txt
	@$(UV) pip install --python $(BIN)/python -r locks/dev.txt
	@$(UV) pip install --python $(BIN)/python --no-build-isolation --no-deps --editable .
	@touch $@

demo: bootstrap ## train a small model on two environments, from nothing to a reward curve
	@$(BIN)/hpc-gym demo

demo-seeds: bootstrap ## the demo with five seeds that were not used for tuning: does it learn in each?
	@$(BIN)/python benchmarks/demo_seeds.py

runtimes: bootstrap ## build the runtimes that the roles run in
	@$(BIN)/hpc-gym runtimes build

test: test-fast runtimes ## all tests: the fast ones, the real vLLM, NeMo Gym, TRL and DeepSpeed, jobs on a real Slurm
	@echo "Tests with the real parts"
	@$(BIN)/pytest --quiet --durations=12 -m e2e tests/e2e
	@$(MAKE) test-slurm

test-slurm: bootstrap runtimes ## jobs on a real multi-node Slurm in namespaces (root, Debian); elsewhere it says why not
	@echo "Small programs as jobs on a real Slurm: a cluster's day, on two clusters at once"
	@$(BIN)/pytest --quiet --numprocesses 2 -m "slurm and not e2e" tests/slurm
	@echo "Jobs with the real parts on a real Slurm"
	@$(BIN)/pytest --quiet --durations=12 -m "slurm and e2e" tests/slurm

test-fast: bootstrap ## lint, types, import rules and unit tests, side by side
	@$(MAKE) --jobs=2 --output-sync=target lint unit

lint: bootstrap ## ruff, mypy in strict mode, import rules
	@$(BIN)/ruff check --quiet . && echo "ruff: no findings"
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

unit: bootstrap
	@$(BIN)/pytest --quiet -m "not e2e and not slurm" tests/unit

# Not demo_seeds.py, which has its own target, and not slurm.py, which takes half an hour on the cluster of tests/slurm.
BENCHMARKS := $(addprefix benchmarks/,cli.py logs.py seeing.py trajectories.py startup.py)

bench: bootstrap ## the benchmarks of this machine; they write benchmarks/RESULTS.md
	@for each in $(BENCHMARKS); do echo "$$each"; $(BIN)/python "$$each"; done

locks: bootstrap ## make the locks again; UPGRADE=1 takes the newest versions
	@$(BIN)/python -m hpc_gym.runtimes.compile $(if $(UPGRADE),--upgrade)

tables: runtimes ## read the option tables out of the runtimes again
	@$(BIN)/python -m hpc_gym.runtimes.extract

clean: ## remove what make made here; runtimes stay in ~/.cache/hpc-gym
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find hpc_gym tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
