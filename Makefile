# Each target does all its own set-up (tools/setup) on a fresh Debian 12 as root; it is quick the second time.
# PYTHON names another interpreter than python3; ARGS goes to pytest, e.g. make test ARGS='tests/unit -k yaml'.

PYTHON ?= python3
export PYTHON
ARGS ?=
BENCH ?= blk boot start console restore clones snapshot restart

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

help:
	@echo 'make demo    boot an unmodified Debian kernel and show what was seen from inside it'
	@echo 'make test    every test; those that need Linux guests run in a box where KVM cannot boot one'
	@echo 'make check   ruff, mypy --strict, C parts with -Wall -Wextra -Werror'
	@echo 'make bench   side-by-side measurements (BENCH="$(BENCH)")'
	@echo 'make setup   only the set-up'
	@echo 'make clean   remove what was built (.venv, .cache, C parts)'

setup:
	@tools/setup

demo: setup
	@.venv/bin/python tools/demo.py

test: setup
	@.venv/bin/python -m pytest $(ARGS)

check:
	@tools/setup python
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: setup
	@for name in $(BENCH); do .venv/bin/python -m bench.$$name || exit 1; done

clean:
	@if [ -x .venv/bin/vmmctl ]; then .venv/bin/vmmctl box down; fi
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/results
	find core sidecars proto orchestrator motorcade tests tools bench -name __pycache__ -prune -exec rm -rf {} +
	find core sidecars -name '*.so' -delete
