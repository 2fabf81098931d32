# Everything a user or a maintainer does, in one place. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Images of containers often set it. Then each of the processes that the tests start compiles Lightning and more anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-full lint type bench docs wheel check-wheel clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Create .venv with the tested versions

train: setup ## Train a 1:16 sparse network on the embedded digits, then audit its checkpoint
	$(BIN)/bame-train recipe=digits_mlp hydra.run.dir=outputs/digits
	$(BIN)/bame-audit outputs/digits/checkpoints/last.ckpt

# A thread for each of the processes: more would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4

test: setup ## Run the tests
	$(PYTEST)

test-full: setup ## Run the tests, the slow ones too
	$(PYTEST) -m ""

lint: setup ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup ## Check types
	$(BIN)/mypy

bench: setup ## Measure time and memory beside dense training, for docs/performance.md (half an hour)
	$(BIN)/python -m benchmarks.performance all

docs: setup ## Make the documentation as pages in build/docs; a warning, such as a broken link, is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/docs

wheel: setup ## Build the wheel into dist/
	$(BIN)/uv build --wheel --quiet

check-wheel: setup ## Install the wheel into an empty environment, and use it from another folder
	.ci/wheel

clean: ## Remove what training and testing leave behind
	rm -rf outputs multirun build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
