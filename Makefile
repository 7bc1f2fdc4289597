# `make run` shows a picture, `make test` runs the tests; `make help` lists the rest. Needs Python 3.11 or later and nothing else.

PYTHON ?= python3
PROMPT ?= a red heart
OUTPUT ?= heart.png
JOBS ?= 2
TIMES ?= 20
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MIN_PYTHON := import sys; sys.exit(sys.version_info < (3, 11) and f"mlxsup needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=python3.12")

# MLX's Linux wheel brings a reference BLAS; with OpenBLAS in front of it training is many times faster.
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib/*/libopenblas.so.0 /usr/lib64/libopenblas.so.0))

.DEFAULT_GOAL := help
.PHONY: help run test test-real lint format types imports example bench soak flaky mutants train sheet evaluate wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed-run ## make a picture: make run PROMPT="a yellow star" OUTPUT=star.png
	$(BIN)/mlxsup run emoji "$(PROMPT)" --output "$(OUTPUT)"

test: $(VENV)/.installed-dev ## all tests but the real engines': make test ARGS="-k config"
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-real: $(VENV)/.installed-dev build/real-mflux/.installed ## tests/real: with mflux, which gets an environment of its own under build/
	$(BIN)/python -m pytest $(ARGS) tests/real

lint: $(VENV)/.installed-dev ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed-dev ## mypy --strict on package and tests
	$(BIN)/mypy

imports: $(VENV)/.installed-dev ## which room may import which
	$(BIN)/lint-imports

example: $(VENV)/.installed-run ## write config.example.toml anew from the keys in the code
	$(BIN)/python -c 'from mlxsup import config, engines; print(end=config.example(engines.KEYS))' > config.example.toml.new
	mv config.example.toml.new config.example.toml

bench: $(VENV)/.installed-dev ## the numbers that the README gives
	$(BIN)/python -m tests.bench $(ARGS)

soak: $(VENV)/.installed-dev ## thousands of lives of runners; nothing may grow: make soak ARGS="--cycles 1000"
	$(BIN)/python -m tests.soak $(ARGS)

flaky: $(VENV)/.installed-dev ## faults and races TIMES times in a row (long), the rest twice; one failure is a failure
	$(BIN)/python -m tests.soak.flaky --times $(TIMES) --jobs $(JOBS) $(ARGS)

mutants: $(VENV)/.installed-mutants ## break the scheduler in some thousand ways, one at a time, and count how many its tests notice (long)
	rm -rf mutants
	CI=1 $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results
	$(BIN)/python -m tests.scheduling.mutants

train: $(VENV)/.installed-dev ## train the model that ships, from nothing (long): ARGS are those of the trainer
	$(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(BIN)/python -m mlxsup.imagegen.builtin.train $(ARGS)

sheet: $(VENV)/.installed-dev ## draw the contact sheet of the README with the model that ships
	$(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(BIN)/python -m mlxsup.imagegen.builtin.evaluate --sheet .media/emoji.png

evaluate: $(VENV)/.installed-dev ## measure the model that ships, as its card states it (minutes)
	$(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(BIN)/python -m mlxsup.imagegen.builtin.evaluate

wheel: $(VENV)/.installed-dev ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

clean: ## remove everything that was made here, the environments too
	rm -rf $(VENV) build dist mutants heart.png .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find mlxsup tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed is stamped, and done again when pyproject.toml has changed.

$(BIN)/python:
	@$(PYTHON) -c '$(MIN_PYTHON)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[imagegen]'
	@touch $@

# Groups of dependencies need pip 25.1, Python 3.11 and 3.12 come with an older one.
$(VENV)/.installed-dev: $(VENV)/.installed-run
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --group dev
	@touch $@

$(VENV)/.installed-mutants: $(VENV)/.installed-dev
	$(PIP) install --quiet --group mutants
	@touch $@

# Pinned and without what they ask for: see the head of the list. The package itself is read where it lies.
build/real-mflux/.installed: tests/real/requirements-mflux.txt
	@$(PYTHON) -c '$(MIN_PYTHON)'
	rm -rf build/real-mflux
	$(PYTHON) -m venv build/real-mflux
	build/real-mflux/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --requirement $<
	build/real-mflux/bin/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/mlxsup.pth", "w").write("$(CURDIR)")'
	@touch $@
