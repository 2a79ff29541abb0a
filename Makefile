# make demo: the whole algorithm on generated scans.
# make test: the fast tests. make test-all: the slow ones, too. make check: lint, format and types.
# make bench: speed and memory, against targets. make docs: the documentation as web pages, in build/docs.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all bench docs check clean

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dwp-pyro needs Python 3.11 or later; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,export]'
	touch $@

demo: $(INSTALLED)
	$(RUN)/dwp-pyro demo

test: $(INSTALLED)
	$(RUN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[federated]'
	$(RUN)/python -m pytest -m 'not study and not gpu' $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(RUN)/python -m benchmarks

docs: $(INSTALLED)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet --site-dir build/docs

check: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
