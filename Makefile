# `make help` says what there is. Needs python3 (3.11 or newer), make and git; the first target makes the environment.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python
# Where Fashion-MNIST may lie already; the demo finds or fetches it otherwise.
DATA_ROOT ?= $(wildcard ../shared/data)
ARGS ?=

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env:  ## .venv, on top of a cached environment (see infra/env.sh)
	@infra/env.sh dev

demo: env  ## train, fine-tune, evaluate and fetch a small ViT on real images (STAY=1: leave the server running)
	@$(PYTHON) -m orchestrator.cli.main demo $(if $(DATA_ROOT),--data-root $(DATA_ROOT)) $(if $(STAY),--stay)

pictures: env  ## draw the pictures of docs/pictures.md: of the demo's model (the demo runs first) and of a hybrid trained like it
	@$(PYTHON) -m orchestrator.cli.main gallery $(if $(DATA_ROOT),--data-root $(DATA_ROOT)) $(ARGS)

test: debian env  ## the tests, for example make test ARGS='tests/vit -x'
	@infra/test.sh $(PYTHON) $(ARGS)

debian:  ## what the tests need of Debian, where it is missing (as root, or by sudo)
	@infra/debian.sh

soak: env  ## a real job whose parts are killed at random, then the same weights: make soak MINUTES=10 SEED=0
	$(PYTHON) -m tests.faults.soak --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

search-check: env  ## searches whose driver and API are killed, a population, 50 tiny trials: make search-check ARGS='--only killed'
	$(PYTHON) -m tests.faults.search_check $(ARGS)

gpu-check: env  ## where there is a GPU: ZeRO parity, exact resume, NCCL, MFU and memory of B/L/H, into gpu-check.json
	$(PYTHON) -m tests.gpu.check $(ARGS)

screenshots: env  ## every page of the dashboard, light, dark and narrow, of a real stack with real jobs, into screenshots/
	$(PYTHON) -m tests.dashboard.screenshots --out screenshots $(ARGS)

bench: env  ## against opponents, measured: make bench NAME=save_stall ARGS='--repetitions 5'; all without NAME
	$(PYTHON) -m tests.benchmarks $(NAME) -- $(ARGS)

experiments: env  ## small ones after the paper's, by real jobs: make experiments NAME=claim ARGS='--parallel 2'; all without NAME
	$(PYTHON) -m tests.experiments $(NAME) -- $(ARGS)

check: env lint types test  ## lint, types and tests

lint: env  ## ruff, its formatter, and the import rules between packages
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

types: env  ## mypy, strict
	$(PYTHON) -m mypy

wheel: env  ## dist/*.whl
	$(PYTHON) -m build --wheel --no-isolation

clean:  ## remove what was made here (not the cached environment)
	rm -rf .venv dist build demo-out bench-out experiments-out screenshots .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help debian env demo pictures test soak search-check gpu-check screenshots bench experiments check lint types wheel clean
