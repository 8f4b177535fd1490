# Every target that runs Python first brings .venv up to date, which takes no time when nothing changed; `gpu` takes
# a Python that has torch for CUDA already, if there is one.
# Arguments go through ARGS: make test ARGS="tests/unit -k plan"

.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=

.PHONY: help demo doctor bench test slow gpu crowded lint format venv clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: venv ## Sample on one worker and on all of them, and compare (ARGS="--json")
	@$(PY) -m parallel demo $(ARGS)

doctor: venv ## Check this machine and say which plan it gets (ARGS="--json")
	@$(PY) -m parallel doctor $(ARGS)

bench: venv ## Measure attention, or ARGS="step" or ARGS="start"
	@$(PY) -m parallel bench $(or $(ARGS),attention)

test: venv ## Run the tests, in 10 minutes; the last lines say what was left out and why
	@$(PY) -m pytest $(ARGS)

slow: venv ## Run those that `test` leaves to CI, in half an hour (ARGS=tests/browser)
	@$(PY) -m pytest -m "slow and not extended and not thousands" $(ARGS)

crowded: venv ## Prepare environments with what popular packs install, and run the tests in them (ARGS="-k transformers_4")
	@.ci/make-crowded
	@$(PY) -m pytest -m extended tests/crowded $(ARGS)

gpu: ## Everything that this machine's GPUs can show, in 8 minutes (ARGS="--minutes 4", ARGS=--toy without a GPU)
	@python=$${PYTHON:-python3}; \
	$$python -c 'import torch, diffusers, pytest, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
	{ .ci/make-venv && python=$(PY); } && $$python -m tests.gpu.run $(ARGS)

lint: venv ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: venv ## Let ruff fix and format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

venv:
	@.ci/make-venv

clean: ## Remove caches and what demo and bench wrote (.venv stays)
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis output build dist
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
