# `make train` and `make test` set up everything they need: a virtual environment of their own,
# torch at the pinned version first, then this package with its extras.
PYTHON ?= python3
# A version of PyTorch instead of the pinned one, in an environment of its own: make test TORCH=2.9.1
TORCH  ?=
VENV   ?= .venv$(TORCH:%=-torch-%)
RUN    ?= runs/digits
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# What an installation depends on: Python sources are read in place, the C++ ones are compiled.
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
BUILD_INPUTS := pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: help train test campaign bench bench-full gpu figures check check-native docs wheel clean
help:
	@echo "make train   train on the embedded digits and write pictures and metrics to $(RUN)"
	@echo "make test    run the test suite (DIFFMTL_TEST_DEVICE=cuda runs it on a GPU, TORCH=2.9.1 with that PyTorch)"
	@echo "make campaign   the whole table of architectures, and kills, damaged files, malformed options and components,"
	@echo "             of which make test runs a part"
	@echo "make bench   time everything beside the reference, the peers and the limit, a quarter of an hour on 2 cores;"
	@echo "             bench-full takes hours; both use a GPU where there is one and write benchmarks/results,"
	@echo "             a part of them, as in make bench BENCH='--groups clustering', runs/bench"
	@echo "make gpu     what a machine with an NVIDIA GPU shows in ten minutes: tests, kernels, training steps; to runs/gpu"
	@echo "make figures   put what they found into README and docs/figures"
	@echo "make check   lint, type check, compile the GPU kernels ahead of time (needs no GPU)"
	@echo "make check-native   fuzz the C++ code under the address and undefined behaviour sanitizers"
	@echo "make docs    build the documentation site into build/site; warnings are errors"
	@echo "make wheel   build this machine's wheel into dist, and test it in empty environments with PyTorch $(WHEEL_TORCH)"
	@echo "make clean   remove the virtual environments and build outputs (runs/ is kept)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"expected Python 3.11 to 3.13, found {v.major}.{v.minor}; choose one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Another PyTorch brings its own triton, whose interpreter may be older than what numpy 2.4 has taken away.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	(grep -vE '^(torch|triton|numpy)==' constraints.txt; echo 'torch==$(TORCH)'; echo 'numpy<2.4') > $@

$(VENV)/torch.stamp: $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install --quiet -c $(CONSTRAINTS) torch
	@touch $@

$(VENV)/train.stamp: $(BUILD_INPUTS) | $(VENV)/torch.stamp
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[train]'
	@touch $@

$(VENV)/dev.stamp: $(BUILD_INPUTS) | $(VENV)/torch.stamp
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/train.stamp

# The baselines and pytest-benchmark; torch.compile and the models need what the trainer does.
$(VENV)/bench.stamp: $(BUILD_INPUTS) | $(VENV)/torch.stamp
	$(PIP) install --quiet -c $(CONSTRAINTS) -e '.[train,bench]'
	@touch $@ $(VENV)/train.stamp

# An interrupted run continues from its last checkpoint; a finished one is left alone.
train: $(VENV)/train.stamp
	$(BIN)/diffmtl-fast train --resume --run-dir $(RUN)

# Once more with the GPU's launchers, whose kernels Triton's interpreter runs: a choice that takes less than a minute.
INTERPRETED := tests/kernels/test_interpreter.py tests/gradients/test_clustered.py::test_step_is_exact \
  tests/gradients/test_precision.py::test_a_model_in_bfloat16 tests/train/test_loop.py::test_any_module_and_data_without_labels \
  tests/examples/test_examples.py::test_losses_of_the_fused_ops_fall_and_their_gradients_are_the_eager_ones

# One thread per worker: two workers that each used every core would fight for them.
test: $(VENV)/dev.stamp
	DIFFMTL_TEST_DEVICE=interpreter OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(INTERPRETED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

campaign: $(VENV)/dev.stamp
	DIFFMTL_CAMPAIGN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/gradients/test_architectures.py \
	  tests/gradients/test_random_programs.py tests/weighting tests/train/test_campaign.py

# The tables come last, and are in the JSON file that it names. BENCH passes options on, such as
# BENCH='--groups clustering' or BENCH='--reference-repo PATH'.
bench: $(VENV)/bench.stamp
	$(BIN)/python -m pytest benchmarks/bench_suite.py -q --scale $(or $(SCALE),default) $(BENCH)

bench-full: SCALE := full
bench-full: bench

gpu: $(VENV)/dev.stamp
	PYTHON=$(BIN)/python INSTALL=0 benchmarks/gpu.sh runs/gpu

# README's figures and pictures, from the files in benchmarks/results and nothing else.
figures: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks report benchmarks/results/*.json --out docs/figures --readme README.md docs/benchmarks.md

# tests/typing/usage.py is a user's program, which their type checkers, too, must accept.
check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/typing/usage.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing/usage.py
	$(BIN)/python tests/kernels/aot.py

# Not part of check: the sanitizers' build takes a minute, and the fuzzer as long as it is given.
check-native: $(VENV)/dev.stamp
	$(BIN)/python tests/native/check.py --seconds 60

# Nothing is loaded from elsewhere, neither here nor by a reader's browser.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# With the oldest PyTorch supported and the one developed with. The wheel carries no library: auditwheel finds none to
# add, and names the oldest Linux that it runs on. The wheels of a release are made by cibuildwheel (pyproject.toml).
WHEEL_TORCH ?= 2.9.1 $(patsubst torch==%,%,$(filter torch==%,$(file <constraints.txt)))
wheel: $(VENV)/dev.stamp
	rm -rf build/wheel dist
	$(BIN)/python -m build --wheel --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tests/wheel/check.py dist --torch $(WHEEL_TORCH)

clean:
	rm -rf .venv .venv-torch-* $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
