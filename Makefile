# Wraps the plain commands of the README in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test docs
quickstart: $(VENV)/.installed
	$(VENV)/bin/python tools/train_net.py --config-file configs/quickstart/digit_scenes_det.py

test: $(VENV)/.installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -e ".[docs]"
	touch $@

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --upgrade pip
	$(VENV)/bin/python -m pip install -e ".[test]"
	touch $@
