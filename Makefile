PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process per core runs the tests.
PARALLEL ?= -n auto --maxprocesses 8
# One with no libraries of GPUs, where the package index has it; else any will do.
TORCH ?= torch==2.13.0
# What a backend has to keep: arithmetic, masks, compression, training, and a way to the others.
CONTRACT := $(patsubst %,tests/test_%.py,fake_quantize quantizers binary_quantizers transforms ranges \
  layers masks weight_masks channel_masks callbacks stepping across_backends)
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: setup demo test test-jax test-torch test-backends test-all lint format bench bench-torch coverage fuzz kill-and-resume docs clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/keras-compress demo

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-jax: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,jax]'
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-torch: setup
	$(BIN)/python -m pip install --quiet -e '.[dev]' $(TORCH)
	KERAS_BACKEND=torch $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-backends: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,jax]' $(TORCH)
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(CONTRACT)
	KERAS_BACKEND=torch $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(CONTRACT) tests/test_torch_*.py

test-all: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,bench,hub]'
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,bench]'
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/compress_time.py
	$(BIN)/python benchmarks/ir_latency.py
	$(BIN)/python benchmarks/pruned_latency.py
	$(BIN)/python benchmarks/sparse_masks.py
	$(BIN)/python benchmarks/sparse_latency.py
	$(BIN)/python benchmarks/low_bit.py

bench-torch: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,torch-bench]' $(TORCH)
	$(BIN)/python benchmarks/torch_step_time.py

coverage: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,bench,hub]'
	$(BIN)/python benchmarks/sweep.py

fuzz: setup
	$(BIN)/python tests/fuzz.py configurations
	$(BIN)/python tests/fuzz.py models

kill-and-resume: setup
	$(BIN)/python benchmarks/kill_and_resume.py --trials 200

docs: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path './.venv' -prune -o -name __pycache__ -type d -print | xargs rm -rf
