# make test, make bench: from a fresh clone, on a machine with Python 3.10 or newer, g++ and make. An nvcc is used if found.
#
#   PYTHON=python3.12         the Python that the environment is made with
#   VENV=.venv                where it is made; empty: use PYTHON and the packages it has, and download nothing
#   TORCH=torch==2.13.0       another torch
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    the small CPU build of torch (PyPI's is the CUDA build: gigabytes)
#   ARGS="-k depthwise"       more arguments for pytest: options, or the files to run; make bench: ARGS="--providers all"
#   CMX_CIFAR10=FOLDER        make test: a CIFAR-10, on whose test images the shipped weights are tried too
#   CMX_BENCH=full            make bench: every provider, batch size and operator (hours; else about five minutes)
#   TORCHES="2.11.0 2.13.0"   make wheel-test: the torches under which one and the same wheel is tried
#   TRITON=3.6.0              make triton-test: another Triton than the installed one
#   PART=correct|ops|product|network|training    a part of make gpu-check; all of them if it is not given

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
PART ?= all
TORCHES ?= 2.11.0 2.13.0
TRITON ?= 3.6.0

SOURCES := setup.py pyproject.toml cmx_kernels/_build_info.py $(shell find csrc -type f)
# not compiled: Python compiles what is imported, and all of torch and triton would take half a minute
INSTALL := -m pip install --no-compile
BUILD := -m pip install --no-build-isolation --no-deps --verbose -e .
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: test bench gpu-check wheel wheel-test install-test triton-test lint clean
.DELETE_ON_ERROR:

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
READY := built
BENCH_READY := built
.PHONY: built
built:
	$(RUN) $(BUILD)
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.built
BENCH_READY := $(VENV)/.bench $(READY)
endif

test: $(READY)
	$(RUN) -m pytest $(ARGS)

bench: $(BENCH_READY)
	$(RUN) -m pytest benchmarks --benchmark-only $(ARGS)

# tests, checkers and timings on a GPU, into benchmarks/results/; each PART takes under ten minutes, and no network.
# ARGS=--resume measures what an earlier call left out. Built for this GPU alone: a fifth of the time
gpu-check: BEGAN := $(shell date +%s)
gpu-check: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),native)
gpu-check: $(READY)
	$(RUN) -m benchmarks.gpu.check --part $(PART) --since $(BEGAN) $(ARGS)

wheel: $(READY)
	rm -rf dist
	$(RUN) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# the wheel, built once, in an environment of its own for each torch; run outside of the sources
wheel-test: wheel $(TORCHES:%=wheel-under-torch-%)
wheel-under-torch-%: wheel
	$(PYTHON) -m venv --clear build/torch-$*
	build/torch-$*/bin/python $(INSTALL) $(INDEX) torch==$* numpy
	build/torch-$*/bin/python $(INSTALL) --no-deps dist/*.whl
	cd build/torch-$* && bin/python ../../tests/smoke.py

# as a user installs it: in isolation, against the torch that is there; then editable
install-test:
	$(PYTHON) -m venv --clear build/install
	build/install/bin/python $(INSTALL) $(INDEX) "$(TORCH)" numpy
	build/install/bin/python $(INSTALL) .
	cd build/install && bin/python ../../tests/smoke.py
	build/install/bin/python $(INSTALL) -e .
	cd build/install && bin/python ../../tests/smoke.py

# the tests of the Triton kernels with another release than the installed one, which stays: minutes
triton-test: $(READY)
	test -d build/triton-$(TRITON) || $(RUN) $(INSTALL) --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(RUN) -m pytest tests/test_triton.py $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(if $(strip $(VENV)),$(VENV)/bin/)clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(RUN) -m mypy

clean:
	rm -rf build dist *.egg-info .venv cmx_kernels/_C*.so cmx_kernels/_build.json

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@test -n "$(TORCH_INDEX)" || command -v nvidia-smi >/dev/null || \
	  echo "No GPU here: TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the CPU build of torch, which is smaller."
	$(RUN) $(INSTALL) $(INDEX) "$(TORCH)"
	touch $@

$(VENV)/.test: $(VENV)/.torch requirements/test.txt
	$(RUN) $(INSTALL) -r requirements/test.txt
	$(RUN) $(INSTALL) --no-deps timm==1.0.31 torchvision==0.28.0  # whose wheels would replace the torch above
	touch $@

$(VENV)/.bench: $(VENV)/.test requirements/bench.txt
	$(RUN) $(INSTALL) -r requirements/bench.txt
	touch $@

$(VENV)/.built: $(VENV)/.test $(SOURCES)
	$(RUN) $(BUILD)
	touch $@
