# `make demo` and `make test` do all set-up themselves, in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= 2.15.0
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_BIN := $(TORCH_VENV)/bin

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*##.*/\1/p' $(firstword $(MAKEFILE_LIST)))
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first and alone: every later resolution then finds the pinned release in place.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Packlight needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train a small GPT in 40% of its memory, losses identical to the last bit
	$(BIN)/python examples/demo.py

test: $(READY) ## lint, types, import rules, tests and doctests
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --show-capture=stdout -m 'not slow'

test-all: $(READY) ## ... and the tests that take long
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --show-capture=stdout

# Whatever else is installed asks for torch, too: the release is pinned for all of it.
$(TORCH_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCH_VENV)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_BIN)/python -m pip install --quiet -c $(TORCH_VENV)/constraints.txt -e '.[dev]'
	@touch $@

test-torch: $(TORCH_VENV)/.ready ## tests on another torch, TORCH=2.14.1 say (newest by default; downloads GB)
	$(TORCH_BIN)/python -c 'import torch; print("torch", torch.__version__)'
	OMP_NUM_THREADS=1 $(TORCH_BIN)/python -m pytest -q -n 2 --show-capture=stdout

lint: $(READY) ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench-peers: $(READY) ## rerun the tables of whole steps beside the rivals (hours)
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.peers.rematch
	$(BIN)/python -m benchmarks.peers.report

bench-whole-step: $(READY) ## rerun the tables of a whole step's time against its budget
	$(BIN)/python -m benchmarks.whole_step
	$(BIN)/python -m benchmarks.whole_step.report

bench-optim: $(READY) ## rerun the table of optimizers' bytes and times
	$(BIN)/python -m benchmarks.optim

bench-comm: $(READY) ## rerun the tables of bytes sent and loss (hours)
	$(BIN)/python -m benchmarks.comm --codecs
	$(BIN)/python -m benchmarks.comm

bench-ranks: $(READY) ## rerun the table of two ranks beside DistributedDataParallel and FSDP2
	$(BIN)/python -m benchmarks.ranks

bench-sohoni: $(READY) ## rerun the table of WRN-28-2's memory and accuracy (needs PACKLIGHT_CIFAR10; hours)
	$(BIN)/python -m benchmarks.sohoni
	$(BIN)/python -m benchmarks.sohoni.report

bench-cluster: $(READY) ## rerun the scoreboard of predicted training steps
	$(BIN)/python -m benchmarks.cluster

bench-sparse: $(READY) ## rerun the tables of sparse weights (needs PACKLIGHT_MNIST; an hour)
	$(BIN)/python -m benchmarks.sparse
	$(BIN)/python -m benchmarks.sparse.report

bench-zoo: $(READY) ## rerun the matrix of model families (hours)
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.zoo.report

bench-largest: $(READY) ## rerun the search for the largest model in 2, 4 and 8 GiB (hours)
	$(BIN)/python -m benchmarks.largest
	$(BIN)/python -m benchmarks.largest.report

bench-trials: $(READY) ## rerun the tables of a study's plans and of members at once
	$(BIN)/python -m benchmarks.trials plans
	$(BIN)/python -m benchmarks.trials members

docs: $(READY) ## build the documentation's site into site/, and check it
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m pytest -q tests/test_docs_site.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-torch-* site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
