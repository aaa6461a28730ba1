# Two commands for a fresh clone: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/dali/*)
# Set by CI: warnings of the compiler are errors.
INSTALL_FLAGS ?=

.PHONY: demo test gpu lint format clean

demo: $(BIN)/.installed-demo
	$(BIN)/spd-fast demo --out demo

# Two at a time: half the time on two cores. Whole files, as their fixtures are dear.
test: $(BIN)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	@echo "The Triton kernels, in their interpreter."
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/test_triton_*.py

# On a machine with an NVIDIA GPU: what the tests could not show without one.
gpu: $(BIN)/.installed-test $(BIN)/.installed-bench
	SPD_FAST_REQUIRE_CUDA=1 $(BIN)/python -m pytest -q -m "cuda or triton"
	if command -v compute-sanitizer; then for tool in memcheck racecheck synccheck; do \
	  SPD_FAST_REQUIRE_CUDA=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest \
	    -q -m cuda -k "(test_distances or test_views) and not 2_to_the_31" || exit 1; done; fi
	$(BIN)/python bench/gpu.py --write

lint: $(BIN)/python
	$(BIN)/pip install -q ruff==0.17.* clang-format==23.*
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) tests/cuda/* bench/*.c

format: $(BIN)/python
	$(BIN)/pip install -q ruff==0.17.* clang-format==23.*
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) tests/cuda/* bench/*.c

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extras `demo` and `test` are installed apart: the tests need much more.
$(BIN)/.installed-%: pyproject.toml CMakeLists.txt $(SOURCES) | $(BIN)/python
	@echo "Installing spd-fast and what '$*' needs; torch is a large download."
	$(BIN)/pip install -e '.[$*]' $(INSTALL_FLAGS)
	touch $@

clean:
	rm -rf build demo .pytest_cache .ruff_cache
