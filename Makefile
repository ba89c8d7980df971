# Each target does all of its set-up itself: a virtual environment in the checkout, with the pinned requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup test test-all lint demo
setup: $(READY)

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-all: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python run.py with demo_config
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo_search.py
