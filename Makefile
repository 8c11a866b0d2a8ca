# Short forms of the commands in the README, in a virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTEST = -m pytest --numprocesses auto --dist loadfile
# what ruff checks: not the files of a user in the checkout
SOURCES = benchmarks bissl_zoo configs docs examples setup.py tests tools
CORE = tests/hypergradient tests/bilevel tests/pretext tests/backbones tests/weights
SITE = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.PHONY: quickstart test test-all test-floors test-old-torch docs

# train on the embedded data set
quickstart: $(VENV)/.installed
	$(VENV)/bin/bissl train --config-file quickstart/digit_scenes_det.py

# ruff and the unit tier
test: $(VENV)/.installed-test
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) $(PYTEST)

# the slow tier too; `pytest -m soak` is left to a person
test-all: test
	$(RUN) $(PYTEST) -m "slow and not soak"

# the core tests with the oldest releases of all libraries but PyTorch and those that only tests use
test-floors: $(VENV)/.installed-test
	$(PYTHON) -m venv $(VENV)-floors
	$(RUN) $(SITE) > `$(VENV)-floors/bin/python $(SITE)`/newest.pth
	grep -v ^torch requirements/floors.txt > $(VENV)-floors/floors.txt
	$(VENV)-floors/bin/python -m pip install --quiet --no-deps -r $(VENV)-floors/floors.txt
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=. $(VENV)-floors/bin/python $(PYTEST) -p xdist.plugin $(CORE)

# the core tests with the oldest PyTorch, too: a download of 3 GB
test-old-torch:
	$(PYTHON) -m venv $(VENV)-old-torch
	$(VENV)-old-torch/bin/python -m pip install --quiet -r requirements/floors.txt pytest pytest-xdist hypothesis lightly onnxscript
	PYTHONPATH=. $(VENV)-old-torch/bin/python $(PYTEST) $(CORE)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(VENV)/.installed: setup.py
	@echo "Installing bissl_zoo and its libraries in $(VENV): with PyTorch, some minutes and gigabytes"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[train,report]"
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(RUN) -m pip install --quiet -e ".[$*]"
	touch $@
