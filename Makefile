# Everything a newcomer needs: `make demo`, `make test`. Each sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

.PHONY: setup demo test soak lint types contracts check clean

$(VENV)/.demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "GMC-O needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "a C++ compiler is needed (hnswlib is a source package); on Debian: apt install gcc g++ python3-dev python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing GMC-O (the first time takes a minute: hnswlib is compiled)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	@$(BIN)/gmco demo $(ARGS)

# Two at a time: the tests with real processes mostly wait. A file's tests stay together, for they share their daemons.
test: setup
	@$(BIN)/python -m pytest -m 'not soak' -n $(WORKERS) --dist loadfile --durations=15 $(ARGS)

# A soak test takes longer than the limit at which any other test counts as hung.
soak: setup
	@$(BIN)/python -m pytest -m soak -o timeout=3600 -o faulthandler_timeout=3700 $(ARGS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

contracts: setup
	@$(BIN)/lint-imports

check: lint types contracts

clean:
	rm -rf $(VENV) .demo build *.egg-info
