# make train: set up .venv, then run the main job.   make test: set up, then run every test that needs no GPU.   make test-gpu: those that need one.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
STAMP  := $(VENV)/.installed

TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

.PHONY: train test test-gpu compile-gpu compile-gpu-quick check docs bench setup clean
train: setup
	$(BIN)/python -m rl.train $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu -n 8 --dist loadgroup $(ARGS)

# Every kernel and every plan, compiled for cards that need not be there (one of each compute capability), on each Triton that is
# accepted; -quick: one variant of each kernel, for Hopper on the oldest and the newest, for three others on the newest.
CARDS := 80 86 89 90 100 103 120
compile-gpu: setup $(TRITONS:%=build/triton-%)
	for v in $(TRITONS); do for c in $(CARDS); do \
	$(BIN)/python -m tests.kernels.gpu.compile --triton build/triton-$$v --capability $$c $(ARGS) || exit 1; done; \
	$(BIN)/python -m tests.kernels.gpu.compile --triton build/triton-$$v --family portable $(ARGS) || exit 1; done

OLDEST_AND_NEWEST := $(firstword $(TRITONS)) $(lastword $(TRITONS))
compile-gpu-quick: setup $(OLDEST_AND_NEWEST:%=build/triton-%)
	for v in $(OLDEST_AND_NEWEST); do $(BIN)/python -m tests.kernels.gpu.compile --quick --triton build/triton-$$v $(ARGS) || exit 1; done
	for c in 80 100 120; do $(BIN)/python -m tests.kernels.gpu.compile --quick --capability $$c --triton build/triton-$(lastword $(TRITONS)) || exit 1; done

build/triton-%: $(STAMP)
	$(PIP) --no-deps --upgrade --target $@ triton==$*
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation as a site, in build/site; a link that leads nowhere is an error. It needs no network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: setup
	$(BIN)/python -m kernels.bench
	$(BIN)/python -m rollout.bench
	$(BIN)/python -m trainer.bench

setup: $(STAMP)
$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "samebit needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { echo "samebit needs a C compiler (cc, gcc or clang)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifndef GPU
	@$(PIP) uv && UV_HTTP_TIMEOUT=20 $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu -r constraints-cpu.txt 2>/dev/null || \
	echo "samebit: no GPU here, and the index of torch's CPU builds does not answer: pip takes the torch of the ordinary index, which on Linux x86-64 may be the CUDA build (a download of about 3 GB)"
endif
	$(PIP) $(if $(GPU),,-c constraints-cpu.txt) -e ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
