"""Retraining as a scheduled operation: the pipeline's tasks on a data set that grows.

The caches keep decoded images, masks and features, so only new images cost time. Cells with an unchanged
support are not fitted again. Only the gate can change the champion.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.operations.failures import faults_in_one_line
from flows.operations.locks import only_job, only_retraining
from flows.operations.notify import report_failure
from flows.pipeline import print_registrations, steps
from flows.servers.prefect import prefect_api
from flows.study.study import open_study
from medfocus.storage.redaction import redacted

if TYPE_CHECKING:
    from medfocus.tracking.registry import Registration


@flow(
    name="retrain",
    flow_run_name="{params_file}",
    validate_parameters=False,
    timeout_seconds=23 * 3600,  # ends before the next night's run
    on_failure=[report_failure],
    on_crashed=[report_failure],
)
@redacted
def retrain(params_file: Path = Path("params.yaml")) -> list[Registration]:
    """Ingest and segment the new images, run the study, then apply the promotion gate.

    Raises JobRunningError if another retraining or back-fill runs in this checkout.
    """
    study = open_study(Path(params_file))
    with only_retraining(study.home):
        return steps(study)


def main(arguments: Sequence[str] | None = None) -> None:
    """Retrain once, now, and print the gate's decisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    params_file = parser.parse_args(arguments).params
    with faults_in_one_line():
        study = open_study(params_file)  # reports a fault in the params file before a server starts
        with only_job(study), prefect_api():
            registrations = retrain(params_file)
    print_registrations(registrations)


if __name__ == "__main__":
    main()
