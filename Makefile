# Everything starts here: `make help`.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
FLOORS := .venv-floors
TOOLS := .venv-tools
TARGETS := .venv-targets
DEMO := data/demo
# The tests of a file share what it makes once, so they stay in one process; files begin in the order of conftest.py.
# A process that dies ends the run, which would otherwise wait for its tests forever.
PARALLEL := -n 2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0

.PHONY: help install install-dev install-interop demo-data pretrain test test-all test-floors faults bench test-targets lint \
	format lock audit licences docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name one with make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.core: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.prep: requirements.txt requirements-prep.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-prep.txt
	@touch $@ $(VENV)/.core

# Who runs takes the ranges of the requirement files; who develops, and CI, exactly what the lock names.
$(VENV)/.dev: requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@touch $@ $(VENV)/.core $(VENV)/.prep

install: $(VENV)/.prep  ## create .venv with what runs need, DICOM and video readers included
install-dev: $(VENV)/.dev  ## ... and with what the tests need

# PyTorch stays outside the locks: which build of a version pip finds, for the CPU or for CUDA, depends on the machine.
install-interop: $(VENV)/.dev  ## ... and with PyTorch for the CPU, timm, transformers, ONNX, MONAI, W&B and MLflow, for their tests
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps torchvision  # its operators are not needed
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-interop.lock

demo-data: $(VENV)/.core  ## simulate labelled ultrasound frames into data/demo (once)
	$(BIN)/python -m data_prep.build --dataset=phantom --output=$(DEMO)

pretrain: demo-data  ## pretrain a small model on simulated frames, minutes on a laptop
	$(BIN)/python -m usfmae_jax.main --config=configs/pretrain.py:demo

test: $(VENV)/.dev  ## run the tests but those marked slow, two files at a time
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/.dev  ## run all tests
	$(BIN)/python -m pytest $(PARALLEL)

faults: $(VENV)/.dev  ## kill and stop every long job at random moments, half an hour or more; prints what came of it
	$(BIN)/python -m tests.faults

bench: $(VENV)/.dev  ## measure beside PyTorch, after make install-interop, on a quiet machine; goes on where it was stopped
	$(BIN)/python -m benchmarks

# Of PyTorch the floor is tried by hand: its builds for the CPU come from an index of their own.
test-floors:  ## run the tests with the lowest versions that the requirement files admit, on Python 3.11
	@test -x $(FLOORS)/bin/python || python3.11 -m venv $(FLOORS)
	sed -nE '/^(torch|timm|ruff|mypy)>/d; s/^([A-Za-z][^>= ]*)>=([^,; ]+).*/\1==\2/p' requirements.txt \
		requirements-prep.txt requirements-beam.txt requirements-interop.txt requirements-dev.txt > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet -r $(FLOORS)/floors.txt torch==2.13.0
	$(FLOORS)/bin/python -m pip install --quiet --no-deps torchvision \
		$$(sed -nE 's/^timm>=([^,]+).*/timm==\1/p' requirements-interop.txt)
	$(FLOORS)/bin/python -m pytest $(PARALLEL) -m "not slow"

# CUDA's compiler alone: its libraries, gigabytes of them, are only for running. Beside the TPU's, in a place of their own,
# since JAX takes what it finds to be there.
$(TARGETS)/.done: requirements-tpu.txt
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install --quiet -r requirements-tpu.txt
	version=$$($(TARGETS)/bin/python -c 'import jax; print(jax.__version__)') && $(TARGETS)/bin/python -m pip install --quiet \
		--no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink \
		nvidia-cuda-runtime
	@touch $@

test-targets: $(TARGETS)/.done demo-data  ## compile every config for the TPUs and GPUs it names, none of which is needed; 1.5 hours
	$(TARGETS)/bin/python -m benchmarks.scale

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check --output-format=concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into house style
	$(BIN)/ruff check --fix --output-format=concise .
	$(BIN)/ruff format .

$(TOOLS)/bin/uv: | $(BIN)/python
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "uv>=0.9,<1" "pip-audit>=2.9,<3"

LOCK := UV_CUSTOM_COMPILE_COMMAND="make lock" $(TOOLS)/bin/uv pip compile --quiet --upgrade --universal \
	--python-version=3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links

lock: $(TOOLS)/bin/uv  ## renew requirements*.lock: the newest versions that the ranges admit, for Python 3.11 and 3.12
	$(LOCK) requirements-dev.txt --output-file=requirements.lock
	{ sed '/^-r/d; /^torch/d' requirements-interop.txt requirements-tracking.txt; echo "monai>=1.5,<2"; } | \
		$(LOCK) - --constraints=requirements.lock \
		--overrides=<(echo "torch; python_version < '3'") --no-emit-package=torchvision --output-file=requirements-interop.lock
	$(LOCK) requirements-docs.txt --constraints=requirements.lock --output-file=requirements-docs.lock

audit: $(TOOLS)/bin/uv  ## look the locked versions up among known vulnerabilities (needs the network)
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r requirements-interop.lock \
		-r requirements-docs.lock

licences: $(VENV)/.dev $(VENV)/.docs  ## write docs/licences.md; after make install-interop, whose packages are listed too
	$(BIN)/python -m tests.licences > docs/licences.md

$(VENV)/.docs: requirements-docs.lock | $(VENV)/.core
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-docs.lock
	@touch $@

# The variable silences an advertisement; what is wrong with a page still ends the build.
docs: $(VENV)/.docs  ## build the documentation into site/; to read it with its search: python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:  ## remove the virtual environment and caches; keeps data/ and runs/
	rm -rf $(VENV) $(FLOORS) $(TOOLS) $(TARGETS) site .cache .pytest_cache .ruff_cache .mypy_cache
