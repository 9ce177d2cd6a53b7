# Two commands on a fresh machine: make quickstart, make test.
PYTHON ?= python3
BIN := .venv/bin
# Processes of the tests, one thread each; make test WORKERS=0 runs them in turn, in one.
WORKERS ?= 2
READY := .venv/.ready

.PHONY: quickstart test slow lint docs clean

quickstart: $(READY)
	$(BIN)/fedpeft run simulations/quickstart.yaml --resume

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n $(WORKERS) --dist loadgroup
	$(BIN)/python -m pytest -m alone

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d site

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv
