"""`make up` starts its servers, runs the schedule, registers a model, and stops cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import psutil
import pytest
import yaml
from mlflow.exceptions import MlflowException

from flows.operations.notify import WEBHOOK
from flows.servers.mlflow import mlflow_server
from flows.servers.postgres import find_programs
from flows.servers.processes import free_port, living
from medfocus.tracking import registry, runs

ROOT = Path(__file__).resolve().parents[1]
NAME = "medfocus-phantom-breast"
T = TypeVar("T")


@pytest.fixture
def operation(project: Path) -> Path:
    """A project with a study of one quick cell and a run every twenty seconds."""
    content = yaml.safe_load((project / "params.yaml").read_text())
    content["study"] |= {"methods": {"pixels": ["none"]}, "percents": [100], "seeds": [0]}
    content["validation"] |= {"methods": ["pixels"]}
    (project / "params.yaml").write_text(yaml.safe_dump(content))
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    deployed["deployments"][0]["schedules"] = [{"interval": 20}]
    (project / "prefect.yaml").write_text(yaml.safe_dump(deployed))
    return project


@contextlib.contextmanager
def started(home: Path, *options: str, **environment: str) -> Iterator[tuple[str, str]]:
    """The addresses of MLflow and of Prefect's API; after the block, all processes have ended cleanly."""
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "flows.operations.stack", *options]
    command += ["--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
    settings = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2", **environment}
    stack = subprocess.Popen(
        command, cwd=home, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    family: list[psutil.Process] = []
    try:
        assert stack.stdout is not None
        for line in stack.stdout:
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(stack.communicate()[1])
        yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/api"
    finally:
        if stack.poll() is None:
            family = psutil.Process(stack.pid).children(recursive=True)
        stack.send_signal(signal.SIGTERM)
        out, errors = stack.communicate(timeout=120)
        left = [process.cmdline() for process in living(family)]
        for process in living(family):
            process.kill()
    assert (stack.returncode, errors) == (0, ""), out
    assert out.endswith("Stopped.\n") and len(family) > 3 and not left


def wait_for(condition: Callable[[], T | None], seconds: float, home: Path) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.5)
    pytest.fail((home / ".cache/logs/worker.log").read_text()[-3000:])


def champion(address: str) -> str | None:
    try:
        return mlflow.MlflowClient(address).get_model_version_by_alias(NAME, registry.CHAMPION).version
    except MlflowException:
        return None


def call(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    for _ in range(30):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503:  # SQLite is locked for a moment
                raise
            time.sleep(1)
    raise AssertionError(f"{address} was unavailable for half a minute")


def test_a_scheduled_run_registers_a_model_and_a_failed_one_is_reported(operation: Path) -> None:
    completed = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    notices: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            notices.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing to the terminal."""

    with HTTPServer(("127.0.0.1", 0), Webhook) as webhook:
        threading.Thread(target=webhook.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{webhook.server_port}"
        with started(operation, "--sqlite", **{WEBHOOK: address}) as (pages, api):
            study = call(f"{api}/deployments/name/retrain/study")
            absent = {"parameters": {"params_file": "absent.yaml"}}
            call(f"{api}/deployments/{study['id']}/create_flow_run", absent)
            assert wait_for(lambda: champion(pages), 400, operation) == "1"
            runs = wait_for(lambda: call(f"{api}/flow_runs/filter", completed), 60, operation)
            assert all(run["auto_scheduled"] and run["deployment_id"] for run in runs)
            (failure,) = wait_for(lambda: notices, 60, operation)
        webhook.shutdown()
    assert failure["flow"] == "retrain" and failure["error"] == "FileNotFoundError"
    assert failure["page"].startswith(api.removesuffix("/api")) and failure["run"] == "absent.yaml"
    with contextlib.closing(sqlite3.connect(operation / ".prefect" / "prefect.db")) as database:
        states = {state for (state,) in database.execute("SELECT state_type FROM flow_run")}
        worked = "SELECT start_time, end_time FROM flow_run WHERE state_type IN ('COMPLETED', 'FAILED')"
        times = sorted(database.execute(worked).fetchall())
    assert "COMPLETED" in states and not states & {"RUNNING", "CANCELLING"}
    assert len(times) > 1  # and never two at once
    assert all(end < start for (_, end), (start, _) in pairwise(times))
    client = mlflow.MlflowClient(f"sqlite:///{operation / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("medfocus")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert runs and all(run.info.status != "RUNNING" for run in runs)


def test_a_scheduled_run_registers_a_model_on_postgresql_behind_a_password(
    operation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_programs()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    # Outside pytest's folder, which PostgreSQL's account may not enter if root runs the tests.
    folder = Path(tempfile.mkdtemp(prefix="medfocus-cluster-"))
    try:
        login = {"MLFLOW_AUTH_ADMIN_USERNAME": "keeper", "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_hex(8)}
        with started(operation, "--database", str(folder), **login) as (pages, _):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                call(f"{pages}/api/2.0/mlflow/experiments/search", {"max_results": 1})
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", login["MLFLOW_AUTH_ADMIN_USERNAME"])
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", login["MLFLOW_AUTH_ADMIN_PASSWORD"])
            assert wait_for(lambda: champion(pages), 400, operation) == "1"
        assert not (operation / "mlflow.db").exists() and not (operation / ".prefect/prefect.db").exists()
        assert (folder / "data/PG_VERSION").is_file() and not (folder / "data/postmaster.pid").exists()
    finally:
        shutil.rmtree(folder)


def test_the_mlflow_server_shows_the_projects_database_on_loopback(tmp_path: Path) -> None:
    runs.start(None, tmp_path, "medfocus")
    with mlflow_server(tmp_path, free_port()) as address:
        client = mlflow.MlflowClient(address)
        assert client.get_experiment_by_name("medfocus") is not None
