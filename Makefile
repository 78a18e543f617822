# What a newcomer types. Each target makes what it needs: the development environment in .venv (with
# the versions of constraints-dev.txt; cmake and ninja come with it) and the native module in it.
# A fresh machine needs Python 3.10 or newer, a C++17 compiler and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := $(VENV)/.ready
BUILT := $(VENV)/.built

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The tests that exercise native code, and that run once for every instruction set.
NATIVE_TESTS := tests/test_kernels.py tests/test_solve_native.py tests/test_prune_native.py
# Sets $isas, to all that this machine has unless the environment names some; fails if there is none.
FIND_ISAS := set -e; isas="$${ISAS:-$$($(BIN)/python .ci/isas.py)}"; test -n "$$isas"

.DEFAULT_GOAL := build
.PHONY: build demo demo-full test test-isas lint format stubs bench wheel sanitize clean

build: $(BUILT)

demo: build
	$(BIN)/tersor demo

# The whole pipeline on the demo model, about ten minutes; leaves its page in build/demo-full.
demo-full: build
	rm -rf build/demo-full build/demo-full.partial
	$(BIN)/tersor demo --full --out build/demo-full

# The demo model first, if it is not there yet, on all cores; then a worker for each core, each with
# whole files: what a file makes once is made once.
test: build
	$(BIN)/python -c 'from tersor.demo_model import demo_model; demo_model()'
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Every instruction set of this machine, forced in turn.
test-isas: build
	$(FIND_ISAS); for isa in $$isas; do \
	  echo "TERSOR_ISA=$$isa"; TERSOR_ISA=$$isa $(BIN)/python -m pytest $(NATIVE_TESTS); \
	done

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python .ci/check_tree.py

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# The types of the native module for Python tools: checked in, and a test says when it is out of date.
stubs: build
	$(BIN)/python -m nanobind.stubgen -q -m tersor._core -o python/tersor/_core.pyi

# Not part of `test`: a timing on a busy machine says nothing. Writes bench/results/. Other scripts of
# bench/ (demo, streaming) take their time and are run by themselves.
bench: build
	set -e; for each in gemm solve threads sparse; do $(BIN)/python bench/$$each.py; done

wheel: $(READY)
	rm -rf dist
	$(PIP) wheel --no-deps --wheel-dir dist -C build-dir=build/wheel \
	  -C cmake.define.TERSOR_CUDA_ARCHITECTURES=wheel .
	$(BIN)/auditwheel show dist/tersor-*.whl

# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC). The instrumented
# build lives in a second environment that borrows the packages of the first, all but tersor: what
# PYTHONPATH adds comes without its .pth files, and so without the editable install. The runtime
# must be the first library of the process, and libstdc++ the second, so that it finds __cxa_throw.
# Leaks are not looked for: the interpreter and torch keep memory on purpose.
SANITIZE := build/sanitize
sanitize: $(READY)
	$(PIP) install -q --no-build-isolation --no-deps --upgrade --target $(SANITIZE)/site \
	  -C build-dir=$(SANITIZE)/cmake -C cmake.build-type=RelWithDebInfo \
	  -C cmake.define.TERSOR_SANITIZE=ON .
	$(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	$(FIND_ISAS); \
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))'); \
	for isa in $$isas; do \
	  echo "TERSOR_ISA=$$isa, with sanitizers"; \
	  TERSOR_ISA=$$isa PYTHONPATH=$(SANITIZE)/site:$$site \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(SANITIZE)/venv/bin/python -m pytest --capture=sys -p no:cacheprovider $(NATIVE_TESTS); \
	done

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(BUILT)

$(BUILT): $(READY) $(NATIVE)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

# The editable install takes Python files straight from python/tersor.
$(READY): constraints-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "tersor needs Python 3.10 or newer: run make PYTHON=/path/to/python3.10")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints-dev.txt scikit-build-core nanobind cmake ninja
	$(PIP) install -q -c constraints-dev.txt --no-build-isolation -e '.[dev]'
	touch $@
