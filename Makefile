# make demo and make test do everything on a fresh machine that has Python 3.10 or newer, a C++17 compiler and a
# package registry. `make install` is their common first step; a second call costs nothing, until something that the
# compiled core or the dependencies are made of has changed.

SHELL := /bin/sh
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.honeytrace-installed
TOOLS := $(VENV)/.honeytrace-tools
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f -not -name '*.o' -not -path 'csrc/fuzz/*')
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Each test process works on one thread: several processes with several threads each would fight over the cores.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
TEST_PROCESSES ?= $(shell test $(CORES) -gt 8 && echo 8 || echo $(CORES))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install tools demo test test-long lint evaluate bench test-gpu bench-gpu clean \
	docs fuzz-core fuzz-threads fuzz-files fuzz-http soak

help:
	@echo "make demo       protect a classifier, steal it, prove the theft (installs first)"
	@echo "make test       all tests that need no GPU (installs first)"
	@echo "make test-long  what the suite has in a shorter form"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make evaluate   every defence against every attack (PLAN=digits-small, digits, fashion or a file)"
	@echo "make fuzz-http  requests of all kinds to a served model"
	@echo "make soak       a served model under load, bare and protected side by side"
	@echo "make bench      time the kernels against others"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make bench-gpu  the benches that need a GPU"
	@echo "make docs       pages of the interface, out of the docstrings, in build/api"
	@echo "make fuzz-core  the core under libFuzzer (needs clang); fuzz-threads: its threads; fuzz-files: readers"
	@echo "make install    virtual environment in $(VENV), compiled core, what it needs to run"
	@echo "make tools      on top of it, what tests and checks need"
	@echo "make clean      remove what was built and installed"

install: $(STAMP)

# --no-compile: Python writes its bytecode for what is imported, when it is imported, and not for all of torch.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

$(STAMP): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 found; say where: make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $(STAMP)

# What tests and checks need on top: the extra "dev" of pyproject.toml, without building the package again.
tools: $(TOOLS)

$(TOOLS): $(STAMP)
	@$(BIN)/python -c "from pip._vendor import tomli; \
		project = tomli.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['dev'], sep='\n')" > $(VENV)/dev.txt
	$(PIP) -r $(VENV)/dev.txt
	@touch $(TOOLS)

demo: install
	$(BIN)/honeytrace demo

# Resumable: call it again after a kill. Results and report.html lie in evaluation/ (or EVALUATION=...).
PLAN ?= digits-small
EVALUATION ?= evaluation/$(notdir $(basename $(PLAN)))
evaluate: tools
	OMP_NUM_THREADS=1 $(BIN)/honeytrace evaluate $(PLAN) --directory $(EVALUATION)

# Requests by Schemathesis from the server's own description. tests/test_serving_fuzz.py is the short form.
FUZZ_EXAMPLES ?= 1000
fuzz-http: tools
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_http.py --examples $(FUZZ_EXAMPLES)

# Thousands of queries at a time, a model bare and protected side by side; tests/test_serving_load.py is the short form.
soak: tools
	OMP_NUM_THREADS=1 $(BIN)/python bench/soak_http.py

# Speed ratios first and alone: a second test process beside them would be in the picture.
test: tools
	$(PYTEST) -q -m "perf and not gpu" || test $$? -eq 5
	$(PYTEST) -q -n $(TEST_PROCESSES) --dist loadgroup -m "not perf and not gpu and not long"

test-long: tools
	$(PYTEST) -q -m long

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

bench: tools
	@found=0; for file in bench/bench_*.py; do test -e "$$file" || continue; found=1; \
		echo "== $$file"; $(BIN)/python "$$file" || exit 1; done; \
	test $$found -eq 1 || { echo "there are no benches in bench/" >&2; exit 1; }

docs: tools
	$(BIN)/python docs/build_api.py build/api

# Long forms; the short ones are tests (tests/test_fuzz.py). FUZZ_SECONDS each, counts in docs/reliability.md.
FUZZ_SECONDS ?= 900
fuzz-core:
	$(MAKE) -C csrc/fuzz BUILD=$(CURDIR)/build/fuzz FUZZ_SECONDS=$(FUZZ_SECONDS) libfuzzer

fuzz-threads:
	$(MAKE) -C csrc/fuzz BUILD=$(CURDIR)/build/fuzz RACE_SECONDS=$(FUZZ_SECONDS) race

fuzz-files: tools
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_files.py --seconds $(FUZZ_SECONDS)

# A machine with a GPU often has a torch of its own and no registry: WITH=python3 takes that Python and what it has, and
# builds the core for it in place.
ifdef WITH
GPU_PYTHON := PYTHONPATH=$(CURDIR) $(WITH)
gpu-python:
	HONEYTRACE_CUDA=1 $(WITH) setup.py -q build_ext --inplace
else
GPU_PYTHON := $(BIN)/python
gpu-python: tools
endif

# By file, for what other tests import may not be there.
test-gpu: gpu-there
	$(GPU_PYTHON) -m pytest -q -m gpu $(shell grep -l "mark\.gpu" tests/*.py)

# BENCH_OPTIONS="--without compiled" leaves torch.compile out.
bench-gpu: gpu-there
	@found=0; for file in bench/gpu_*.py; do test -e "$$file" || continue; found=1; \
		echo "== $$file"; $(GPU_PYTHON) "$$file" $(BENCH_OPTIONS) || exit 1; done; \
	test $$found -eq 1 || { echo "there are no GPU benches in bench/" >&2; exit 1; }

.PHONY: gpu-there gpu-python
gpu-there: gpu-python
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'no GPU that torch can use: nothing was run')"

clean:
	rm -rf $(VENV) build dist honeytrace/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
