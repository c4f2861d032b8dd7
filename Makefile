# One virtual environment, .venv, made at the first call; quick when nothing changed.
#
#   make demo     the main job on real digits: table and pictures
#   make test     build and run the tests
#   make bench    the benchmarks, with their table
#   make lint     ruff, mypy, clang-format
#   make cuda-compile   every CUDA source through nvcc, where there is one
#   make docs     the documentation, as pages, in site/
#   make fuzz     10,000 random calls, right ones and wrong ones
#   make sanitize the tests on a build that AddressSanitizer and UBSan watch
#   make coverage the lines that the tests reach, of Python and of csrc/
#   make wheel    sdist, wheel against the oldest torch, audits, tests in a clean environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f -name '*.*')

.PHONY: demo test bench lint format cuda-compile docs fuzz sanitize coverage wheel build clean
.DEFAULT_GOAL := test

build: $(VENV)/built

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Versions are pinned; pip is called again only when they or the packaging change.
$(VENV)/installed: requirements/dev.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	@touch $@

# The first build installs the package in place, and a new packaging does so again; others only
# compile what changed.
$(VENV)/built: $(VENV)/installed setup.py linfuse_ext/_version.py $(SOURCES)
	@if [ ! -e $(VENV)/built ] || [ pyproject.toml -nt $(VENV)/built ]; then \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .; fi
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	$(BIN)/python examples/digits.py

# A process for each core, each with one thread: small tensors gain nothing from more.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not cuda" -n auto --dist worksteal tests

bench: build
	$(BIN)/python -m bench

CXX_FILES := $(filter %.h %.cpp %.cu %.cuh %.inl,$(SOURCES)) $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

cuda-compile: $(VENV)/installed
	$(BIN)/python csrc/cuda_compile.py

$(VENV)/docs: requirements/docs.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --requirement requirements/docs.txt
	@touch $@

# Material for MkDocs announces its successor at every build; the variable keeps it short.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

fuzz: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py

sanitize coverage: $(VENV)/installed
	$(BIN)/python tests/instrumented.py $@

wheel: $(VENV)/installed
	$(BIN)/python tests/wheel.py $(TESTS)

clean:
	rm -rf build dist site *.egg-info linfuse_ext/*.so $(VENV)
