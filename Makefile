# Two commands for a visitor: `make demo`, then `make test`. Everything is installed into .venv, nothing elsewhere.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format train-mini clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install codi and its pinned dependencies into .venv

# The stamp makes a second `make setup` free, and a changed dependency list install again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo 'installing into .venv: a few minutes on a new machine'
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(STAMP)  ## show every task in 1, 2 and 4 steps, train for half a minute, write demo/index.html
	$(BIN)/codi demo --out demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)  ## ruff (rules and layout) and pyright (types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resumes what is in runs/, the VAE first; lowest priority and one thread, so that it only uses idle cores.
train-mini: export OMP_NUM_THREADS := 1
train-mini: export OMP_WAIT_POLICY := passive
train-mini: $(STAMP)  ## go on training the embedded model at 128 px, at lowest priority
	test -f runs/mini-vae/vae/config.json || (mkdir -p runs/mini-vae && cp -r gpu/mini-vae runs/mini-vae/vae)
	nice -n 19 $(BIN)/codi pretrain mini-flux

clean:  ## remove what was made here, but not .venv and not runs/
	rm -rf demo build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
