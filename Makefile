SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo down screenshots test test-all lint ham10000

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TENSORRT := $(VENV)/.tensorrt
# Any Python 3.11-3.13; `make PYTHON=/path/to/python3.12 setup` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)
# Named in the promotion's audit entry.
APPROVER ?= $(shell id -un)
PYTEST_FLAGS ?=
# Modules are compiled when first imported (pip would compile 38,000, most of them never used); if that may not be kept,
# each of a cluster's processes compiles all it imports again: train workers then took two minutes to start, not one.
export PYTHONDONTWRITEBYTECODE :=

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## install everything in .venv (done by the other targets when needed)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing the pinned packages in $(VENV) (about a minute)"
	@# The pip that Python 3.11 brings needs twice the time.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt --upgrade pip
	@$(BIN)/python -m pip install --quiet --no-compile --no-input -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## synthetic data, search, training, service and drift check on a local Ray cluster
	@$(BIN)/python -m local.demo

down: $(INSTALLED)  ## stop what `make demo` left running
	@$(BIN)/python -m local.down

screenshots: $(INSTALLED)  ## pictures of the running demo's pages, into docs/screenshots
	@$(BIN)/python -m local.screenshots

lint: $(INSTALLED)  ## style and import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

# A folder of its own for each run: two runs at once do not meet.
define run_pytest
	@folder=$$(mktemp -d "$${TMPDIR:-/tmp}/dermray-test-XXXXXX"); \
	$(2) $(BIN)/python -m pytest --basetemp="$$folder/t" -p no:cacheprovider $(1) $(PYTEST_FLAGS); \
	status=$$?; if [ $$status -eq 0 ]; then rm -rf "$$folder"; else echo "test files are kept in $$folder" >&2; fi; exit $$status
endef

# Those without a cluster side by side: most of a test's time is one process's. The tests of a file stay together, and no
# process takes a second thread for arithmetic, which another one's core would have to do.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --dist loadfile

test: lint  ## lint, unit tests, and tests on a real Ray cluster (at most 10 minutes)
	@echo "tests without a cluster, in several processes"
	$(call run_pytest,-m 'not slow and not ray' $(SIDE_BY_SIDE),OMP_NUM_THREADS=1)
	@echo "tests on a real Ray cluster"
	$(call run_pytest,-m 'not slow and ray')

test-all: $(TENSORRT)  ## the slow tests: kills, a simulated month, the whole demo, TensorRT builds (50 minutes)
	@echo "slow tests without a cluster, in several processes"
	$(call run_pytest,-m 'slow and not ray' $(SIDE_BY_SIDE),OMP_NUM_THREADS=1)
	@echo "slow tests on a real Ray cluster"
	$(call run_pytest,-m 'slow and ray')

# 100 MB that only these tests need: TensorRT-RTX's builder works without a GPU.
$(TENSORRT): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --no-compile --no-input -c constraints.txt -e '.[tensorrt-rtx]'
	@touch $@

ham10000: $(INSTALLED)  ## train and promote a model of HAM10000 (1 h 40 min on two cores)
	$(BIN)/python -m ray_jobs.prepare_dataset --config configs/ham10000/prepare_dataset.yaml
	$(BIN)/python -m ray_jobs.train_model --config configs/ham10000/train_model.yaml
	$(BIN)/python -m ray_jobs.export_engine --config configs/ham10000/export_engine.yaml
	$(BIN)/python -m ray_jobs.promote_model --config configs/ham10000/promote_model.yaml --approver "$(APPROVER)"
