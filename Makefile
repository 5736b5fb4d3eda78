# make demo   solve a real problem, from photographs to a certified map (half a minute on 2 cores after set-up)
# make test   every test
# make lint   ruff, mypy --strict, import-linter
# make bench  measure; reports go to bench/reports/
#
# The first call sets up a virtual environment in .venv; python3 >= 3.11 is all it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python -m jobs.demo demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,bench]'
	$(BIN)/python -m bench.assign
	$(BIN)/python -m bench.efficiency

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "distot needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
