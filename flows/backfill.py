"""Mask back-fill: one mask for every image of the manifests that has none by the present settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from flows.operations.jobs import faults_in_one_line, only_retraining
from flows.operations.notify import report_failure
from flows.pipeline import cache_masks
from flows.servers.servers import prefect_api
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
    """Manifests -> masks, of ``datasets`` or of all; nothing is ingested and nothing is trained.

    Raises ValueError for a data set that the study does not have, or that was never ingested, and
    JobRunningError where a retraining or another back-fill works in this checkout.
    """
    study = open_study(Path(params_file))
    names = list(study.params.datasets) if datasets is None else list(datasets)
    with only_retraining(study.home):
        for name in names:
            if name not in study.params.datasets:
                known = ", ".join(study.params.datasets)
                raise ValueError(f"{params_file}: no data set {name!r} there; it has {known}.")
            if not study.paths.manifest(name).is_file():
                raise ValueError(f"{name} has no manifest; ingest it first, by `make run` or `make retrain`.")
        for name in names:
            cache_masks(study, name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill up once, now."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    parser.add_argument("--dataset", action="append", help="may be given several times; all without it")
    options = parser.parse_args(arguments)
    with faults_in_one_line():
        open_study(options.params)  # a fault in the params file is said before a server starts
        with prefect_api():
            backfill(options.params, options.dataset)


if __name__ == "__main__":
    main()
