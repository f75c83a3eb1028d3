"""Serve the retraining flow on the cron schedule of params.yaml."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.servers import prefect_server
from flows.study import open_study

if TYPE_CHECKING:
    from prefect.schedules import Schedule


def main(arguments: Sequence[str] | None = None) -> None:
    """Start Prefect's server where none is given, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    params_file = parser.parse_args(arguments).params.resolve()
    schedule = open_study(params_file).params.schedule
    with contextlib.ExitStack() as stack:
        if "PREFECT_API_URL" not in os.environ:
            os.environ["PREFECT_API_URL"] = stack.enter_context(prefect_server())
        # Prefect reads its settings from the environment when it is imported.
        from prefect.schedules import Cron

        print(f"{schedule.cron} ({schedule.timezone}); the next runs: {_page()}. Ctrl-C ends it.", flush=True)
        serve(params_file, Cron(schedule.cron, timezone=schedule.timezone))


def serve(params_file: Path, schedule: Schedule) -> None:
    """Serve the flow on a schedule; a run that would overlap a running one is cancelled."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

    from flows.pipeline import pipeline

    pipeline.serve(
        name="retraining",
        schedule=schedule,
        parameters={"params_file": str(params_file)},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        print_starting_message=False,
    )


def _page() -> str:
    return os.environ["PREFECT_API_URL"].removesuffix("/api") + "/deployments"


if __name__ == "__main__":
    main()
