# Everything runs in .venv, which the first target that needs it builds: python3, make and gcc are all a machine must have.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
CLIENTS := $(VENV)/.installed-clients

.DEFAULT_GOAL := help
.PHONY: help demo study test clients bench check docs mutants clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --editable ".[dev]"
	@touch "$@"

$(CLIENTS): $(STAMP)
	"$(BIN)/python" -m pip install --editable ".[clients]"
	@touch "$@"

demo: $(STAMP)  ## the codec example from data to pictures, at most 10 minutes
	rm -rf runs/demo
	"$(BIN)/python" examples/codec/demo.py

study: $(STAMP)  ## the codec study whole, into examples/codec/results: hours on two cores; goes on where it was stopped
	"$(BIN)/python" examples/codec/study.py

test: $(STAMP)  ## all tests, the examples in docstrings and docs, and branch coverage
	"$(BIN)/python" -m pytest src tests examples/codec/av1partition --ignore=tests/clients --doctest-modules --numprocesses auto --maxprocesses 4 --cov --cov-report=term-missing:skip-covered

clients: $(CLIENTS)  ## tests against the libraries that models and training loops come from (timm, Lightning, captum, ONNX, ...)
	"$(BIN)/python" -m pytest tests/clients --numprocesses auto --maxprocesses 4

bench: $(CLIENTS)  ## time and memory of training and of files beside their rivals, into benchmarks/results: half an hour
	"$(BIN)/python" benchmarks/training.py
	"$(BIN)/python" benchmarks/variants.py
	"$(BIN)/python" benchmarks/growth.py
	"$(BIN)/python" benchmarks/reuse.py
	"$(BIN)/python" benchmarks/files.py

check: $(STAMP) docs  ## formatting, lint, types, layering, strict docs
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m pytest --quiet tests/test_layering.py

docs: $(STAMP)  ## the documentation, in docs/_build/html; any warning is an error
	"$(BIN)/python" -m sphinx -b html -W -n --keep-going -q docs docs/_build/html

mutants: $(STAMP)  ## change the source bit by bit and see the tests fail: hours; a part of it: MUTANTS="resadapt.files*"
	"$(BIN)/python" -m pip install --quiet mutmut==3.8.1
	OMP_NUM_THREADS=1 "$(BIN)/mutmut" run $(MUTANTS)

clean:  ## remove what the other targets made, the environment excepted
	rm -rf build dist docs/_build mutants runs/demo .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
