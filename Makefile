# `make run` and `make test` set up everything they need in .venv, once, and again when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test nightly clean

run: $(READY)
	$(BIN)/forja run $(ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(ARGS)

nightly: $(READY)
	$(BIN)/pytest -m nightly $(ARGS)

# What is computed goes; data.dvc, dvc.lock and DVC's cache stay, so that `forja run` restores it.
clean:
	rm -rf artifacts scratch build report.html code.yaml
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "forja needs Python 3.11 or newer as $(PYTHON); name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
