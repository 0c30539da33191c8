# Two commands set everything up on a fresh machine: make quickstart, make test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
RANKS ?= 4
SCRIPTS := .ci/run $(wildcard hpc/*.sh hpc/*.pbs containers/*.sh)

# One thread a rank: ranks share the cores.
export OMP_NUM_THREADS := 1

.PHONY: help quickstart era5 test test-cluster test-all lint reference docs sbom sif image clean

help:
	@echo "make quickstart   set up, train the demo on 4 ranks, forecast, score (minutes on 2 cores)"
	@echo "make era5         the same on the real ERA5 sample, on 2 ranks"
	@echo "make test         set up, lint, run all tests that need no system package"
	@echo "make test-cluster run those of a real Slurm, MPI, Apptainer and OCI images (root, on Debian)"
	@echo "make test-all     both, every mesh for every model, and compiled code (half an hour more)"
	@echo "make lint         ruff, mypy, the order of imports, shellcheck"
	@echo "make docs         build the pages into build/site, all links checked"
	@echo "make reference    write docs/config.md and the schema of configs from the classes"
	@echo "make sbom         what is in an image, as CycloneDX JSON in build/"
	@echo "make sif          build credit.sif with apptainer (containers/build.sh --help: other bases)"
	@echo "make image        build the image credit:latest with docker, podman or buildah"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m credit train $(CONFIG)
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m credit forecast $(CONFIG)
	$(BIN)/credit score $(CONFIG)

era5: CONFIG = configs/era5_sample.yaml
era5: RANKS = 2
era5: quickstart

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

test-cluster: $(VENV)/.installed
	$(BIN)/pytest -m 'not slow and cluster' tests/launch tests/containers

test-all: lint
	$(BIN)/pytest -n 2 --dist loadfile -m 'not cluster'
	$(BIN)/pytest -m cluster tests/launch tests/containers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy credit
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck $(SCRIPTS)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(VENV)/.installed
	$(BIN)/python -m credit.config.reference

sbom: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt 'cyclonedx-bom>=7'
	containers/sbom.sh $(BIN)/python

sif:
	containers/build.sh sif

image:
	containers/build.sh oci

clean:
	rm -rf $(VENV) runs build *.egg-info
