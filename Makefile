# `make demo` and `make test` set everything up themselves: a virtual environment in .venv, reused when present.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ROOMS := core edit export serve eval
MODULES := $(shell git ls-files '*.py' 2>/dev/null | grep -E '^(core|edit|export|serve|eval|demo)/')

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton test-all lint types bench docs setup demo-data demo-train clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A strict editable install links each module, so it is made anew when a module comes or goes.
$(INSTALLED): pyproject.toml constraints.txt $(MODULES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[edit,export,eval,dev]' \
	    --config-settings editable_mode=strict
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt tensorrt-rtx \
	    || echo "no tensorrt-rtx for this machine: the tests that build engines will be skipped"
	@touch $@

setup: $(INSTALLED) ## install excise with everything that the tests need into .venv

demo: setup ## erase weapons from the bundled model, export it, judge it (writes demo-out/)
	$(BIN)/excise demo --out demo-out/$$(date +%Y%m%d-%H%M%S)

test: setup ## the tests, without the slow ones
	$(BIN)/python -m pytest -m 'not slow'

test-triton: setup ## on a real tritonserver, which is installed into the user's cache folder the first time
	$(BIN)/python -m pytest -m slow tests/serve/test_triton_server.py

test-all: setup ## every test
	$(BIN)/python -m pytest

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy --strict on all rooms
	$(BIN)/mypy $(ROOMS) demo

bench: setup ## the edit against the published per-layer form
	$(BIN)/python bench/closed_form.py

docs: setup ## rewrite docs/cli.md from --help, and docs/report-schema.md from the report's model
	$(BIN)/python docs/write_cli.py
	$(BIN)/python docs/write_schema.py

demo-data: setup ## fetch and rasterise the demo's artwork (needs Node's npm)
	$(BIN)/python -m pip install --quiet -c constraints.txt resvg-py
	$(BIN)/python -m excise.demo.artwork

demo-train: setup ## train the demo model from demo/work/artwork.npz (hours; resumes where it stopped)
	$(BIN)/python -m excise.demo.train_tokenizer
	$(BIN)/python -m excise.demo.train_vae
	$(BIN)/python -m excise.demo.train_clip joint
	$(BIN)/python -m excise.demo.train_unet
	$(BIN)/python -m excise.demo.train_decoder
	$(BIN)/python -m excise.demo.assemble --install demo

clean: ## remove caches and builds, not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
