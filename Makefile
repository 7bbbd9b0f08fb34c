# Everything a newcomer needs is `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check format clean help

help:
	@echo "make demo    convert a released-form checkpoint into a Hub folder and generate from it"
	@echo "make test    run the checks and the tests"
	@echo "make check   linters and types only"
	@echo "make format  apply the formatter"

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/run.stamp
	@rm -rf build/demo && mkdir -p build
	$(BIN)/python -m scripts.convert_checkpoint tests/golden/mlra_4 build/demo
	$(BIN)/python -m scripts.generate --model build/demo --prompt "Multi-head attention" --max-new-tokens 16

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
