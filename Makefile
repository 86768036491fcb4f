# `make run` and `make test` do all the set-up themselves. ARGS goes to them: make run ARGS="--for 20", make test ARGS=tests.link
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make run` needs is installed first; the benchmark, the linters and the tests need several times as much.
RUN := $(VENV)/.run
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
LOCK := $(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --no-annotate setup.cfg
ARGS ?=

# A container may forbid compiled modules, without which each start of a process takes half a second longer.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test campaigns check faults bench bench-growth docs lock clean

run: $(RUN)
	@$(BIN)/s2s up $(ARGS)

test: $(READY)
	$(BIN)/python -m tests $(ARGS)

# Long tests: faults, floods, the HTTP API under generated requests, the benchmark. They are measured, so two at a time.
campaigns: $(READY)
	$(BIN)/python -m tests --jobs 2 campaigns

check: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A long campaign of faults: make faults ARGS="--seconds 600 --seed 7"
faults: $(READY)
	$(BIN)/python -m campaigns.faults $(ARGS)

# The benchmark, side by side with what else there is: make bench ARGS="--rounds 9"
bench: $(READY)
	PATH="$(BIN):$$PATH" $(BIN)/python -m benchmarks $(ARGS)

# The same rates with millions of rows: takes long, and some gigabytes
bench-growth: $(READY)
	$(BIN)/python -m benchmarks.growth $(ARGS)

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

# What make installs is pinned with its hashes: update the pins after a change of the bounds in setup.cfg.
lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet uv
	$(LOCK) --extra dev --output-file requirements-dev.lock
	$(LOCK) --extra checkout --constraint requirements-dev.lock --output-file requirements.lock

$(RUN): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("s2s needs Python 3.10 or newer; name one: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $(RUN)

$(READY): $(RUN) requirements-dev.lock
	$(PIP) --require-hashes -r requirements-dev.lock
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist docs/_build _trial_temp* .hypothesis .mypy_cache .ruff_cache *.egg-info
