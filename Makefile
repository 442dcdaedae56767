# make demo    trains a Llama with its sequence split over two ranks and checks it against the unsplit
# make test    formatting, lint, types, the documentation's site, tests, doctests; what CI runs
# make docs    the documentation as a site, in build/site; a warning is an error
# make quick   the tests that need neither ranks nor a compiler, in under 90 s on two cores
#
# All make their own virtual environment first. Needs Python 3.11+, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
# Further arguments of pip, for those who want another package index, such as that of CPU-only torch:
#   make test PIP_INDEX_ARGS="--index-url URL --extra-index-url URL"
PIP_INDEX_ARGS ?=
# Further arguments of pytest: make test PYTEST_ARGS="-k causal"
PYTEST_ARGS ?=
# Files of tests that run at once. Each worker has up to nine ranks, of half a gigabyte each.
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# pytest over all tests but the slow ones: $(call tested,path of python)
tested = OMP_NUM_THREADS=1 $(1) -m pytest -m "not slow" \
  --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(PYTEST_ARGS)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := ringfx passes cost_model tests examples benchmarks docs

# Another release of torch, for test-torch and fake-cuda: make test-torch TORCH=2.11.0
TORCH ?= 2.11.0
OTHER := .venv-torch-$(TORCH)
PINNED := accelerate|peft|transformers|pydantic|rich|typer|hypothesis|pytest|scipy|numpy

.PHONY: install demo docs quick test check test-all test-torch fake-cuda format lint types corpus gpu bench-memory \
  fuzz clean

install: $(INSTALLED)

# setuptools comes first so that the project builds without a second, isolated download of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ringfx needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PIP_INDEX_ARGS) --constraint constraints.txt setuptools
	$(PIP) install --quiet $(PIP_INDEX_ARGS) --constraint constraints.txt \
	  --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

# tests/support/quick.py says which tests these are.
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quick --numprocesses $(WORKERS) $(PYTEST_ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint types docs
	$(call tested,$(BIN)/python)

check: test

test-all: lint types docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all --durations=20 $(PYTEST_ARGS)

# The tests on another release of torch, in a virtual environment of its own. What torch itself asks
# for comes in the versions that it wants, the rest as in constraints.txt.
test-torch: $(OTHER)/.installed
	$(call tested,$(OTHER)/bin/python)

# A quarter of the corpus on fake CUDA tensors, for 8 ranks: needs a CUDA build of torch (gigabytes;
# those of PyPI for Linux are), and neither a GPU nor a driver.
fake-cuda: $(OTHER)/.installed
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m tests.device.dry_run $(FAKE_CUDA_ARGS)

$(OTHER)/.installed: pyproject.toml constraints.txt
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -E '^($(PINNED))==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_INDEX_ARGS) \
	  --constraint $(OTHER)/constraints.txt 'setuptools>=77' 'torch==$(TORCH)'
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_INDEX_ARGS) \
	  --constraint $(OTHER)/constraints.txt --no-build-isolation --editable '.[dev]' \
	  'torch==$(TORCH)'
	@touch $@

format: $(INSTALLED)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

# Strictness is set in pyproject.toml.
TYPED_TESTS := cli comparison compile corpus device end_to_end report support torch_compat validation watch
types: $(INSTALLED)
	$(BIN)/python -m mypy -p ringfx
	$(BIN)/python -m mypy \
	  $(wildcard tests/*.py $(TYPED_TESTS:%=tests/%/*.py) examples/*.py docs/site/*.py) \
	  benchmarks/memory.py benchmarks/attention_schedule.py benchmarks/check_time.py \
	  $(wildcard benchmarks/prediction/*.py benchmarks/gpu/*.py)

# Every architecture of tests/corpus at 1, 2 and 3 ranks, and the tables in docs/coverage.md.
corpus: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.corpus $(CORPUS_ARGS)

# Two thousand random forms of attention; make test runs a hundred.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.passes.detect.fuzz_attention 0 2000 \
	  --record tests/passes/detect/fuzz_record.json

# What one GPU can show, in stages of at most 8 minutes; without a GPU, whether every stage runs:
#   make gpu DEVICE=cpu SMALL=1
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(SMALL),--small) $(GPU_ARGS)

bench-memory: $(INSTALLED)
	$(BIN)/python -m benchmarks.memory

clean:
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
