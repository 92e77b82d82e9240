# Everything runs inside .venv; `make help` lists the targets.
CONFIG ?= configs/demo.toml
ARGS ?=
EXTRAS ?=
TORCH ?= 2.13.0
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup dev demo precompute train sample test test-faults test-cuda-build lint format clean bench bench-precompute bench-train bench-scale bench-gpu-train bench-gpu-precompute first-gpu

# pip with one updating line (plain lines without a terminal) in place of hundreds; errors go to stderr as they are.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PROGRESS = | awk -v end="$$([ -t 2 ] && echo '\r' || echo '\n')" \
	'/^(Collecting|Obtaining|Processing) / { sub(".*/", "", $$2); printf "  %3d %-60.60s%s", ++n, $$2, end; fflush() } \
	/^Installing collected/ { printf "  installing %d packages%-50s\n", NF - 3, ""; fflush() }'

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 22

setup: $(BIN)/.ready  ## Make .venv with the pinned dependencies; optional ones with EXTRAS="s3,ray"
	@if [ -n "$(EXTRAS)" ]; then echo "setup: installing the extras $(EXTRAS)"; $(PIP) -e '.[$(EXTRAS)]' $(PROGRESS); fi

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("setup: expected Python 3.11 to 3.13, got %d.%d; run make PYTHON=/path/to/python3.11" % v)'
	@echo "setup 1/3: making .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup 2/3: installing torch (1 to 3 minutes)"
	@$(PIP) torch $(PROGRESS)
	@echo "setup 3/3: installing the other dependencies and this project (1 to 3 minutes)"
	@$(PIP) -e . $(PROGRESS)
	@for program in chromium ffmpeg tmux; do command -v $$program > /dev/null || echo "setup: $$program not found (optional; its tests are skipped)"; done
	@touch $@
	@echo "setup: done; $(BIN)/precog is the command"

dev: $(BIN)/.dev

$(BIN)/.dev: $(BIN)/.ready
	@echo "setup: installing the development tools and all extras (1 to 3 minutes)"
	@$(PIP) -e '.[dev]' $(PROGRESS)
	@touch $@

demo: precompute train sample  ## Teach the miniature a word: precompute, train, sample, and say where to look
	@PYTHONPATH=. $(BIN)/python demo/show.py $(CONFIG)
	@$(BIN)/precog report run runs/$(notdir $(CONFIG:.toml=))

precompute: setup  ## Stage 1: encode CONFIG's videos and captions into the cache (ARGS="data.fps=8")
	$(BIN)/precog precompute $(CONFIG) $(ARGS)

train: setup  ## Stage 2: train a LoRA from the cache (ARGS="train.lora_rank=16")
	$(BIN)/precog train $(CONFIG) $(ARGS)

sample: setup  ## Make videos with and without the adapter
	$(BIN)/precog sample $(CONFIG) $(ARGS)

test: dev  ## Run the tests (under five minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not gpu" $(ARGS)

test-faults: dev  ## Run the long fault and fuzz suites
	$(BIN)/python -m pytest -m faults --timeout 1800 $(ARGS)

test-cuda-build:  ## Bind a training step's operators on a CUDA build of torch, without a card (TORCH=2.13.0; downloads 3 GB)
	@test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	@.venv-cuda/bin/python -m pip install --disable-pip-version-check torch==$(TORCH) $(PROGRESS)
	@grep -v '^torch==' constraints.txt > .venv-cuda/constraints.txt
	@.venv-cuda/bin/python -m pip install --disable-pip-version-check -c .venv-cuda/constraints.txt -e . $(PROGRESS)
	.venv-cuda/bin/python -m bench.cuda_build $(ARGS)

lint: dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: dev  ## Count bytes and FLOPs of the memory levels and time them on the CPU
	$(BIN)/python -m bench.cpu_memory $(ARGS)

bench-precompute: dev  ## Measure stage 1 on the CPU with the tiny VAE: overlap and host memory
	$(BIN)/python -m bench.cpu_precompute $(ARGS)

bench-train: dev  ## Measure stage 2 on the CPU against a plain end-to-end trainer
	$(BIN)/python -m bench.cpu_train $(ARGS)

bench-scale: dev  ## Measure on the CPU what grows with the data set, and what one real-size sample costs
	$(BIN)/python -m bench.scale $(ARGS)

bench-gpu-train: dev  ## Measure stage 2 on a CUDA GPU at the published sizes (PIECE=1..4, ten minutes each)
	$(BIN)/python -m bench.gpu_train --piece $(or $(PIECE),1) $(ARGS)

bench-gpu-precompute: dev  ## Measure stage 1 on a CUDA GPU with encoders of the published size
	$(BIN)/python -m bench.gpu_precompute $(ARGS)

first-gpu: dev  ## Find out on a first CUDA GPU what only a GPU can show (14 points, ten minutes each at most)
	$(BIN)/python -m bench.first_gpu $(ARGS)

clean:  ## Remove the environment and the caches of the tools
	rm -rf .venv .venv-cuda .pytest_cache .mypy_cache .ruff_cache *.egg-info
