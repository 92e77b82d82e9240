# Everything runs inside .venv; `make help` lists the targets.
CONFIG ?= configs/demo.toml
ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo precompute train sample test test-faults lint format clean bench bench-precompute bench-train bench-gpu-train bench-gpu-precompute

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(BIN)/.ready  ## Make .venv with the pinned dependencies and this project, editable

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("precog needs Python 3.11 or 3.12, not %d.%d: make PYTHON=/path/to/python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: precompute train sample  ## Precompute, train and sample the embedded default

precompute: setup  ## Stage 1: encode CONFIG's videos and captions into the cache (ARGS="data.fps=8")
	$(BIN)/precog precompute $(CONFIG) $(ARGS)

train: setup  ## Stage 2: train a LoRA from the cache (ARGS="train.lora_rank=16")
	$(BIN)/precog train $(CONFIG) $(ARGS)

sample: setup  ## Make videos with and without the adapter
	$(BIN)/precog sample $(CONFIG) $(ARGS)

test: setup  ## Run the tests (under five minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not gpu" $(ARGS)

test-faults: setup  ## Run the long fault and fuzz suites
	$(BIN)/python -m pytest -m "faults" $(ARGS)

bench: setup  ## Count bytes and FLOPs of the memory engine and time it against itself on the CPU
	$(BIN)/python -m bench.cpu_memory $(ARGS)

bench-precompute: setup  ## Measure stage 1 on the CPU with the tiny VAE: overlap and host memory
	$(BIN)/python -m bench.cpu_precompute $(ARGS)

bench-train: setup  ## Measure stage 2 on the CPU beside a plain end-to-end trainer
	$(BIN)/python -m bench.cpu_train

bench-gpu-train: setup  ## Measure stage 2 on a CUDA GPU at the published sizes (PIECE=1..4, ten minutes each)
	$(BIN)/python -m bench.gpu_train --piece $(or $(PIECE),1) $(ARGS)

bench-gpu-precompute: setup  ## Measure stage 1 on a CUDA GPU with encoders of the real size
	$(BIN)/python -m bench.gpu_precompute $(ARGS)

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and what the tools left
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache precog.egg-info
