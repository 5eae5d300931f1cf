# Every target first makes sure that $(VENV) holds what requirements.lock says. Needs Python 3.11+ and make.
#   make demo    start the server on the shipped model, ask it things, print a table, stop
#   make serve   start the server and keep it running; ARGS="--port 9000" goes to model1 serve
#   make test    everything CI runs: make check, then all tests
#   make check   format, lint, types, import directions, line budget

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV ?= .venv
# With PY=python3 a target runs in an environment that already has everything (a GPU image).
PY ?= $(VENV)/bin/python
READY = $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)
TEST_READY = $(if $(READY),$(VENV)/.installed-triton)
BIN = $(if $(READY),$(VENV)/bin/)
TORCH = $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.lock)
CPU_TORCH = [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null
UV = $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL = $(VENV)/bin/uv pip install -q --python $(VENV)/bin/python

# Start-up is a second slower where the environment forbids Python to keep its bytecode.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo serve test test-gpu check format-check lint types imports lines format lock clean
.DEFAULT_GOAL = help

help:
	@sed -n 's/^#   //p' Makefile

# torch first and alone. On Linux the public index serves CUDA builds of several gigabytes under
# the same version, so without a GPU the CPU build is asked for by its full name: from the
# configured package sources if they have it, else from PyTorch's own index. Triton stays out.
$(VENV)/.installed: requirements.lock pyproject.toml
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Model1 needs Python 3.11 to 3.13, got %d.%d: set PYTHON=" % sys.version_info[:2])'
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q $(UV)
	@if $(CPU_TORCH); then \
	  $(PIP) install -q --no-deps $(TORCH)+cpu 2>/dev/null || { \
	  echo "$(TORCH)+cpu is not in the configured package sources; asking PyTorch's index"; \
	  $(PIP) install -q --no-deps $(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu; }; \
	else \
	  $(PIP) install -q $(TORCH); \
	fi
	@grep -v '^triton==' requirements.lock | $(INSTALL) --compile-bytecode -r -
	@$(INSTALL) --no-deps --editable .
	@touch $@

# Checks and tests alone need Triton (0.7 GB). A CUDA build of torch has brought its own.
$(VENV)/.installed-triton: $(VENV)/.installed
	@if $(CPU_TORCH); then grep '^triton==' requirements.lock | $(INSTALL) -r -; fi
	@touch $@

demo: $(READY)
	@$(PY) -m model1.cli.demo $(ARGS)

serve: $(READY)
	@$(PY) -m model1.cli serve $(ARGS)

test: check $(TEST_READY)
	@$(PY) -m pytest -n 2 --dist loadgroup --slow

# An image that brings its own PyTorch lacks pytest's plugins: their settings are not errors there.
test-gpu: $(TEST_READY)
	@$(PY) -m pytest -m gpu --slow $(if $(READY),,-o addopts=--import-mode=importlib -W default)

check: format-check lint types imports lines

format-check: $(READY)
	@$(BIN)ruff format --check --quiet . || { $(BIN)ruff format --check .; exit 1; }

lint: $(READY)
	@$(BIN)ruff check --quiet .

types: $(TEST_READY)
	@$(BIN)pyright --pythonpath $(PY)

imports: $(READY)
	@$(BIN)lint-imports --no-logo

lines: $(READY)
	@$(PY) tests/line_budget.py

format: $(READY)
	@$(BIN)ruff format .
	@$(BIN)ruff check --fix .

# Upgrades nothing by itself; delete a line of the lock, or the lock, to move versions.
lock: $(READY)
	@$(BIN)uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
