# Every target that runs Python makes .venv first where it is missing or out of date: any works in a fresh clone.
PYTHON ?= python3
# How many tests run at a time, each on one thread.
WORKERS ?= 2
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup data smoke reproduce status figures publish readme bench agreement bundle merge
.PHONY: test test-slow test-bundle test-slurm test-scale lint clean lock

help:  # lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup:  ## make .venv from requirements.lock (PYTHON=python3.12 chooses the interpreter: 3.11 or 3.12)
	@sh scripts/setup.sh "$(PYTHON)" "$(MAKECMDGOALS)"

data: setup  ## fetch and verify every data set that this machine can reach
	@$(PY) scripts/fetch_data.py

smoke: setup  ## train, attack and report a tiny study on digits
	@$(PY) scripts/train.py experiment=smoke
	@$(PY) scripts/evaluate.py experiment=smoke

reproduce: setup  ## the whole study: laptop without a GPU, mnist and cifar10 with one (EXPERIMENT=smoke chooses)
	@$(PY) scripts/reproduce.py $(if $(EXPERIMENT),--experiment "$(EXPERIMENT)")

status: setup  ## show the state of a study at any time (STUDY=NAME, and EXPERIMENT= SUITE= where they differ)
	@$(PY) scripts/status.py "$(STUDY)" $(if $(EXPERIMENT),--experiment "$(EXPERIMENT)") $(if $(SUITE),--suite "$(SUITE)")

figures: setup  ## redraw figures and reports of a study from its tables (STUDY=NAME; the reference studies by default)
	@$(PY) scripts/figures.py $(if $(STUDY),"$(STUDY)")

publish: setup  ## put a finished study into results/reference, and its tables into README.md (STUDY=NAME)
	@$(PY) scripts/publish.py "$(STUDY)"

readme: setup  ## write the tables of the reference study into README.md
	@$(PY) scripts/readme.py

bench: setup  ## measure speed and memory beside other libraries; results/bench (ONLY=loss makes one section)
	@$(PY) scripts/bench.py $(if $(ONLY),--only "$(ONLY)")

agreement: setup  ## compare library attacks with second implementations (results/reference/agreement.md; over an hour)
	@$(PY) scripts/agreement.py --published

bundle:  ## pack all that a node without a network needs into dist/ (PYTHON=3.12 PLATFORM= DATA= EXCLUDE=)
	@sh scripts/setup.sh "$(if $(findstring python,$(PYTHON)),$(PYTHON),python3)"
	@$(PY) scripts/bundle.py $(if $(filter-out python3,$(PYTHON)),--python "$(PYTHON)") \
		$(if $(PLATFORM),--platform "$(PLATFORM)") $(if $(DATA),--data "$(DATA)") $(if $(EXCLUDE),--exclude "$(EXCLUDE)")

merge: setup  ## merge a node's results into results/ (ARCHIVE=results-STUDY-HOST.tar.gz)
	@$(PY) scripts/merge.py $(ARCHIVE)

test: lint  ## lint, then run the tests (WORKERS=4 runs four at a time)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS)

test-slow: setup  ## the long forms of some tests, 50 kills of a sweep among them (long)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m slow
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -s tests/test_kills.py --kills 50

test-bundle: setup  ## run a bundle in a fresh environment that has torch alone and no network (minutes)
	DRS_TEST_BUNDLE=1 $(PY) -m pytest -q tests/test_node.py

test-slurm: setup  ## run a sweep on a real Slurm cluster of one node; installs Debian's slurm-wlm (as root; minutes)
	@$(PY) tests/slurm_sweep.py

test-scale: setup  ## time a made-up study of 2000 runs: skip it, show it, rebuild its tables (needs 3 GB; FOLDER=)
	@$(PY) tests/scale.py "$(or $(FOLDER),build/scale)"

lint: setup  ## check style, format and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean:  ## remove .venv, caches and builds; data/ and results/ stay
	rm -rf .venv .venv-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock:  ## write requirements.lock and environment.yml anew from pyproject.toml
	@sh scripts/lock.sh "$(PYTHON)"
