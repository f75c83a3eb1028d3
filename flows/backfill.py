"""Mask back-fill: compute the missing masks of the manifests' images, with the present settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from flows.operations.failures import faults_in_one_line
from flows.operations.locks import only_retraining
from flows.operations.notify import report_failure
from flows.pipeline import cache_masks
from flows.servers.prefect import prefect_api
from flows.study.study import open_study
from medfocus.storage.redaction import redacted


@flow(
    name="backfill",
    flow_run_name="{params_file}",
    validate_parameters=False,
    timeout_seconds=7 * 24 * 3600,  # an archive takes days
    on_failure=[report_failure],
    on_crashed=[report_failure],
)
@redacted
def backfill(params_file: Path = Path("params.yaml"), datasets: Sequence[str] | None = None) -> None:
    """Segment the images of ``datasets``, or of all data sets, without ingestion or training.

    Raises:
        ValueError: The study has no such data set, or the data set was never ingested.
        JobRunningError: A retraining or another back-fill runs in this checkout.
    """
    study = open_study(Path(params_file))
    names = list(study.params.datasets) if datasets is None else list(datasets)
    with only_retraining(study.home):
        for name in names:
            if name not in study.params.datasets:
                known = ", ".join(study.params.datasets)
                raise ValueError(f"{params_file}: there is no data set {name!r}. Choose from {known}.")
            if not study.paths.manifest(name).is_file():
                raise ValueError(f"{name} has no manifest. Ingest it with `make run` or `make retrain`.")
        for name in names:
            cache_masks(study, name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the missing masks once, now."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    parser.add_argument(
        "--dataset", action="append", help="a data set; repeat the option for several; default: all"
    )
    options = parser.parse_args(arguments)
    with faults_in_one_line():
        open_study(options.params)  # reports a fault in the params file before a server starts
        with prefect_api():
            backfill(options.params, options.dataset)


if __name__ == "__main__":
    main()
