# Every target needs only Python 3.10 or newer, and installs everything else in .venv
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test faults lint set-up clean

demo: $(READY)
	$(BIN)/python tools/demo.py

# Two processes of one thread each, because the tests are many and small
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Training runs with N random faults, randomly damaged files, and kills of every command
N ?= 200
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py $(N)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two commands that are started at once set up .venv once: the second one waits
$(READY): setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make needs Python 3.10 or newer: run PYTHON=python3.x make ...")'
	@$(if $(shell command -v flock),flock Makefile) $(MAKE) --no-print-directory set-up

# .ready is written last, so that an interrupted set-up is repeated
set-up:
	@if [ $(READY) -nt setup.py ] && [ $(READY) -nt tools/install_detectron2.py ]; then exit 0; fi; set -ex; \
	echo "Setting up .venv: PyTorch, Detectron2, gn_det (a minute or two)"; \
	$(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 setuptools wheel; \
	$(BIN)/python tools/install_detectron2.py; \
	$(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
