# Everything a newcomer needs is `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check format evals clean help

help:
	@echo "make demo    convert a released-form checkpoint into a Hub folder and generate from it"
	@echo "make test    run the checks and the tests"
	@echo "make check   linters and types only"
	@echo "make format  apply the formatter"
	@echo "make evals   run every evaluation on a golden checkpoint and refresh evals/results/"

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt torch
	$(BIN)/pip install -qq --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
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

evals: $(VENV)/dev.stamp
	@rm -rf build/evals && mkdir -p build
	$(BIN)/python -m scripts.convert_checkpoint tests/golden/mlra_4 build/evals/mlra_4_golden
	$(BIN)/python -m evals.prepare_tokens --tokenizer build/evals/mlra_4_golden --output build/evals --data LICENSE
	$(BIN)/python -m evals.perplexity --model build/evals/mlra_4_golden --overwrite \
		--data build/evals/LICENSE.bin tests/golden/README.md dataset:evals/tasks,column=question \
		--output evals/results/perplexity_golden.json
	$(BIN)/python -m evals.downstream --model build/evals/mlra_4_golden --tasks mlra_demo --batch-size 8 --overwrite \
		--output evals/results/downstream_golden.json
	$(BIN)/python -m evals.equivariance --output evals/results/equivariance.json
	$(BIN)/python -m evals.cache_tables --output evals/results/cache_tables.json
	$(BIN)/python -m evals.plots --cache evals/results/cache_tables.json \
		--perplexity evals/results/perplexity_golden.json

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
