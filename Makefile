# `make demo` trains the embedded default end to end; `make test` passes the tests. Both set up what they need first.
PYTHON ?= python3
CORES := $(shell nproc)
# Tests that start processes run two at a time by default: a real run keeps 1.3 cores busy. On a machine with many cores,
# `make test WORKERS=4` shares them out; WORKERS=0 runs one after the other.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-fast gpu check fmt clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## install into .venv and compile DeepSpeed's operators, once

$(READY): pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable ".[dev]"
	$(BIN)/python -m orchestrator.engine.deepspeed_ops
	touch $(READY)

demo: setup  ## train, scrape, export and reload the embedded default
	$(BIN)/python -m orchestrator.cli.demo

test: setup  ## run all tests, some minutes; what each tier proves is in tests/README.md
	$(BIN)/python -m pytest --numprocesses $(CORES) -m "not process"
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --timeout 1800 -m "process and not alone"
	$(BIN)/python -m pytest -m "process and alone"

test-fast: setup  ## run the tests that start no process, before every commit
	$(BIN)/python -m pytest --numprocesses $(CORES) -m "not process"

gpu: setup  ## run the tests that need a GPU, and measure models of published sizes there
	$(BIN)/python -m pytest tests/gpu -s
	$(BIN)/python -m tests.gpu.figures

check: setup  ## ruff, mypy strict, import contracts, spelling and words, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.unit.words
	git ls-files -z | xargs -0 $(BIN)/codespell
	$(BIN)/shellcheck .ci/run

fmt: setup  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
