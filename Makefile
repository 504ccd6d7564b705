# make train: train a small language model on two workers, for about a minute.
# make test:  run the whole suite.
# Both make the environment in .venv when it is not there, or when what it depends on has changed.

PYTHON ?= python3
ENVIRONMENT := .venv
READY := $(ENVIRONMENT)/.ready

.PHONY: train test lint format docs bench clean

train: $(READY)
	$(ENVIRONMENT)/bin/unisono train configs/lm.yaml -n 2

test: $(READY)
	$(ENVIRONMENT)/bin/pytest --cov --cov-report=term:skip-covered

lint: $(READY)
	$(ENVIRONMENT)/bin/ruff check .
	$(ENVIRONMENT)/bin/ruff format --check .
	$(ENVIRONMENT)/bin/mypy
	$(ENVIRONMENT)/bin/lint-imports

format: $(READY)
	$(ENVIRONMENT)/bin/ruff check --fix .
	$(ENVIRONMENT)/bin/ruff format .

docs: $(READY)
	$(ENVIRONMENT)/bin/python docs/make_reference.py

bench: $(READY)
	$(ENVIRONMENT)/bin/pip install --quiet -c constraints.txt -e '.[bench]'
	$(ENVIRONMENT)/bin/unisono bench train

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with make PYTHON=python3.12"; exit 2; }
	@echo "making $(ENVIRONMENT) and installing into it: about a minute"
	@$(PYTHON) -m venv $(ENVIRONMENT)
	@$(ENVIRONMENT)/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(ENVIRONMENT) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
