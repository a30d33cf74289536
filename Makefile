# Everything runs in .venv, which the first target that needs it builds: python3, make and gcc are
# all a machine must have.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
CLIENTS := $(VENV)/.installed-clients
# Each worker starts with tests that follow each other, so that few fixtures are made twice.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo study quick static test clients bench sweep check docs mutants clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --editable ".[dev]"
	@touch "$@"

$(CLIENTS): $(STAMP)
	"$(BIN)/python" -m pip install --editable ".[clients]"
	@touch "$@"

demo: $(STAMP)  ## digits on an ImageNet network, then the codec example: at most 10 minutes
	rm -rf runs/demo
	"$(BIN)/python" examples/digits/three_ways.py
	"$(BIN)/python" examples/codec/demo.py
	@cat runs/demo/digits/table.md

study: $(STAMP)  ## the whole codec study, into examples/codec/results: hours, resumable
	"$(BIN)/python" examples/codec/study.py

quick: static  ## formatting, lint, types, layering and the fast tests: under two minutes
	OMP_NUM_THREADS=1 "$(BIN)/python" tools/quick_tests.py --quiet $(WORKERS)

static: $(STAMP)  ## formatting, lint and types
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy

test: $(STAMP)  ## all tests, the examples in docstrings and docs, and branch coverage
	@# The longest first, so that no worker waits for one at the end.
	"$(BIN)/python" -m pytest tests/test_docs.py tests/test_distributed.py src tests \
		examples/codec/av1partition --ignore=tests/clients \
		--doctest-modules $(WORKERS) --cov --cov-report=term-missing:skip-covered

clients: $(CLIENTS)  ## tests against other libraries: timm, Lightning, captum, ONNX, ...
	"$(BIN)/python" -m pytest tests/clients $(WORKERS)

bench: $(CLIENTS)  ## time and memory beside other ways, into benchmarks/results: half an hour
	"$(BIN)/python" benchmarks/training.py
	"$(BIN)/python" benchmarks/variants.py
	"$(BIN)/python" benchmarks/growth.py
	"$(BIN)/python" benchmarks/reuse.py
	"$(BIN)/python" benchmarks/inference.py
	"$(BIN)/python" benchmarks/files.py
	"$(BIN)/python" docs/make_figures.py

sweep: $(CLIENTS)  ## every ConvNet of timm and torchvision through all steps: an hour, resumable
	"$(BIN)/python" benchmarks/sweep.py

check: static docs  ## formatting, lint, types, layering, strict docs
	"$(BIN)/python" -m pytest --quiet tests/test_layering.py

docs: $(STAMP)  ## the documentation, in docs/_build/html; any warning is an error
	"$(BIN)/python" -m sphinx -b html -W -n --keep-going -q docs docs/_build/html

mutants: $(STAMP)  ## change the source, see tests fail: hours; MUTANTS="resadapt.files*" for a part
	"$(BIN)/python" -m pip install --quiet mutmut==3.8.1
	OMP_NUM_THREADS=1 "$(BIN)/mutmut" run $(MUTANTS)

clean:  ## remove what the other targets made, the environment excepted
	rm -rf build dist docs/_build mutants runs/demo .coverage .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache
	find src tests examples docs tools -name __pycache__ -type d -prune -exec rm -rf {} +
