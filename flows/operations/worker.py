"""Register the deployments of prefect.yaml with the Prefect server of the environment, and work on them."""

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

from flows.operations.notify import tell
from flows.servers.servers import POOL


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pool, register, and become Prefect's worker in this very process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the worker, as the pages show it")
    parser.add_argument("--healthcheck", action="store_true", help="answer at port 8080 whether it works")
    options = parser.parse_args(arguments)
    home = Path.cwd()
    if not (home / "prefect.yaml").is_file():
        sys.exit(f"work: no prefect.yaml in {home}. Start it in the project's folder.")
    # A run's process starts elsewhere, and is to find this checkout's own code.
    others = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(home), *others])
    with get_client(sync_client=True) as client:
        make_pool(client)
        close_dead_runs(client)
    prefect = [sys.executable, "-m", "prefect"]
    deployed = subprocess.run([*prefect, "--no-prompt", "deploy", "--all"], check=False)
    if deployed.returncode != 0:
        sys.exit("work: Prefect does not take prefect.yaml; what it said stands above.")
    worker = [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", options.name]
    os.execv(sys.executable, [*worker, *(["--with-healthcheck"] if options.healthcheck else [])])


def make_pool(client: SyncPrefectClient) -> None:
    """A pool for processes of this machine that runs one at a time: the next one waits for its turn."""
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        concurrency_limit=1,
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    client.create_work_pool(pool, overwrite=True)


def close_dead_runs(client: SyncPrefectClient) -> None:
    """Set to Crashed, and tell of, the runs that the pool's last worker left unfinished when it was killed.

    The pool has one worker, and that one starts now. A dead run would keep its place under a limit, and every
    night's run after it would be cancelled.
    """
    unfinished = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    dead = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unfinished))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    state = Crashed(message="The worker that ran it was killed.")
    for run in dead:
        client.set_flow_run_state(run.id, state, force=True)
        tell(client.read_flow(run.flow_id).name, run, state)


if __name__ == "__main__":
    main()
