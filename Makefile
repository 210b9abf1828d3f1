# They need make, and Python 3.11 or newer with venv. Another Python than python3: make test PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes

help:  ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' Makefile

run: .venv/run  ## Serve on 127.0.0.1:8000. The default store gets sample messages while it is empty.
	@test -n "$${REBIND_DATABASE_URL+set}" || $(BIN)/flask queues --json 2>/dev/null | grep -q . \
		|| $(BIN)/python examples/sample.py | $(BIN)/flask load -
	$(BIN)/gunicorn wsgi:app

check: lint  ## Check style, formatting and types, and run the fast tests.
	$(BIN)/pytest -m "not slow" -n auto --dist worksteal

test: lint  ## The same with every test. This is what CI runs.
	$(BIN)/pytest -n auto --dist worksteal

bench: .venv/dev  ## Measure the speed, for docs/performance.md. Takes 40 minutes, and 30 GB.
	$(BIN)/python bench/run.py

bench-millions: .venv/dev  ## Measure what grows with the store, up to ten million messages. Takes 20 minutes, and 30 GB.
	$(BIN)/python bench/millions.py

clean:  ## Remove all that make created, except messages: the default store is instance/queues.db.
	rm -rf .venv .hypothesis .*_cache bench/stores

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	@touch $@

.PHONY: help run check test bench bench-millions clean lint
