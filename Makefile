# Every target does its own set-up: a fresh clone needs nothing typed before. Another Python: make install PYTHON=...

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python 3.11 that really runs (a pyenv shim may exist and not run).
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$python && break; done)

# Test processes side by side. Each may start up to 4 ranks.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP)  ## Make .venv with the tested packages (once; again when they change).

$(STAMP): setup.py tools/setup_venv.py $(wildcard requirements/*.txt)
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: found no Python 3.11 (tried python3.11, python3, python); install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv; pyenv: pyenv install 3.11) or name it: make install PYTHON=/path/to/python3.11" >&2; \
		exit 2; fi
	@"$(PYTHON)" tools/setup_venv.py $(VENV)
	@touch $@

quickstart: install  ## Train a small model by RiskPO on this machine's CPU, evaluate it before and after.
	$(BIN)/riskpo sft examples/quickstart_sft.toml
	$(BIN)/riskpo train examples/quickstart_cpu.toml

test: install  ## Run all tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

lint: install  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install  ## Rewrite the sources in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv, caches and build products; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
