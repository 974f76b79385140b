# `make demo` and `make test` do all that they need; `make install` stops where one goes on by hand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# setuptools warns at length of packages whose folders are not nested like their names.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check

# Fast Downward's build calls `python`, which Debian does not have.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# ALFWorld's stock engine: its handcoded expert, and what the tests compare ours with. Its own requirements bring
# spaCy, 230 MB that nothing imports, so they are left out and the rest named here. Two packages compile, for 75 s,
# once: pip keeps their wheels.
ALFWORLD := alfworld textworld jericho fast-downward-textworld
ALFWORLD_NEEDS := hashids mementos more-itertools networkx prompt_toolkit tatsu termcolor tqdm

.PHONY: install test test-fast test-vllm demo lint clean distclean

install: $(VENV)/.installed $(VENV)/.alfworld

# What the demo needs: the package, and the grader of what is no plain number. Without compiling all of it to
# bytecode, half of the time: Python does that to what it imports.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@echo "installing what the demo needs, 1.2 GB, into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt pip
	$(PIP) install -q --no-compile -c constraints.txt -e . math-verify antlr4-python3-runtime
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	@echo "installing what tests, lint and studies need"
	$(PIP) install -q --no-compile -c constraints.txt -e '.[math,plots,dev]'
	@touch $@

# Where it cannot be had nothing else stops: the tests that need it skip, unless TUTELAGE_REQUIRE_ALFWORLD is set.
$(VENV)/.alfworld: $(VENV)/.installed
	@echo "installing ALFWorld's stock engine, which compiles for a minute or two"
	@($(PIP) install -q --no-compile -c constraints.txt $(ALFWORLD_NEEDS) && \
	  $(PIP) install -q --no-compile -c constraints.txt --no-deps $(ALFWORLD)) || \
	  { echo "ALFWorld's stock engine could not be installed: the tests that compare with it will be skipped (again: rm $@)"; \
	    test -z "$$TUTELAGE_REQUIRE_ALFWORLD"; }
	@touch $@

# Two processes at once, for two cores; who runs dry takes tests from the other. ARGS="-n 0" for one, and a debugger.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: install
	$(PYTEST) $(ARGS)

# What can be known within a minute or so: all but whole runs, servers, Ray, and what is slow alone.
test-fast: install
	$(PYTEST) -m "not runs and not slow" $(ARGS)

# vLLM has an environment of its own: it takes 3 GB, and pins what the rest need not wait for.
$(VLLM)/.installed: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	PYTHONWARNINGS=ignore $(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r constraints-vllm.txt
	PYTHONWARNINGS=ignore $(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

demo: $(VENV)/.demo
	$(BIN)/tutelage demo $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tutelage.envs -p tutelage.scheduler -p tutelage.evaluation -p tutelage.distill
	$(BIN)/mypy examples/guess_number/guess_number.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VLLM)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VLLM)
