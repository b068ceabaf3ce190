# Two commands on a fresh machine: `make demo` and `make test`. Both make a virtual environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint fix docs elsewhere lowest sbom clean

$(READY): pyproject.toml
	@echo "Installing into $(VENV): downloads about 5 GB and takes some minutes without a sign of progress."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[cpu,distill,export,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/phreg-deploy demo --output demo-output --force

test: $(READY) lint
	$(BIN)/python -m tests.nvidia_wheels
	$(BIN)/python -m tests.example_downloads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# sdist, wheel, a new environment without torch, and the tests that need none there; with the newest versions.
elsewhere: $(READY)
	$(BIN)/python -m tests.torch_free

# The same with the lowest versions that pyproject.toml allows, on the oldest Python; then, on Python 3.11, the lowest
# torch, timm, onnxscript, open_clip, transformers, zarr and ray, which downloads 3 GB more.
lowest: $(READY)
	$(BIN)/python -m tests.torch_free --lowest --python 3.10
	$(BIN)/python -m tests.lowest_torch --python 3.11

# What is installed, in CycloneDX 1.6.
sbom: $(READY)
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --spec-version 1.6 --output-reproducible \
		--validate --output-file sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) site demo-output build dist sbom.json *.egg-info
