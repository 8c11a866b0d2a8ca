# Short forms of the commands in the README, in a virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest --numprocesses auto --dist loadfile

.PHONY: quickstart test test-all docs

# train on the embedded data set: only the package itself is installed
quickstart: $(VENV)/.installed
	$(RUN) tools/train_net.py --config-file configs/quickstart/digit_scenes_det.py

# ruff and the unit tier
test: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(PYTEST)

# the slow tier too; `pytest -m soak` is left to a person
test-all: test
	$(PYTEST) -m "slow and not soak"

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(RUN) -m pip install -e ".[$*]"
	touch $@
