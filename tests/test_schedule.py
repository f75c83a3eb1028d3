"""A schedule on a loopback server really fires, and its run registers a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flows.servers import free_port, mlflow_server, prefect_server
from medfocus import tracking

SERVE = """
import sys
from datetime import timedelta
from pathlib import Path
from prefect.schedules import Interval
from flows.schedule import serve
serve(Path(sys.argv[1]), Interval(timedelta(seconds=3)))
"""


def flow_runs(api: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{api}/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_short_schedule_fires_and_its_run_registers_a_model(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with prefect_server(free_port()) as api:
        environment = {**os.environ, "PREFECT_API_URL": api, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
        command = [sys.executable, "-c", SERVE, str(project / "params.yaml")]
        served = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            runs, completed, end = [], [], time.monotonic() + 240
            while not completed and time.monotonic() < end and served.poll() is None:
                time.sleep(1)
                runs = flow_runs(api)
                completed = [run for run in runs if run["state_type"] == "COMPLETED"]
        finally:
            served.terminate()
            _, stderr = served.communicate(timeout=120)
        assert completed, stderr
        assert all(run["auto_scheduled"] and run["deployment_id"] for run in completed)
        assert (
            sum(run["state_type"] in ("SCHEDULED", "CANCELLED") for run in runs) > 1
        )  # the next ones stand there
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert client.get_model_version_by_alias("medfocus-phantom-breast", "champion").version


def test_the_mlflow_page_answers_on_loopback_over_the_projects_database(tmp_path: Path) -> None:
    tracking.start(None, tmp_path, "medfocus")
    with mlflow_server(tmp_path, free_port()) as address:
        client = mlflow.MlflowClient(address)
        assert client.get_experiment_by_name("medfocus") is not None
