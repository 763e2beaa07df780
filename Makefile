# Everything is set up from requirements.lock into .venv; `make demo` and `make test` need nothing before them.
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.8
.DEFAULT_GOAL := help
.PHONY: help setup demo check test faults soak fuzz evaluate lint lock schemas docs clean

help:
	@echo 'make demo      judge a handful of drawn images from submission to verdict, on embedded backends'
	@echo 'make check     lint, type-check and run the tests that need no server: minutes'
	@echo 'make test      lint, type-check and run every test, as CI does'
	@echo 'make faults    break everything in turn under load; SEED=7 for other faults, SHORT=1 for a short form'
	@echo 'make soak      half of the rate that this machine sustains, MINUTES=30 of it, and what grows'
	@echo 'make fuzz      hostile messages and pictures, CASES=100000 of them'
	@echo 'make evaluate  judge some hundred drawn images and write the figures to docs/evaluation'
	@echo 'make lint      lint and type-check only'
	@echo 'make setup     make .venv from requirements.lock'
	@echo 'make lock      compile requirements.lock, and those of the images, from pyproject.toml'
	@echo 'make schemas   export the JSON Schemas of the wire to infra/schemas'
	@echo 'make docs      write the reference pages from the code and build the site into site/; a dead link fails it'

setup: .venv/.complete

.venv/.complete: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sluice needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
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

# One worker for each core. The servers of a worker are shared by all its tests; tests/conftest.py forms the groups.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --durations 20
check: lint
	$(PYTEST) --dist worksteal -m 'not server'

test: lint
	$(PYTEST) --dist loadgroup

# 20,000 submissions with each kind of delivery; needs what the tests marked kafka need. Ends with one JSON line.
SEED ?= 1
faults: setup
	@$(BIN)/python -m tests.faults.run --seed $(SEED) $(if $(SHORT),--short)

# One member at half of the rate that it sustains. Ends with one JSON line; another status than 0 says that something grew.
MINUTES ?= 30
soak: setup
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED)

# Half of the cases are messages, half are pictures; finds are kept in tests/fuzz/corpus.
CASES ?= 100000
fuzz: setup
	$(BIN)/python -m tests.fuzz.run --cases $(CASES) --seed $(SEED)

# Minutes: an engine of its own, and some 1,800 judgements. The rows are in docs/evaluation/rows.jsonl, which git ignores.
evaluate: setup
	$(BIN)/python -m pipelines.evaluation.tiny_report docs/evaluation

# The images get the same versions, without what only tests and the embedded backends need.
IMAGE_LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --no-header \
	--constraint requirements.lock
lock:
	$(BIN)/uv pip compile --quiet --generate-hashes --all-extras --python-version 3.11 --no-header \
		--output-file requirements.lock pyproject.toml
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
