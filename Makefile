# Every target works first and alone on a machine with make and Python 3.11 or newer: it makes its own .venv.
# ARGS passes options on:   make up ARGS="--port 9000"   make test ARGS="-k cache"   make bench ARGS="--only api"

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Most tests wait for servers and clocks, so two processes take half the time of one. WORKERS=0: in this process.
WORKERS ?= 2
TESTS := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# The interpreter for a new .venv; empty means the first on PATH that is recent enough.
PYTHON ?=

UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)
IS_COMPILED := $(BIN)/python -c "import sys, headrace.build as b; sys.exit(not b.is_compiled() or b.is_stale())"
IS_STALE := $(BIN)/python -c "import sys, headrace.build as b; sys.exit(not b.is_stale())"

.PHONY: help setup up test check bench coverage compile clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS passes options on, for example: make test ARGS="-k cache"'

setup: $(VENV)/.dev ## make .venv with everything that development needs
	@echo "$(VENV) is ready"

up: $(VENV)/.runtime ## serve: embedded Redis and Postgres, API and dashboard (ARGS: options of `headrace up`)
	@if $(IS_STALE); then $(INSTALL) --no-deps --editable .; fi
	@exec $(BIN)/headrace up $(ARGS)

test: $(VENV)/.dev ## run all tests, and those of the hot modules once more as plain Python (ARGS: options of pytest)
	@$(IS_COMPILED) || $(BIN)/python setup.py --quiet build_ext --inplace
	$(TESTS) $(ARGS)
	@if $(IS_COMPILED); then $(MAKE) --no-print-directory test-plain; fi

.PHONY: test-plain
test-plain:
	HEADRACE_PLAIN=1 $(TESTS) -m hot $(ARGS) || { code=$$?; test $$code -eq 5 -a -n '$(ARGS)'; }

check: $(VENV)/.dev ## lint, format, types, layers, tidiness
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/headrace tests/typing
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/test_layers.py

bench: $(VENV)/.dev ## measure (ARGS: options of `headrace bench`)
	@$(IS_COMPILED) || $(BIN)/python setup.py --quiet build_ext --inplace
	@exec $(BIN)/headrace bench $(ARGS)

coverage: $(VENV)/.dev ## run all tests as plain Python and report the branches that none took
	HEADRACE_PLAIN=1 $(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

compile: $(VENV)/.dev ## compile the hot modules in place, and fail if that fails
	HEADRACE_COMPILE=1 $(BIN)/python setup.py --quiet build_ext --inplace

clean: ## remove what compiling left in the tree
	rm -rf build
	find src -name '*.so' -delete

# A stamp is touched when its step has succeeded: an interrupted set-up goes on, a finished one costs nothing.
$(VENV)/.runtime: $(BIN)/python pyproject.toml setup.py
	$(INSTALL) --editable '.[embedded]'
	@touch $@

# pip knows --group since 25.1.
$(VENV)/.dev: $(VENV)/.runtime
	$(if $(UV),,@$(INSTALL) --upgrade 'pip>=25.1')
	$(INSTALL) --group dev
	@touch $@

$(BIN)/python:
ifneq ($(UV),)
	$(UV) venv --quiet --python '$(or $(PYTHON),>=3.11)' $(VENV)
else
	@for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$candidate -m venv $(VENV)"; \
			$$candidate -m venv --clear $(VENV); exit; \
		fi; \
	done; \
	echo 'headrace needs Python 3.11 or newer with venv (on Debian: apt-get install python3-venv).' >&2; exit 1
endif
