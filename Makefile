# Everything a newcomer needs is `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVING := .venv-serving
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-serving check kernels format compat evals clean help

help:
	@echo "make demo    let a small trained model continue a sentence"
	@echo "make test    run the checks and the tests"
	@echo "make test-serving  test the vLLM plugin with vLLM's CPU build, in an environment of its own"
	@echo "make check   linters and types only"
	@echo "make kernels compile every kernel for every kind of GPU (no GPU needed; an hour on two cores)"
	@echo "make format  apply the formatter"
	@echo "make compat  test five versions of transformers, each in its own environment (an hour)"
	@echo "make evals   run every evaluation on the demo checkpoint and refresh evals/results/"

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
	$(BIN)/python -m scripts.generate --model checkpoints/mlra_4_demo --prompt "It was late in the evening when" \
		--max-new-tokens 120 --temperature 0.8 --top-p 0.9 --seed 3

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

$(SERVING)/run.stamp: pyproject.toml tests/serving/requirements.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install -qq --no-compile $(shell grep ^torch== tests/serving/requirements.txt)
	$(SERVING)/bin/pip install -qq --no-compile --no-deps --requirement tests/serving/requirements.txt
	$(SERVING)/bin/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

test-serving: $(SERVING)/run.stamp
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest tests/serving

kernels: $(VENV)/dev.stamp
	$(BIN)/python -m tests.compile_kernels

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compat:
	$(PYTHON) -m scripts.compat

evals: $(VENV)/dev.stamp
	@rm -rf build/evals && mkdir -p build
	$(BIN)/python -m evals.prepare_tokens --tokenizer checkpoints/mlra_4_demo --output build/evals --data LICENSE
	$(BIN)/python -m evals.perplexity --model checkpoints/mlra_4_demo --overwrite \
		--data checkpoints/heldout_sample.bin build/evals/LICENSE.bin configuration/training/devils_dictionary.txt \
		--output evals/results/perplexity_demo.json
	$(BIN)/python -m evals.downstream --model checkpoints/mlra_4_demo --tasks mlra_demo --batch-size 8 --overwrite \
		--output evals/results/downstream_demo.json
	$(BIN)/python -m evals.downstream --model checkpoints/mlra_4_demo --local evals/sample --batch-size 16 --overwrite \
		--tasks openbookqa hellaswag lambada_openai --output evals/results/sample_demo.json
	$(BIN)/python -m evals.equivariance --output evals/results/equivariance.json
	$(BIN)/python -m evals.cache_tables --output evals/results/cache_tables.json
	$(BIN)/python -m evals.plots --cache evals/results/cache_tables.json \
		--perplexity evals/results/perplexity_demo.json

clean:
	rm -rf $(VENV) $(SERVING) build .pytest_cache .ruff_cache .mypy_cache
