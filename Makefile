# Every target sets up what it needs in .venv, from the pins in constraints.txt; nothing else of the machine is changed.
# Needs Python 3.11 or newer, g++ and make. PYTHON=python3.12 takes another Python, PIP_FLAGS=... is passed to pip.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)
STAMP := $(VENV)/.set-up
CUDA_SOURCES = $(shell find src tests benchmarks -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu check format bench clean

help:
	@echo "make demo      optimize a KernelBench model, verify it, and say what it gains (into build/)"
	@echo "make test      every test that needs no GPU"
	@echo "make test-gpu  the tests that need one"
	@echo "make check     ruff, mypy and clang-format, changing nothing"
	@echo "make format    lets ruff and clang-format rewrite the sources"
	@echo "make bench     measure on this machine's GPU"
	@echo "make setup     install all of that into .venv (the others do it by themselves)"
	@echo "make clean     remove .venv, build/ and caches"

setup: $(STAMP)

# torch goes first and alone, so that its pinned version is what everything after it finds installed. The package is
# built with the setuptools of .venv: an isolated build would download torch's requirements a second time.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: name a newer one, make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) can't make a virtual environment: install its venv module"; exit 1; }
	@echo "Setting up $(VENV), once: torch first"
	$(PIP) torch setuptools
	@echo "Setting up $(VENV): the rest"
	@$(PIP) --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@mkdir -p build
	$(BIN)/dwconv optimize examples/kernelbench/82_square_square.py -o build/82_square_square_dwconv.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CUDA_SOURCES)

bench: $(STAMP)
	$(BIN)/dwconv bench --suite kernelbench --dtype float32 --layout channels_first

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
