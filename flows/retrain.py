"""Retraining as a scheduled operation: the pipeline's tasks on a data set that grows.

The caches keep decoded images, masks and features, so only new images cost time. Cells with an unchanged
support are not fitted again. Only the gate can change the champion.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.operations.locks import only_retraining
from flows.operations.notify import report_failure
from flows.pipeline import print_registrations, run_job, steps
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
    _, registrations = run_job(retrain, __doc__, arguments)
    print_registrations(registrations)


if __name__ == "__main__":
    main()
