"""Retraining as an operation: what came since is ingested and masked, the study run, the gate asked.

It is the pipeline's flow, made to run by itself. An image that was there before is not decoded, segmented
or encoded again, a cell whose support is as it was is not fitted again, and the champion changes only by the
gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.operations.jobs import faults_in_one_line, only_job, only_retraining
from flows.operations.notify import report_failure
from flows.pipeline import steps
from flows.servers.servers import prefect_api
from flows.study.study import open_study
from medfocus.storage.redaction import redacted

if TYPE_CHECKING:
    from medfocus.tracking.registry import Registration


@flow(
    name="retrain",
    flow_run_name="{params_file}",
    validate_parameters=False,
    timeout_seconds=23 * 3600,  # it is over when the next night's begins
    on_failure=[report_failure],
    on_crashed=[report_failure],
)
@redacted
def retrain(params_file: Path = Path("params.yaml")) -> list[Registration]:
    """New images -> masks -> the study's cells -> gate -> registry.

    Raises JobRunningError where another retraining or back-fill works in this checkout.
    """
    study = open_study(Path(params_file))
    with only_retraining(study.home):
        return steps(study)


def main(arguments: Sequence[str] | None = None) -> None:
    """Retrain once, now, and say what the gate decided."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    params_file = parser.parse_args(arguments).params
    with faults_in_one_line():
        study = open_study(params_file)  # a fault in the params file is said before a server starts
        with only_job(study), prefect_api():
            registrations = retrain(params_file)
    for registration in registrations:
        alias = f"@{registration.alias}" if registration.alias else "without alias"
        print(f"{registration.name} version {registration.version} {alias}: {registration.reason}")


if __name__ == "__main__":
    main()
