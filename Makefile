# Everything runs inside .venv in this folder. The first `make train` or `make test` creates it, and it is
# refreshed when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test lint types tests clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

setup: $(INSTALLED)  ## create .venv with the versions of constraints.txt

# torch goes first and alone: the wheel that pip finds for this machine (CPU or CUDA) is then settled, and nothing
# that is installed after it can pull in another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: $(INSTALLED)  ## fine-tune the checkpoint on the built-in sample, afresh
	rm -rf runs/sample
	$(BIN)/accelerate launch recipes/two_stage.py recipes/configs/reuse_sample.yaml

test: lint types tests  ## everything that CI checks

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy
	$(BIN)/mypy

# Two workers with one torch thread each; a file stays on one worker, so what its fixtures build is built once.
tests: $(INSTALLED)  ## pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:  ## remove .venv, the caches and what builds leave; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
