"""Claims about the operation: who is told of a failure, what runs when, and never two at once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import yaml
from filelock import FileLock
from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Crashed, exception_to_failed_state

from flows.backfill import backfill
from flows.operations import notify, stack
from flows.operations.jobs import JobRunningError, only_retraining
from flows.operations.retries import is_passing
from flows.retrain import retrain
from flows.servers import postgres, servers
from flows.stages.dvc import StageBusyError
from medfocus.storage.redaction import RedactedError

ROOT = Path(__file__).resolve().parents[1]
PATIENT = "incoming/DOE^JANE^1961.png"


def failed(error: Exception) -> State[Any]:
    return asyncio.run(exception_to_failed_state(error))


def report(state: State[Any]) -> None:
    notify.report_failure(retrain, FlowRun(id=uuid4(), flow_id=uuid4(), name="params.yaml"), state)


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The bodies that a webhook on loopback was sent."""
    bodies: list[bytes] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{server.server_port}/alert")
    yield bodies
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_kind_of_error_and_never_its_text(
    posted: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_UI_URL", "http://127.0.0.1:4200")
    report(failed(FileNotFoundError(f"{PATIENT} is gone")))
    (body,) = posted
    told = json.loads(body)
    assert {name: told[name] for name in ("flow", "run", "state", "error")} == {
        "flow": "retrain",
        "run": "params.yaml",
        "state": "Failed",
        "error": "FileNotFoundError",
    }
    assert b"DOE" not in body and not capsys.readouterr().err


def test_a_run_that_was_killed_is_told_of_as_one(posted: list[bytes]) -> None:
    report(Crashed(message="Process exited with status code: -9."))
    assert json.loads(posted[0])["state"] == "Crashed" and json.loads(posted[0])["error"] == "CrashedRun"


def test_without_a_webhook_a_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(notify.WEBHOOK, raising=False)
    report(failed(ValueError(PATIENT)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("retrain, run params.yaml: Failed, ValueError, ") and "DOE" not in line


def test_a_webhook_that_never_answers_costs_a_bounded_time_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "LIMIT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{silent.getsockname()[1]}/secret")
        start = time.monotonic()
        report(failed(ValueError(PATIENT)))
        assert time.monotonic() - start < 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "did not take it" in line and "secret" not in line and "DOE" not in line


def test_an_address_that_is_no_web_address_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notify.WEBHOOK, "file:///etc/hostname")
    report(failed(ValueError(PATIENT)))
    assert capsys.readouterr().err.endswith("did not take it (it is no http:// or https:// address)\n")


def test_a_server_that_does_not_answer_is_tried_again_and_a_bad_image_is_not() -> None:
    import requests

    wrapped = RuntimeError("the champion cannot be loaded")
    wrapped.__cause__ = requests.ConnectionError("refused")
    assert is_passing(wrapped)
    assert is_passing(StageBusyError("held by another"))
    for lasting in (ValueError("unreadable"), FileNotFoundError("gone"), TimeoutError("its time is over")):
        assert not is_passing(lasting)


def deployments() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    return {deployment["name"]: deployment for deployment in content["deployments"]}


@pytest.mark.parametrize("name", ["nightly", "study", "backfill"])
def test_a_deployment_has_a_flow_that_takes_its_parameters_a_limit_and_a_hook(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    deployment = deployments()[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert set(deployment["parameters"]) == set(flow.parameters.properties)
    assert deployment["work_pool"]["name"] == servers.POOL
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert flow.timeout_seconds and flow.on_failure_hooks and flow.on_crashed_hooks


def test_the_nightly_run_has_a_time_and_a_zone_and_is_over_before_the_next() -> None:
    ((only,), *others) = [deployment["schedules"] for deployment in deployments().values()]
    schedule = CronSchedule(**only)  # raises for a cron that is none
    assert ZoneInfo(str(schedule.timezone)) and not any(others)
    assert retrain.timeout_seconds is not None and retrain.timeout_seconds < 24 * 3600


def test_no_retraining_and_no_backfill_starts_where_another_works(project: Path) -> None:
    with FileLock(project / ".cache" / ".retraining.lock"):
        for flow in (retrain, backfill):
            with pytest.raises(RedactedError, match=r"^JobRunningError at") as told:
                flow.fn(Path("params.yaml"))
            assert isinstance(told.value.error, JobRunningError)
            assert "another retraining or back-fill runs here" in str(told.value.error)
    with only_retraining(project):  # it was given back
        pass


def test_a_backfill_names_the_data_set_that_is_not_there(project: Path) -> None:
    with pytest.raises(RedactedError) as told:
        backfill.fn(Path("params.yaml"), ["chest"])
    assert "no data set 'chest' there; it has phantom-breast" in str(told.value.error)
    with pytest.raises(RedactedError) as told:
        backfill.fn(Path("params.yaml"))
    assert "phantom-breast has no manifest; ingest it first" in str(told.value.error)


def test_beyond_loopback_mlflow_does_not_start_without_a_password_of_ones_own() -> None:
    for host in ("0.0.0.0", "192.0.2.7", "::"):
        with pytest.raises(ValueError, match=r"there is no default one. Set MLFLOW_AUTH_ADMIN_PASSWORD"):
            stack.credentials(host, {})
    for host in ("0.0.0.0", "127.0.0.1"):
        assert stack.credentials(host, {stack.PASSWORD: "of my own"}) == stack.Login("admin", "of my own")
    assert "of my own" not in repr(stack.Login("admin", "of my own"))
    assert stack.credentials("127.0.0.1", {}) is None and stack.credentials("localhost", {}) is None


def test_without_postgresql_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres.shutil, "which", lambda name: None)
    monkeypatch.setattr(postgres.Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(FileNotFoundError, match="apt-get install postgresql"):
        postgres.find_programs()


PASSWORDS = ("POSTGRES_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "PREFECT_PASSWORD")


def test_the_containers_have_checks_listen_on_loopback_and_know_no_password_by_heart() -> None:
    content = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert set(content["services"]) == {"postgres", "mlflow", "prefect", "worker"}
    secrets: list[str] = []
    for service in content["services"].values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service.get("depends_on", {})) <= set(content["services"])
        for mounted in service.get("volumes", []):
            source = mounted.split(":")[0]
            assert source in content["volumes"] or (ROOT / source).exists()
        secrets += [
            value
            for name, value in service["environment"].items()
            if name.endswith(("PASSWORD", "SECRET_KEY", "AUTH_STRING"))
        ]
    assert len(secrets) == 8 and all(value.endswith(":?set it}") for value in secrets)
    assert {name for value in secrets for name in PASSWORDS if f"${{{name}:?" in value} == set(PASSWORDS)
    commands = [service.get("command", "") for service in content["services"].values()]
    for module in ("flows.operations.worker", "prefect server start", "mlflow server --app-name basic-auth"):
        assert any(f"python -m {module}" in command for command in commands)


def test_compose_takes_the_file_and_no_password_left_out() -> None:
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True).returncode:
        command = ["docker-compose"]
    if not shutil.which(command[0]):
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    command += ["--file", str(ROOT / "compose.yaml"), "config", "--quiet"]
    plain = {name: value for name, value in os.environ.items() if name not in PASSWORDS}
    for left_out in (None, *PASSWORDS):
        given = {name: "of my own" for name in PASSWORDS if name != left_out}
        checked = subprocess.run(command, env={**plain, **given}, capture_output=True, text=True, check=False)
        assert (checked.returncode == 0) == (left_out is None), checked.stderr
        assert left_out is None or left_out in checked.stderr
