# The first target that needs it makes .venv and installs greenroom with the pinned versions in
# constraints.txt; after that a call is quick until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
ARGS   ?=

VENV       := .venv
PY         := $(VENV)/bin/python
INSTALLED  := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished

# Python that exits with an error where the answer is no.
is_new_enough := import sys; sys.exit(sys.version_info < (3, 10))
can_make_venv := import ensurepip, venv
has_pip       := import importlib.metadata as m, sys; sys.exit(not m.distribution("pip").files)
# Is every file there that the installed packages list? A package that was being unpacked when the
# power went can look installed to pip. RECORD is read by hand, since `files` hides what is missing.
is_whole      := import csv, importlib.metadata as m, os, sys; sys.exit(not all( \
  os.path.exists(d.locate_file(row[0])) for d in m.distributions() \
  for row in csv.reader((d.read_text("RECORD") or "there-is-no-record").splitlines()) \
  if not row[0].endswith(".pyc")))

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format docs clean compiler

help: ## list these targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
	  while IFS='|' read -r target text; do printf '  %-9s %s\n' "$$target" "$$text"; done

demo: compiler $(INSTALLED) ## show greenroom at work, without a GPU
	@$(PY) -m greenroom demo $(ARGS)

# One process for each core, of one thread each: the models in the tests are so small that OpenMP's
# waiting threads cost far more time than they save.
test: compiler $(INSTALLED) ## run the whole test suite; ARGS="-k name" picks
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: compiler $(INSTALLED) ## run the tests that need a CUDA device
	OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu $(ARGS)

lint: $(INSTALLED) ## ruff, its formatter in check mode, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED) ## repair what ruff can repair
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The build needs no network, and fails if a page would.
docs: $(INSTALLED) ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict $(ARGS)
	@echo "wrote site/index.html; its search needs a server: python3 -m http.server -d site"

clean: ## remove builds and caches; .venv stays
	rm -rf build dist site htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

compiler:
	@command -v $(firstword $(CXX)) >/dev/null || { echo >&2 \
	  "greenroom compiles its simulated accelerator and needs a C++ compiler: install g++\
	 (Debian, Ubuntu: apt install g++), or name another one: make CXX=clang++"; exit 1; }

# Every step looks at what is there, because the last run may have been interrupted anywhere.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PY) -c '$(is_new_enough)' 2>/dev/null || \
	    { test -e $(UNFINISHED) && ! $(PY) -c '$(is_whole)' 2>/dev/null; }; then \
	  $(PYTHON) -c '$(is_new_enough)' 2>/dev/null || { echo >&2 \
	    "greenroom needs Python 3.10 or newer, and '$(PYTHON)' is none: install one\
	 (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=python3.12"; \
	    exit 1; }; \
	  $(PYTHON) -c '$(can_make_venv)' 2>/dev/null || { echo >&2 \
	    "'$(PYTHON)' cannot make virtual environments: install its venv module\
	 (Debian, Ubuntu: apt install python3-venv)"; exit 1; }; \
	  echo "making $(VENV)"; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV); \
	fi
	@touch $(UNFINISHED)
	@$(PY) -c '$(has_pip)' 2>/dev/null || $(PY) -m ensurepip --default-pip
	@echo "installing greenroom and what it is tested with into $(VENV); PyTorch is large"
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_USER=0 \
	  $(PY) -m pip --disable-pip-version-check install -e '.[all,dev]'
	@mv $(UNFINISHED) $@
