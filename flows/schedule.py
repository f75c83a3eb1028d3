"""Serve the retraining flow on the cron schedule of params.yaml."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from flows.servers import HOST, PREFECT_PORT, prefect_server
from flows.study import open_study


def main(arguments: Sequence[str] | None = None) -> None:
    """Start Prefect's server where none is given, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    params_file = parser.parse_args(arguments).params.resolve()
    schedule = open_study(params_file).params.schedule
    if os.environ.get("PREFECT_API_URL"):
        serve(params_file, schedule.cron, schedule.timezone)
        return
    with prefect_server() as api:
        os.environ["PREFECT_API_URL"] = api
        print(f"The next runs: http://{HOST}:{PREFECT_PORT}/deployments. Ctrl-C ends the schedule.", flush=True)
        serve(params_file, schedule.cron, schedule.timezone)


def serve(params_file: Path, cron: str, timezone: str) -> None:
    """Serve the flow; a run that would overlap a running one is cancelled."""
    # Prefect reads its settings from the environment when it is imported.
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from flows.pipeline import pipeline

    pipeline.serve(
        name="retraining",
        schedule=Cron(cron, timezone=timezone),
        parameters={"params_file": str(params_file)},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    )


if __name__ == "__main__":
    main()
