"""Prefect's worker: it registers the deployments of prefect.yaml and runs their flows."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker

from flows.operations.notify import report
from flows.servers.prefect import POOL


def main(arguments: Sequence[str] | None = None) -> None:
    """Create the pool, register the deployments, and replace this process with Prefect's worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the worker's name on Prefect's pages")
    parser.add_argument("--healthcheck", action="store_true", help="answer health checks at port 8080")
    options = parser.parse_args(arguments)
    home = Path.cwd()
    if not (home / "prefect.yaml").is_file():
        sys.exit(f"worker: no prefect.yaml in {home}. Start the worker in the project's folder.")
    # A run's process starts in another folder but must import this checkout's code.
    others = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(home), *others])
    with get_client(sync_client=True) as client:
        make_pool(client)
        close_dead_runs(client)
    prefect = [sys.executable, "-m", "prefect"]
    deployed = subprocess.run([*prefect, "--no-prompt", "deploy", "--all"], check=False)
    if deployed.returncode != 0:
        sys.exit("worker: Prefect rejects prefect.yaml; correct the fault shown above.")
    worker = [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", options.name]
    os.execv(sys.executable, [*worker, *(["--with-healthcheck"] if options.healthcheck else [])])


def make_pool(client: SyncPrefectClient) -> None:
    """Create a pool for processes on this machine that runs one flow at a time; further flows wait."""
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        concurrency_limit=1,
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    client.create_work_pool(pool, overwrite=True)


def close_dead_runs(client: SyncPrefectClient) -> None:
    """Set the unfinished runs of a killed worker to Crashed and report them.

    The pool has only one worker, which starts now. A dead run would still count for the deployment's limit,
    and Prefect would cancel every later run.
    """
    unfinished = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    dead = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unfinished))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    state = Crashed(message="The worker of this run was killed.")
    for run in dead:
        client.set_flow_run_state(run.id, state, force=True)
        report(client.read_flow(run.flow_id).name, run, state)


if __name__ == "__main__":
    main()
