# make demo: set up and run a whole federation on this machine.  make test: set up and run the tests.
# make docs: the pages as a site.
# make check: format, lint, types, import contracts.  All need Python 3.11+ and nothing else installed.

PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-input

.PHONY: demo test check fix bench docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/hedgerow demo $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

check: $(VENV)/.dev
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./check

fix: $(VENV)/.dev
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ./check --fix

bench: $(VENV)/.dev
	$(VENV)/bin/python bench/main_job.py $(ARGS)

docs: $(VENV)-docs/.ready
	$(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo "the pages are in site/index.html"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Hedgerow needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "python -m venv failed; on Debian and Raspberry Pi OS: apt install python3-venv"; exit 2; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV): about two minutes, once"
	$(PIP) -e '.[demo]' -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV): about two minutes, once"
	$(PIP) -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.demo

# Apart from the other one: what writes pages is nothing that the programs need.
$(VENV)-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt mkdocs-material
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
