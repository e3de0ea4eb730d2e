# `make help` lists the targets. Settings: VENV (the environment's folder), PYTHON (what makes it),
# CC and CXX (the compilers), ARGS (passed on to quickstart, pytest or the benchmarks).

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
export CC CXX

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# What an installation depends on: when one of these changes, the next target installs again.
INPUTS := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-long test-matrix lint wheel bench bench-check gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

quickstart: $(INSTALLED)  ## from nothing to a trained, fine-tuned, explained model
	$(BIN)/gradsmith quickstart $(ARGS)

install: $(INSTALLED)  ## the environment alone: pinned packages, C++ extension built

$(INSTALLED): $(INPUTS)
	@sh scripts/preflight.sh "$(PYTHON)" "$(CXX)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), and building the C++ extension: a minute or two the first time"
	$(BIN)/python scripts/install.py train,dev
	@touch $@

test: $(INSTALLED)  ## the whole test suite, and its ten slowest tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--durations=10 $(ARGS)

test-long: $(INSTALLED)  ## long random searches, which `make test` leaves out
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m long $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the benchmarks, written to benchmarks/results/ and docs/benchmarks.md
	$(BIN)/python -m pytest benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.table

bench-check: $(INSTALLED)  ## the latest results against benchmarks/floors.toml
	$(BIN)/python -m benchmarks.check

# Installs and downloads nothing: it takes the Python that is active, with the torch that fits the
# GPU, and builds the extension in place.
gpu: export PYTHONPATH := kernels:trainer
gpu:  ## on a GPU machine: build, run the GPU tests, then the GPU benchmarks
	@$(PYTHON) -m benchmarks.gpu --check
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest -m gpu tests/kernels
	$(PYTHON) -m benchmarks.gpu
	$(PYTHON) -m benchmarks.table

# One file for every x86-64 CPU: the instruction set is chosen where it runs. auditwheel names the
# oldest glibc that it runs on (that of the machine it was built on, or older).
wheel: export PATH := $(abspath $(BIN)):$(PATH)
wheel: $(INSTALLED)  ## dist/: a wheel for this version of Python, for machines without a compiler
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--wheel-dir build/wheel .
	$(BIN)/python -m auditwheel repair --wheel-dir dist build/wheel/gradsmith-*.whl

# Downloads several GB the first time. ARGS='--only 3.12/2.11' takes one pair; the rest is pytest's.
test-matrix:  ## the kernels' tests with other versions of Python and torch
	$(PYTHON) scripts/test_matrix.py $(ARGS)

clean:  ## removes the environment and what was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find kernels -name '*.so' -delete
	find kernels trainer tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
