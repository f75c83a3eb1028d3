"""Register the deployments of prefect.yaml with the Prefect server of the environment, and work on them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

POOL = "medfocus"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pool, register, and become Prefect's worker in this very process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the worker, as the pages show it")
    name = parser.parse_args(arguments).name
    home = Path.cwd()
    if not (home / "prefect.yaml").is_file():
        sys.exit(f"work: no prefect.yaml in {home}. Start it in the project's folder.")
    # A run's process starts elsewhere, and is to find this checkout's own code.
    others = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(home), *others])
    make_pool()
    prefect = [sys.executable, "-m", "prefect"]
    deployed = subprocess.run([*prefect, "--no-prompt", "deploy", "--all"], check=False)
    if deployed.returncode != 0:
        sys.exit("work: Prefect does not take prefect.yaml; what it said stands above.")
    os.execv(
        sys.executable, [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", name]
    )


def make_pool() -> None:
    """A pool for processes of this machine that runs one at a time: the next one waits for its turn."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        concurrency_limit=1,
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    with get_client(sync_client=True) as client:
        client.create_work_pool(pool, overwrite=True)


if __name__ == "__main__":
    main()
