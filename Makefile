# Everything a user or CI does. Needs Python 3.11+, git and make; the rest is installed into .venv.
PYTHON ?= python3
PARAMS ?= params.yaml
BIN := .venv/bin
INSTALLED := .venv/.installed
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME ?= $(CURDIR)/.prefect
# The stages are `python -m flows...`: that has to be the environment's Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# With it in the environment every process would compile the libraries anew: 22 s of imports and not 9.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install run study report repro retrain rollback reproduce test check up schedule backfill ui docs pocket lock \
	wheel clean

install: $(INSTALLED)

# uv itself comes through pip, pinned by hash like everything else. sam2 is built from source, without
# its CUDA extension, against the locked torch.
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

# New images -> masks -> study -> gate -> registry, once, now; and the champion back to the one before.
retrain: $(INSTALLED)
	@$(BIN)/python -m flows.retrain --params $(PARAMS)

rollback: $(INSTALLED)
	@$(BIN)/python -m flows.rollback --params $(PARAMS) $(if $(DATASET),--dataset $(DATASET))

# A cell's MLflow run, rebuilt from its tags: its commit, its data, one fit; every metric compared exactly.
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

# Databases, MLflow, Prefect, a worker and the deployments of prefect.yaml, until Ctrl-C; docs/operations.md.
# SQLITE=1 does without PostgreSQL, HOST=0.0.0.0 shows MLflow to others, by password.
up: $(INSTALLED)
	@$(BIN)/python -m flows.operations.stack $(if $(SQLITE),--sqlite) $(if $(HOST),--host $(HOST))

# The same on SQLite files alone.
schedule: $(INSTALLED)
	@$(BIN)/python -m flows.operations.stack --sqlite

# The masks that the manifests' images lack, once, now.
backfill: $(INSTALLED)
	@$(BIN)/python -m flows.backfill --params $(PARAMS)

# MLflow's and Prefect's pages on loopback.
ui: $(INSTALLED)
	@$(BIN)/python -m flows.operations.ui

# Every system on the embedded data: hours; `make run` is its small part.
study: $(INSTALLED)
	@$(BIN)/python -m flows.pipeline --params studies/phantoms.yaml

# The page of a study that was run, anew: reports/index.html.
report: $(INSTALLED)
	@$(BIN)/python -m flows.release.page --params $(PARAMS)

# The pages of docs/ as a site in site/, to be opened as files: it loads nothing from elsewhere.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Train the two small models of medfocus/data again, from the seed, and compare their figures: a good hour.
pocket: $(INSTALLED)
	@$(BIN)/python -m medfocus.pocket --out .cache/pocket/out --cache .cache/pocket

# After a change of pyproject.toml: pin everything anew, for every platform, without a registry's address.
lock:
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock

# dist/: the sdist, and the wheel that is built from it, by the locked hatchling.
wheel: $(INSTALLED)
	$(BIN)/uv build --quiet --no-build-isolation

clean:
	rm -rf data reports .cache mlflow.db mlflow-users.db mlruns .prefect .postgres
