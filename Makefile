# Every target sets up what it needs: one virtual environment from the pinned versions in constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed

PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help env test test-all test-rest test-pure stress endurance conformance conformance-xla versions lint format demo notebooks bench clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

env: $(STAMP) ## Build .venv

# torch first and by its exact version: any other request for it may fetch a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(STAMP)

test: $(STAMP) ## Run the tests, each room and each kind of case (five minutes)
	$(PYTEST) -m 'not exhaustive' $(PYTEST_ARGS)

test-all: $(STAMP) ## Run the tests, all cases (twenty minutes)
	$(PYTEST) $(PYTEST_ARGS)

test-rest: $(STAMP) ## Run what `make test` leaves out of `make test-all`
	$(PYTEST) -m exhaustive $(PYTEST_ARGS)

test-pure: $(STAMP) ## Run some rooms without the C++ extension
	PYTORCH2JAX_NATIVE=0 $(PYTEST) -m 'not exhaustive' tests/test_calls.py tests/test_errors.py tests/test_gradients.py \
		tests/test_modules.py tests/test_training.py tests/test_odd_inputs.py $(PYTEST_ARGS)

stress: $(STAMP) ## Compare thousands of random programs with the tape and without it (an hour)
	PYTORCH2JAX_STRESS_PROGRAMS=3000 PYTORCH2JAX_PROGRAMS=3000 \
		$(BIN)/python -m pytest --numprocesses=2 tests/test_tape_stress.py tests/test_programs.py $(PYTEST_ARGS)

endurance: $(STAMP) ## Look for growth over a hundred thousand calls and a thousand conversions and traces
	PYTORCH2JAX_ENDURANCE=10 $(BIN)/python -m pytest tests/test_endurance.py $(PYTEST_ARGS)

conformance: $(STAMP) ## Compare torch's own database of operators with torch (half an hour)
	$(BIN)/python -m conformance.run $(CONFORMANCE_ARGS)

conformance-xla: $(STAMP) ## The same for backend="xla" (an hour)
	PYTORCH2JAX_CONFORMANCE_BACKEND=xla $(BIN)/python -m conformance.run $(CONFORMANCE_ARGS)

versions: ## Run the tests on the lowest declared versions, on middle and on the newest ones; builds three environments
	$(PYTHON) scripts/versions.py $(VERSIONS_ARGS)

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## Fine-tune a pretrained torch encoder in Flax; writes demo-output/
	$(BIN)/python examples/finetune_encoder.py

notebooks: $(STAMP) ## Execute the notebooks, and keep their outputs
	$(BIN)/python scripts/notebooks.py

bench: $(BENCH_STAMP) ## Measure beside torch, Flax and others; writes benchmarks/results/
	$(BENCH_VENV)/bin/python -m benchmarks.run $(BENCH_ARGS)

# Competitors stay out of .venv: one of them compiles C++ at its first use.
$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' \
		--requirement benchmarks/requirements.txt
	touch $(BENCH_STAMP)

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) .venv-* demo-output build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
