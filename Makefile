# make demo: the whole path, from pictures to a report, on this machine.   make test: the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CPU_TORCH := torch==2.13.0+cpu
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: setup demo test test-all lint format docs clean
setup: $(READY)

# On a machine without an NVIDIA GPU the CPU build of torch is taken: from the configured index if it has one,
# else from PyTorch's own. With a GPU, torch comes as PyPI gives it.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 \
	  || $(BIN)/pip install -q --disable-pip-version-check "$(CPU_TORCH)" 2>/dev/null \
	  || $(BIN)/pip install -q --disable-pip-version-check "$(CPU_TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/atoll demo runs/demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	HYPOTHESIS_PROFILE=new $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# The documentation site, into site/. Broken links, anchors and docstrings are errors.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
