PORT ?= 8000
PYTHON ?= python3
BUNDLE := build/demo
CHECKPOINT := service/seqloss/demo/checkpoint
CLIENT := clients/python
BIN := .venv/bin
INSTALLED := .venv/installed
# pip finds the build of Torch that it is told of. For the rest uv takes seconds where pip takes minutes;
# it knows nothing of a mirror that only pip is told of.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
PACKAGES := --constraint constraints.txt --editable '.[demo,test,check]' \
  --editable './$(CLIENT)[compression,parquet,filter,report]'
BENCH_ARGS ?=

.PHONY: help serve test test-long check licenses audit bench bench-sweeps bench-gpu bench-serving bench-corpus bench-ray families demo-bundle demo-checkpoint constraints clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(BUNDLE)/manifest.json  ## Serve the demo model; PORT=8000 by default
	@$(BIN)/python -m seqloss.demo.greeting --port $(PORT)
	@$(BIN)/seqloss serve demo=$(BUNDLE) --port $(PORT)

# Ray wants processors that nobody else takes, and its ports are the machine's: one at a time.
RAY_TESTS := tests/distributed/on_ray

test: $(INSTALLED)  ## Run all tests, a few at a time; TEST_ARGS are pytest's
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 $(TEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(RAY_TESTS)

test-long: $(INSTALLED)  ## Look for bugs in the batching with random examples, for an hour or so
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit --hypothesis-profile=long --timeout=0 \
	  --numprocesses auto --maxprocesses 4

check: $(INSTALLED)  ## Format, lint, types, import rule, README
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run --Werror service/seqloss/kernels/cpu/*
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pip-licenses > /dev/null
	$(BIN)/pytest tests/docs

licenses: $(INSTALLED)  ## List the licences of all that is installed; others than those allowed fail
	$(BIN)/pip-licenses --with-urls

audit: $(INSTALLED)  ## Look for known vulnerabilities of what is pinned; needs a network
	$(PYTHON) -m venv build/audit-venv
	build/audit-venv/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	build/audit-venv/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

bench: $(INSTALLED)  ## Measure speed and memory; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-sweeps: $(INSTALLED)  ## Measure cost over pairs, lengths, classes and batches; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.sweeps $(BENCH_ARGS)

bench-gpu: $(INSTALLED)  ## Measure seqloss on an NVIDIA GPU; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

bench-serving: $(INSTALLED)  ## Measure the service under load; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.serving $(BENCH_ARGS)

bench-corpus: $(INSTALLED)  ## Measure seqloss-client score; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.corpus $(BENCH_ARGS)

bench-ray: $(INSTALLED)  ## Measure two workers beside one on Ray; BENCH_ARGS=--help lists its arguments
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.cluster $(BENCH_ARGS)

families: $(INSTALLED)  ## Measure every family's error anew, for the table in the README
	@PYTHONPATH=tests $(BIN)/python -m benchmarks.families --readme README.md

demo-bundle: $(BUNDLE)/manifest.json  ## Export the demo checkpoint

demo-checkpoint: $(INSTALLED)  ## Train the demo models again: under 20 minutes each on two cores
	$(BIN)/python -m seqloss.demo.recipe
	$(BIN)/python -m seqloss.demo.recipe --backward

constraints: $(INSTALLED)  ## Pin every dependency anew
	echo 'torch==2.13.0' | $(BIN)/uv pip compile pyproject.toml $(CLIENT)/pyproject.toml --all-extras --universal \
	  --python-version 3.11 --no-header --no-annotate --upgrade --constraint - \
	  --output-file constraints.txt

clean:  ## Remove what make made, the environment too
	rm -rf .venv build

$(BUNDLE)/manifest.json: $(INSTALLED) $(wildcard $(CHECKPOINT)/*)
	$(BIN)/seqloss export $(CHECKPOINT) --output $(BUNDLE) --precision float32 --force

$(INSTALLED): pyproject.toml $(CLIENT)/pyproject.toml constraints.txt
	@echo 'Installing seqloss and what it needs into .venv; this takes a minute or more.'
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt torch uv
	$(UV) $(PACKAGES) || $(PIP) $(PACKAGES)
	@touch $@
