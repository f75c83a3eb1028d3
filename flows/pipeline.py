"""Figure 1 of the paper as a flow: ingest, split, mask, fine-tune, evaluate, register the best.

Prefect gives order, retries and a page to look at; DVC decides what is stale and versions what a
stage makes; MLflow keeps the numbers.
"""

from __future__ import annotations

import argparse
import base64
import csv
import os
import sys
from collections.abc import Sequence
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

from flows.operations.jobs import faults_in_one_line, only_job
from flows.operations.retries import PATIENT
from flows.servers.servers import must_answer, prefect_api
from flows.stages.dvc import reproduce
from flows.study.study import Study, open_study
from medfocus.reports import tables
from medfocus.storage.redaction import redacted
from medfocus.tracking.provenance import lock_digest

if TYPE_CHECKING:
    from medfocus.tracking.registry import Registration


@task(task_run_name="plan {study.params.study.name}", cache_policy=NO_CACHE)
@redacted
def check_plan(study: Study) -> None:
    """Build every method of the study once: a typo fails here, before any work; so does a missing server."""
    from flows.study.cells import plan

    plan(study.params)
    if (store := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
        must_answer(store, "MLFLOW_TRACKING_URI", "the runs are then kept in mlflow.db")


@task(task_run_name="phantoms {modality}", **PATIENT)
@redacted
def draw_phantoms(study: Study, modality: str) -> None:
    """Draw an embedded data set."""
    _reproduce(study, f"phantoms@{modality}")


@task(task_run_name="ingest {dataset}", **PATIENT)
@redacted
def ingest(study: Study, dataset: str) -> None:
    """Raw folder -> manifest, and a report of what is left out."""
    if _reproduce(study, f"ingest@{dataset}"):
        path = study.paths.report(dataset, "left_out.csv")
        rows = [{"line": line, "fix": row["fix"]} for line, row in enumerate(_rows(path), start=2)]
        described = f"Left out at ingestion; the lines are those of {path.relative_to(study.folder)}"
        create_table_artifact(rows, key=_key(f"left-out-{dataset}"), description=described)


@task(task_run_name="duplicates {dataset}", **PATIENT)
@redacted
def find_duplicates(study: Study, dataset: str) -> None:
    """Manifest -> pairs of twins."""
    _reproduce(study, f"duplicates@{dataset}")


@task(task_run_name="splits {dataset}", **PATIENT)
@redacted
def draw_splits(study: Study, dataset: str) -> None:
    """Manifest and twins -> test sets and nested supports."""
    _reproduce(study, f"splits@{dataset}")


@task(task_run_name="masks {dataset}", **PATIENT)
@redacted
def cache_masks(study: Study, dataset: str) -> None:
    """Manifest -> one mask per image, with a contact sheet to look at."""
    if _reproduce(study, f"masks@{dataset}"):
        create_table_artifact(
            _rows(study.paths.report(dataset, "masks.csv")),
            key=_key(f"masks-{dataset}"),
            description="Coverage, score and fallbacks of the masks, a line a class",
        )
        sheet = base64.b64encode(study.paths.report(dataset, "masks.png").read_bytes()).decode()
        create_image_artifact(
            f"data:image/png;base64,{sheet}",
            key=_key(f"mask-sheet-{dataset}"),
            description="Masks found without labels",
        )


@task(task_run_name="fine-tune {study.params.study.name}", **PATIENT)
@redacted
def finetune(study: Study) -> None:
    """Every cell of the study -> a checkpoint, from its support alone."""
    _reproduce(study, "finetune")


@task(task_run_name="evaluate {study.params.study.name}", **PATIENT)
@redacted
def evaluate(study: Study) -> None:
    """Checkpoints -> test scores, MLflow runs, figures."""
    ran = _reproduce(study, "evaluate")
    if not _shows_results(study):
        from flows.stages.evaluate import restore_study_csv  # takes seconds, as do the next ones

        restore_study_csv(study)
    if not _page_is_current(study):
        from flows.release.page import write_page

        write_page(study)
    if ran:
        rows = tables.read_study_csv(study.paths.study)
        create_markdown_artifact(
            tables.markdown_table(rows), key="study-table", description="Accuracy on the test sets"
        )


@task(task_run_name="register {dataset}", **PATIENT)
@redacted
def register_best(study: Study, dataset: str) -> Registration:
    """The best cell by validation -> the model registry; champion only through the gate."""
    from flows.release import register

    outcome = register.register_best(study, dataset)
    told = register.told(outcome)
    create_markdown_artifact(told, key=_key(f"gate-{dataset}"), description="Why it is champion, or why not")
    return outcome.registration


@flow(name="medfocus", flow_run_name="{params_file}", validate_parameters=False)
@redacted
def pipeline(params_file: Path = Path("params.yaml")) -> list[Registration]:
    """Ingest, split, mask, fine-tune on few shots, evaluate, register the best."""
    return steps(open_study(Path(params_file)))


def steps(study: Study) -> list[Registration]:
    """The tasks of the flow, in their order; inside of a flow."""
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
    """Bring a stage up to date, saying on the terminal what became of it; whether it ran."""
    ran = reproduce(study.folder, stage)
    done = 100 * (study.stages.index(stage) + 1) / len(study.stages)
    create_progress_artifact(done, key=_key(f"progress-{study.params.study.name}"), description=stage)
    print(f"{stage}: {'done' if ran else 'unchanged'}", file=sys.stderr, flush=True)
    return ran


def _shows_results(study: Study) -> bool:
    """Whether study.csv has the rows of the results; its last column, the runs' ids, is this machine's."""

    def rows(path: Path) -> list[str]:
        return [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]

    shown = study.paths.study
    return shown.exists() and rows(shown) == rows(study.paths.results)


def _page_is_current(study: Study) -> bool:
    """Whether the page is there and of what dvc.lock names: a run may be killed before it writes one."""
    page = study.paths.page
    return page.exists() and lock_digest(study.folder) in page.read_text(encoding="utf-8")


def _key(name: str) -> str:
    """An artifact key for a study's or a data set's name; Prefect takes lower case, digits and hyphens."""
    return name.lower().replace("_", "-")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the flow on a params file and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    params_file = parser.parse_args(arguments).params
    with faults_in_one_line():
        study = open_study(params_file)  # a fault in the params file is said before a server starts
        with only_job(study), prefect_api():
            registrations = pipeline(params_file)
    print()
    print(tables.study_table(tables.read_study_csv(study.paths.study)))
    for registration in registrations:
        alias = f"@{registration.alias}" if registration.alias else "without alias"
        print(f"model {registration.name} version {registration.version} {alias}: {registration.reason}")
    print(f"\nFull report: {study.paths.page}\nCompare the runs in MLflow: make ui")


if __name__ == "__main__":
    main()
