# One word each. `make demo` and `make test` set everything up in .venv first; run them in either order, as often as you like.

.DEFAULT_GOAL := help
SHELL := /bin/bash
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

# Python 3.11 with megatron-core 0.16 where it is at hand, else Python 3.12 with megatron-core 0.19 (override: make PYTHON=...)
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
MODELOPT := .venv-modelopt
# Python 3.12 under its own name, or the newest one that pyenv has
NEWEST_PYTHON ?= $(shell for p in python3.12 $$(PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -1) pyenv which python3.12 2>/dev/null); do $$p -c '' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup slurm demo test test-long test-newest test-modelopt lint types contract format

help:
	@echo "make demo         set up, run the UltraLong recipe on the tiny model (two CPU cores, minutes), write runs/tiny-cpu/report.html"
	@echo "make test         set up, run the test suite"
	@echo "make test-newest  the suite on Python 3.12 with megatron-core 0.19 and transformers 5 (in $(NEWEST))"
	@echo "make test-long    a training step at 262,144 tokens on the CPU against plain float64, a job preempted ten times (minutes)"
	@echo "make slurm        as root on Debian or Ubuntu: the packages for the tests on a real SLURM, where they are missing"
	@echo "make test-modelopt  calibrated FP8 with nvidia-modelopt on Python 3.11 (in $(MODELOPT); it pins transformers below 5)"
	@echo "make lint types contract   ruff, mypy, import-linter"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints/py311.txt constraints/py312.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or say which: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== setting up $(VENV) with $(PYTHON) (once; torch is the large part)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; print("constraints/py%d%d.txt" % sys.version_info[:2])' > $(VENV)/constraints
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$$(cat $(VENV)/constraints)" torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c "$$(cat $(VENV)/constraints)" -e '.[dev]'
	@touch $@

# the tests that need them skip, with the reason, where they are not there
slurm:
	@tools/install_slurm.sh

demo: setup
	@echo "== the UltraLong recipe on the tiny model: 512 -> 4,096 tokens"
	$(BIN)/mcore-longctx run tiny-cpu

test: setup
	@echo "== tests"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: setup
	@echo "== a step at 262,144 tokens; a job preempted ten times on a real SLURM"
	$(BIN)/python -m pytest -m 'long and not gpu' $(PYTEST_ARGS)

test-newest:
	@test -n "$(NEWEST_PYTHON)" || { echo "make: no Python 3.12 found; install one, or say which: make test-newest NEWEST_PYTHON=/path/to/python3.12"; exit 2; }
	$(MAKE) test VENV=$(NEWEST) PYTHON=$(NEWEST_PYTHON)

# nvidia-modelopt is large, patches what it finds when it is imported, and pins transformers: it has an environment of its own
test-modelopt:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: needs Python 3.11; say which: make test-modelopt PYTHON=/path/to/python3.11"; exit 2; }
	$(MAKE) setup VENV=$(MODELOPT) PYTHON=$(PYTHON)
	$(MODELOPT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/py311.txt -e '.[dev,quantize]'
	$(MODELOPT)/bin/python -m pytest tests/model/test_quantize.py tests/cli/test_quantize.py tests/cli/test_quantize_docs.py tests/convert/test_fp8.py $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contract: setup
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
