"""Figure 1 of the paper as a flow: ingest, split, mask, fine-tune, evaluate, register the best.

Prefect orders and retries the tasks and shows them on its pages. DVC finds the outdated stages and versions
their outputs. MLflow keeps the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from flows.operations.failures import faults_in_one_line
from flows.operations.locks import only_job
from flows.operations.retries import PATIENT
from flows.servers.prefect import prefect_api
from flows.servers.processes import must_answer
from flows.stages.dvc import reproduce
from flows.study.study import Study, open_study
from medfocus.images.png import data_url
from medfocus.reports import tables
from medfocus.reports.rows import read_rows
from medfocus.storage.redaction import redacted
from medfocus.storage.tables import read_csv
from medfocus.tracking.provenance import lock_digest

if TYPE_CHECKING:
    from medfocus.tracking.registry import Registration


@task(task_run_name="plan {study.params.study.name}", cache_policy=NO_CACHE)
@redacted
def check_plan(study: Study) -> None:
    """Build every method once, find the weights and contact MLflow's server, so that faults show at once."""
    from flows.study.cells import plan
    from flows.study.methods import schedule_warning
    from flows.study.models import check_weights

    plan(study.params)
    check_weights(study)
    if warning := schedule_warning(study.params):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if (store := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
        must_answer(store, "MLFLOW_TRACKING_URI", "the run then writes to mlflow.db")


@task(task_run_name="phantoms {modality}", **PATIENT)
@redacted
def draw_phantoms(study: Study, modality: str) -> None:
    """Draw an embedded data set of phantoms."""
    _reproduce(study, f"phantoms@{modality}")


@task(task_run_name="ingest {dataset}", **PATIENT)
@redacted
def ingest(study: Study, dataset: str) -> None:
    """Write the manifest of a raw folder and a report of the files that are left out."""
    if _reproduce(study, f"ingest@{dataset}"):
        path = study.paths.report(dataset, "left_out.csv")
        rows = [{"line": line, "fix": row["fix"]} for line, row in enumerate(read_csv(path), start=2)]
        description = f"Files left out at ingestion, by line of {path.relative_to(study.folder)}"
        create_table_artifact(rows, key=_key(f"left-out-{dataset}"), description=description)


@task(task_run_name="duplicates {dataset}", **PATIENT)
@redacted
def find_duplicates(study: Study, dataset: str) -> None:
    """Find the pairs of equal or nearly equal images in a manifest."""
    _reproduce(study, f"duplicates@{dataset}")


@task(task_run_name="splits {dataset}", **PATIENT)
@redacted
def draw_splits(study: Study, dataset: str) -> None:
    """Draw the test sets and the nested supports."""
    _reproduce(study, f"splits@{dataset}")


@task(task_run_name="masks {dataset}", **PATIENT)
@redacted
def cache_masks(study: Study, dataset: str) -> None:
    """Segment every image of the manifest and draw a contact sheet."""
    if _reproduce(study, f"masks@{dataset}"):
        create_table_artifact(
            read_csv(study.paths.report(dataset, "masks.csv")),
            key=_key(f"masks-{dataset}"),
            description="Coverage, score and fallbacks of the masks of each class",
        )
        create_image_artifact(
            data_url(study.paths.report(dataset, "masks.png").read_bytes()),
            key=_key(f"mask-sheet-{dataset}"),
            description="Masks, segmented without labels",
        )


@task(task_run_name="fine-tune {study.params.study.name}", **PATIENT)
@redacted
def finetune(study: Study) -> None:
    """Fit every cell of the study on its support."""
    _reproduce(study, "finetune")


@task(task_run_name="evaluate {study.params.study.name}", **PATIENT)
@redacted
def evaluate(study: Study) -> None:
    """Score the checkpoints on the test sets; write MLflow runs, figures and the page."""
    ran = _reproduce(study, "evaluate")
    if not _shows_results(study):
        from flows.stages.evaluate import restore_study_csv

        restore_study_csv(study)
    if not _page_is_current(study):
        from flows.release.page import write_page

        write_page(study)
    if ran:
        rows = read_rows(study.paths.study)
        create_markdown_artifact(
            tables.markdown_table(rows),
            key="study-table",
            description=f"Accuracy on the test sets, {study.params.study.schedule} schedule",
        )


@task(task_run_name="register {dataset}", **PATIENT)
@redacted
def register_best(study: Study, dataset: str) -> Registration:
    """Register the best cell by validation; the gate decides whether it becomes champion."""
    from flows.release import register

    outcome = register.register_best(study, dataset)
    create_markdown_artifact(outcome.text, key=_key(f"gate-{dataset}"), description="The gate's decision")
    return outcome.registration


@flow(name="medfocus", flow_run_name="{params_file}", validate_parameters=False)
@redacted
def pipeline(params_file: Path = Path("params.yaml")) -> list[Registration]:
    """Ingest, split, mask, fine-tune on few shots, evaluate, register the best."""
    return steps(open_study(Path(params_file)))


def steps(study: Study) -> list[Registration]:
    """Run the pipeline's tasks in order, inside a flow."""
    with only_job(study):
        check_plan(study)
        for modality in study.params.phantoms:
            draw_phantoms(study, modality)
        for dataset in study.params.datasets:
            ingest(study, dataset)
            find_duplicates(study, dataset)
            draw_splits(study, dataset)
            cache_masks(study, dataset)
        finetune(study)
        evaluate(study)
        return [register_best(study, dataset) for dataset in study.params.datasets]


def _reproduce(study: Study, stage: str) -> bool:
    """Bring a stage up to date; print and return whether the stage ran."""
    ran = reproduce(study.folder, stage)
    done = 100 * (study.stages.index(stage) + 1) / len(study.stages)
    create_progress_artifact(done, key=_key(f"progress-{study.params.study.name}"), description=stage)
    print(f"{stage}: {'done' if ran else 'unchanged'}", file=sys.stderr, flush=True)
    return ran


def _shows_results(study: Study) -> bool:
    """Return whether study.csv and results.csv have the same rows, except for their last columns."""

    def rows(path: Path) -> list[str]:
        return [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]

    path = study.paths.study
    return path.exists() and rows(path) == rows(study.paths.results)


def _page_is_current(study: Study) -> bool:
    """Return whether the page exists and shows dvc.lock's digest; a killed run leaves an older page."""
    page = study.paths.page
    return page.exists() and lock_digest(study.folder) in page.read_text(encoding="utf-8")


def _key(name: str) -> str:
    """Return a name as an artifact key: Prefect allows lower case, digits and hyphens."""
    return name.lower().replace("_", "-")


def print_registrations(registrations: Sequence[Registration]) -> None:
    """Print each model with its version, its alias and the gate's reason."""
    for each in registrations:
        alias = f"@{each.alias}" if each.alias else "without alias"
        print(f"model {each.name} version {each.version} {alias}: {each.reason}")


def run_job(
    job: Callable[[Path], list[Registration]], description: str | None, arguments: Sequence[str] | None
) -> tuple[Study, list[Registration]]:
    """Run a flow on the params file that the arguments name; return its study and the registered models."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    params_file = parser.parse_args(arguments).params
    with faults_in_one_line():
        study = open_study(params_file)  # reports a fault in the params file before a server starts
        with only_job(study), prefect_api():
            return study, job(params_file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the flow on a params file; print the scores and the registered models."""
    study, registrations = run_job(pipeline, __doc__, arguments)
    print()
    print(tables.study_table(read_rows(study.paths.study)))
    print(f"schedule of the methods: {study.params.study.schedule}")
    print_registrations(registrations)
    print(f"\nFull report: {study.paths.page}\nCompare the runs in MLflow: make ui")


if __name__ == "__main__":
    main()
