# Every command for users and CI. Needs Python 3.11+, git and make; everything else is installed into .venv.
PYTHON ?= python3
PARAMS ?= params.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME ?= $(CURDIR)/.prefect
# DVC runs its stages as `python -m flows...`, which must find the environment's Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# If set, every process compiles the libraries again: imports take 22 s instead of 9 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install run study report repro retrain rollback reproduce test check up schedule backfill ui docs pocket lock \
	wheel clean

install: $(INSTALLED)

# pip installs uv, pinned by hash like everything else. sam2 is built from source against the locked
# torch, without its CUDA extension.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	awk '/^[^ ]/ {keep = /^uv==/} keep' requirements.lock > .venv/uv.lock
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.lock
	SAM2_BUILD_CUDA=0 VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --require-hashes --build-constraint requirements.lock requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --build-constraint requirements.lock --editable .
	touch $@

run: $(INSTALLED)
	@git rev-parse --git-dir > /dev/null 2>&1 || { echo "This folder is no git clone, and DVC needs one: run git init here, or git clone the project."; exit 1; }
	@$(BIN)/python -m flows.pipeline --params $(PARAMS)

repro: $(INSTALLED)
	@$(BIN)/dvc repro

# retrain: new images -> masks -> study -> gate -> registry, once. rollback: return to the previous champion.
retrain: $(INSTALLED)
	@$(BIN)/python -m flows.retrain --params $(PARAMS)

rollback: $(INSTALLED)
	@$(BIN)/python -m flows.rollback --params $(PARAMS) $(if $(DATASET),--dataset $(DATASET))

# Rebuild a cell's MLflow run from its tags (its commit, its data, one fit) and compare every metric exactly.
reproduce: $(INSTALLED)
	@test -n "$(RUN)" || { echo "Which run? make reproduce RUN=..., an id as reports/study.csv has it."; exit 1; }
	@$(BIN)/python -m flows.reproduce --params $(PARAMS) --run $(RUN)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	@$(BIN)/python -m benchmarks.audit

# Run databases, MLflow, Prefect, a worker and the deployments of prefect.yaml until Ctrl-C; docs/operations.md.
# SQLITE=1 replaces PostgreSQL by files; HOST=0.0.0.0 opens MLflow to other machines, with a password.
up: $(INSTALLED)
	@$(BIN)/python -m flows.operations.stack $(if $(SQLITE),--sqlite) $(if $(HOST),--host $(HOST))

# The same as `make up SQLITE=1`.
schedule: $(INSTALLED)
	@$(BIN)/python -m flows.operations.stack --sqlite

# Compute the missing masks of the images in the manifests, once.
backfill: $(INSTALLED)
	@$(BIN)/python -m flows.backfill --params $(PARAMS)

# Show MLflow's and Prefect's pages on loopback.
ui: $(INSTALLED)
	@$(BIN)/python -m flows.operations.ui

# Run every system on the embedded data: hours. `make run` runs a small part of it.
study: $(INSTALLED)
	@$(BIN)/python -m flows.pipeline --params studies/phantoms.yaml

# Write the page of a finished study again: reports/index.html.
report: $(INSTALLED)
	@$(BIN)/python -m flows.release.page --params $(PARAMS)

# Build docs/ into site/. The pages open as files and load nothing from another server.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Train the two small models of medfocus/data again from the seed and compare their figures: over an hour.
# POCKET_DATA=FOLDER adds real images with masks to SAM2's training; docs/methods.md says how they are laid out.
pocket: $(INSTALLED)
	@$(BIN)/python -m medfocus.pocket --out .cache/pocket/out --cache .cache/pocket

# Pin all dependencies after a change of pyproject.toml, for every platform, without a registry's address.
lock:
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock

# Build the sdist, and the wheel from it, into dist/ with the locked hatchling.
wheel: $(INSTALLED)
	$(BIN)/uv build --quiet --no-build-isolation

clean:
	rm -rf data reports .cache mlflow.db mlflow-users.db mlruns .prefect .postgres
