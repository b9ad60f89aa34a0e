# `make help` lists what there is. Every target sets up what it needs.

PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3))
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST_FLAGS :=

export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/.cache/tools/usr/bin:$(PATH)

.PHONY: help demo serve test lint format typecheck bench bench-serving bench-scaling bench-interference bench-overload chaos fuzz train clean test-tools
.DELETE_ON_ERROR:

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(INSTALLED) ## Generate an adapter from words, and compare it with the base model
	$(BIN)/icm-lora demo

serve: $(INSTALLED) ## Serve on 127.0.0.1:8000 with the embedded bundle and base model
	$(BIN)/icm-lora serve

test: $(INSTALLED) test-tools lint typecheck ## Lint, check types and imports, run all tests
	$(BIN)/pytest --cov --cov-report=term $(PYTEST_FLAGS)

lint: $(INSTALLED) ## Check style, imports between packages, and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED) ## Check types with mypy --strict
	$(BIN)/mypy

bench: $(INSTALLED) test-tools ## Measure latency and throughput; fails where a target is missed
	$(BIN)/python -m tests.bench

bench-serving: $(INSTALLED) ## Measure text serving beside vLLM (ICM_BENCH_VLLM) and transformers
	$(BIN)/python -m tests.bench.serving

bench-scaling: $(INSTALLED) ## Measure throughput with 1 to 1,000 adapters under four request mixes
	$(BIN)/python -m tests.bench.scaling

bench-interference: $(INSTALLED) ## Measure short completions beside long ones
	$(BIN)/python -m tests.bench.interference

bench-overload: $(INSTALLED) test-tools ## Measure load above capacity, Redis faults and SIGTERM under load
	$(BIN)/python -m tests.bench.overload

chaos: $(INSTALLED) ## Two minutes of random generate, infer, delete and alias: no wrong answer
	$(BIN)/python -m tests.chaos

fuzz: $(INSTALLED) ## Send 5,000 requests made from the OpenAPI document, with a key and without
	$(BIN)/python -m tests.fuzz

train: $(INSTALLED) ## Train the shipped bundle anew, into runs/text-embedded (hours on a CPU)
	$(BIN)/icm-lora train training/recipes/text-embedded.toml --out runs/text-embedded

clean: ## Remove builds, caches and reports; keeps .venv, .cache and runs
	rm -rf build dist *.egg-info .coverage .coverage.* .hypothesis .import_linter_cache \
	  .mypy_cache .pytest_cache .ruff_cache
	find service training tests -name __pycache__ -type d -prune -exec rm -rf {} +

test-tools:
	@.ci/install-tools redis-server prometheus compose

$(INSTALLED): pyproject.toml constraints.txt requirements-embedded.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: install it, or name one with make PYTHON=/path"; exit 1; }
	@echo "Setting up .venv: minutes the first time, most of them for torch"
	@test -x $(BIN)/pip || { .ci/install-tools venv && "$(PYTHON)" -m venv .venv; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,train]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-embedded.txt
	@touch $@
