# One word each; CI calls the same words. PY is the Python to use: .venv once `make setup` made it.
PY ?= $(firstword $(wildcard $(CURDIR)/.venv/bin/python) python3)
BIN = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | grep -v dlpack.h)

.PHONY: help setup check format stubs test test-cpp bench sanitize gpu-check gpu-bench wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      .venv with torch, the tools and an editable install that rebuilds on import"
	@echo "make check      ruff, clang-format, mypy --strict, stub, floors, contract, kernel objects"
	@echo "make test       the test suite, in two to four processes"
	@echo "make test-cpp   the C++ tests (also for gdb, valgrind, perf), the model on host-run CUDA kernels"
	@echo "make bench      the benchmarks; BENCH_JSON=1 also writes bench/results/"
	@echo "make sanitize   kernel and sequence tests under AddressSanitizer and UBSan"
	@echo "make gpu-check  build for sm_90a, ask the device its numerics, run every GPU test"
	@echo "make gpu-bench  build for sm_90a and measure beside torch; bench/results/gpu-*.json"
	@echo "make stubs      write src/tml_core/_ext.pyi from the installed module"
	@echo "make format     ruff format and clang-format, in place"
	@echo "make wheel      dist/tml_core-*.whl"
	@echo "make clean      remove build/ and dist/"

# Without build isolation: the import-time rebuild needs the build tools to stay installed.
setup: PY = $(CURDIR)/.venv/bin/python
setup:
	test -d .venv || python3 -m venv .venv
	$(PIP_INSTALL) torch scikit-build-core nanobind nanobind-backend ninja \
	  $(shell command -v cmake >/dev/null || echo cmake)
	$(PIP_INSTALL) --no-build-isolation -C editable.rebuild=true -C build-dir=build/editable \
	  -e ".[test,dev]"

check:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo clang-format --dry-run -Werror
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy
	$(PY) -m pytest python_tests/test_build_floors.py python_tests/test_contract.py \
	  python_tests/test_build_boundary.py -k "stub or floors or contract or objects"

format:
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

stubs:
	$(PY) -m nanobind.stubgen -q -m tml_core._ext -o src/tml_core/_ext.pyi

test:
	$(PY) -m pytest python_tests

test-cpp:
	PATH="$(BIN):$$PATH" cmake -S . -B build/cpp -G Ninja -DTML_TESTS=ON -DTML_CUDA=OFF \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(shell command -v $(PY))
	PATH="$(BIN):$$PATH" cmake --build build/cpp
	build/cpp/csrc/tests/tml_cpp_tests
	$(PY) -m pytest python_tests/test_cuda_backbone.py python_tests/test_cuda_train.py

bench:
	$(PY) -m pytest bench $(if $(BENCH_JSON),--bench-json)

sanitize:
	PY=$(PY) bash scripts/sanitize.sh

gpu-check gpu-bench:
	PY=$(PY) bash scripts/gpu.sh $(@:gpu-%=%)

wheel:
	$(PY) -m pip wheel --no-deps -w dist .

clean:
	rm -rf build dist
