# make run    build .venv from requirements.lock and start Sluice on http://127.0.0.1:4001
# make test   the same with the test tools, then every test that this machine can run; REQUIRE_ALL=1 allows no skip
# make lint   ruff and mypy --strict          make audit  known vulnerabilities among the pinned packages
# make bench  Sluice beside its peers (12 minutes; QUICK=1: less than 2), or with CURVES=1 how the cost grows, and plots
# make lock   pin anew after a change in pyproject.toml

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4)))  # of the tests, most of which wait for something

.PHONY: run test lint audit bench lock clean
.DELETE_ON_ERROR:

run: $(VENV)/runtime
	@exec $(PY) run.py

test: $(VENV)/dev
	$(PY) -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

audit: $(VENV)/dev
	$(PY) -m pip_audit --require-hashes --disable-pip -r requirements.lock

bench: $(VENV)/dev
	$(PY) -m ops.bench$(if $(CURVES),.curves,$(if $(QUICK), --quick)) $(BENCH_ARGS)

LOCK := $(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --quiet

lock: $(VENV)/dev
	$(LOCK) --upgrade -o requirements.lock
	$(LOCK) --upgrade -c requirements.lock --group dev -o requirements-dev.lock

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Sluice needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/runtime: requirements.lock | $(VENV)/python
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(VENV)/dev: requirements-dev.lock | $(VENV)/python
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@ $(VENV)/runtime

clean:
	rm -rf $(VENV) .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis
