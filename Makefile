# The newcomer's commands. They need Python 3.11 or newer, with venv, and make.
PYTHON ?= python3
BIN := .venv/bin

help:  ## List these targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

run: .venv/run  ## Serve on 127.0.0.1:8000, with sample messages where there are none.
	@$(BIN)/flask queues --json | grep -q . || $(BIN)/python examples/sample.py | $(BIN)/flask load -
	$(BIN)/gunicorn wsgi:app

test: check  ## Check the code, and run every test.
	$(BIN)/pytest

bench: .venv/dev  ## Measure it, beside bare SQL: docs/performance.json and .png. It takes an hour and a half, and 20 GB.
	$(BIN)/python bench/run.py

check: .venv/dev  ## Lint, formatting and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## Remove the virtual environment, the store with its messages, and those of the benchmark.
	rm -rf .venv instance bench/stores

.venv/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: help run test bench check clean
