# On a fresh machine: `make quickstart` sets up and runs the main job, `make test` sets up and runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PYTORCH_INDEX chooses torch's build, for instance PYTORCH_INDEX=https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(PYTORCH_INDEX),--extra-index-url $(PYTORCH_INDEX))

.PHONY: quickstart test soak lint bench clean

quickstart: $(VENV)/run-ready
	@$(BIN)/python -m bimamba_lit.quickstart

test: $(VENV)/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

soak: $(VENV)/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev-ready
	$(BIN)/python -m bimamba_lit bench

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch by its exact version first: a range would take the newest build with gigabytes of CUDA packages.
$(VENV)/python-ready:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or more, once) ..."
	$(INSTALL) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@touch $@

$(VENV)/run-ready: pyproject.toml constraints.txt $(VENV)/python-ready
	$(INSTALL) --editable .
	@touch $@

$(VENV)/dev-ready: $(VENV)/run-ready
	$(INSTALL) --editable '.[dev]'
	@touch $@
