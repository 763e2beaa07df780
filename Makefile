# Every target first installs requirements.lock into .venv, so `make demo` and `make test` are all that you need.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo check test faults cluster soak fuzz evaluate audit lint lock schemas docs clean

help:
	@echo 'make demo      judge a dozen drawn images from submission to verdict, with embedded backends'
	@echo 'make check     lint, type-check and run the tests that need no server: minutes'
	@echo 'make test      lint, type-check and run the tests, also those with servers, as CI does'
	@echo 'make faults    break every part in turn under load; SEED=7 for other faults, SHORT=1 for a short form'
	@echo 'make cluster   lose and suspend nodes of a Ray cluster; takes ten minutes'
	@echo 'make soak      run for MINUTES=30 at half of the sustained rate; fails if anything grows'
	@echo 'make fuzz      try CASES=100000 hostile messages and pictures'
	@echo 'make evaluate  judge some hundred drawn images; write the figures to docs/evaluation'
	@echo 'make audit     check requirements.lock for known vulnerabilities; needs internet'
	@echo 'make lint      lint and type-check only'
	@echo 'make setup     install requirements.lock into .venv'
	@echo 'make lock      compile requirements.lock and the locks of the images from pyproject.toml'
	@echo 'make schemas   export the JSON Schemas of the wire to infra/schemas'
	@echo 'make docs      write the reference pages from the code and build site/; fails on a dead link'

setup: .venv/.complete

.venv/.complete: requirements.lock infra/docker/build.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sluice needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r infra/docker/build.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/sluice demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One worker for each core. All tests of a worker share its servers; tests/conftest.py forms the groups.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --durations 20
check: lint
	$(PYTEST) --dist worksteal -m 'not server'

test: lint
	$(PYTEST) --dist loadgroup

# 20,000 submissions with each kind of delivery. Needs Java and Maven, as the tests marked kafka do. Prints one JSON line.
SEED ?= 1
faults: setup
	@$(BIN)/python -m tests.faults.run --seed $(SEED) $(if $(SHORT),--short)

# `make test` leaves out the tests marked long.
cluster: setup
	$(BIN)/pytest tests/faults/test_cluster.py -m ''

# Prints one JSON line. The exit status is not 0 if memory, file handles or the lag grew, or an outcome is wrong.
MINUTES ?= 30
soak: setup
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED)

# Half of the cases are messages, half are pictures. New failures are saved in tests/fuzz/corpus.
CASES ?= 100000
fuzz: setup
	$(BIN)/python -m tests.fuzz.run --cases $(CASES) --seed $(SEED)

# Takes minutes: it starts an engine and judges about 1,800 times. Git ignores the rows, docs/evaluation/rows.jsonl.
evaluate: setup
	$(BIN)/python -m pipelines.evaluation.tiny_report docs/evaluation

# Status 1 of the script: known vulnerabilities; 3: not checked, because no vulnerability service answers.
audit: setup
	@$(BIN)/python infra/audit.py

# The locks of the images have the same versions, without the packages of tests and embedded backends.
IMAGE_LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --no-header \
	--constraint requirements.lock
lock:
	$(BIN)/uv pip compile --quiet --generate-hashes --all-extras --python-version 3.11 --no-header \
		--output-file requirements.lock pyproject.toml
	$(IMAGE_LOCK) --output-file infra/docker/build.lock infra/docker/build.in
	$(IMAGE_LOCK) --output-file infra/docker/gpu.lock pyproject.toml
	$(IMAGE_LOCK) --output-file infra/docker/cpu.lock --excludes infra/docker/cpu.excludes pyproject.toml

schemas: setup
	$(BIN)/sluice schemas infra/schemas

# In strict mode a dead link or anchor fails the build.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf site .venv .kafka .sluice .mypy_cache .ruff_cache .pytest_cache .hypothesis
