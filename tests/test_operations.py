"""Claims about operations: notices of failures, schedules, locks, passwords, containers."""

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
from flows.operations.locks import JobRunningError, only_retraining
from flows.operations.retries import is_passing
from flows.retrain import retrain
from flows.servers import postgres
from flows.servers.prefect import POOL
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
    """The bodies of the requests to a webhook on loopback."""
    bodies: list[bytes] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing to the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{server.server_port}/alert")
    yield bodies
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_class_of_an_error_and_never_its_text(
    posted: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_UI_URL", "http://127.0.0.1:4200")
    report(failed(FileNotFoundError(f"{PATIENT} is gone")))
    (body,) = posted
    notice = json.loads(body)
    assert {name: notice[name] for name in ("flow", "run", "state", "error")} == {
        "flow": "retrain",
        "run": "params.yaml",
        "state": "Failed",
        "error": "FileNotFoundError",
    }
    assert b"DOE" not in body and not capsys.readouterr().err


def test_a_killed_run_is_reported_as_crashed(posted: list[bytes]) -> None:
    report(Crashed(message="Process exited with status code: -9."))
    assert json.loads(posted[0])["state"] == "Crashed" and json.loads(posted[0])["error"] == "CrashedRun"


def test_without_a_webhook_a_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(notify.WEBHOOK, raising=False)
    report(failed(ValueError(PATIENT)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("retrain, run params.yaml: Failed, ValueError, ") and "DOE" not in line


def test_a_webhook_that_never_answers_costs_limited_time_and_raises_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "LIMIT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{silent.getsockname()[1]}/secret")
        start = time.monotonic()
        report(failed(ValueError(PATIENT)))
        assert time.monotonic() - start < 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "MEDFOCUS_WEBHOOK failed" in line and "secret" not in line and "DOE" not in line


def test_a_file_address_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notify.WEBHOOK, "file:///etc/hostname")
    report(failed(ValueError(PATIENT)))
    assert capsys.readouterr().err.endswith("MEDFOCUS_WEBHOOK failed (not an http:// or https:// address)\n")


def test_a_server_that_does_not_answer_is_retried_and_an_unreadable_image_is_not() -> None:
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
def test_a_deployment_has_a_flow_with_its_parameters_a_time_limit_and_failure_hooks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    deployment = deployments()[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert set(deployment["parameters"]) == set(flow.parameters.properties)
    assert deployment["work_pool"]["name"] == POOL
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert flow.timeout_seconds and flow.on_failure_hooks and flow.on_crashed_hooks


def test_the_nightly_run_has_a_time_zone_and_ends_before_the_next_run() -> None:
    ((only,), *others) = [deployment["schedules"] for deployment in deployments().values()]
    schedule = CronSchedule(**only)  # raises for an invalid cron expression
    assert ZoneInfo(str(schedule.timezone)) and not any(others)
    assert retrain.timeout_seconds is not None and retrain.timeout_seconds < 24 * 3600


def test_no_retraining_and_no_backfill_starts_while_another_runs(project: Path) -> None:
    with FileLock(project / ".cache" / ".retraining.lock"):
        for flow in (retrain, backfill):
            with pytest.raises(RedactedError, match=r"^JobRunningError at") as caught:
                flow.fn(Path("params.yaml"))
            assert isinstance(caught.value.error, JobRunningError)
            assert "another retraining or back-fill is running" in str(caught.value.error)
    with only_retraining(project):  # the lock is free again
        pass


def test_a_backfill_names_an_unknown_data_set_and_a_missing_manifest(project: Path) -> None:
    with pytest.raises(RedactedError) as caught:
        backfill.fn(Path("params.yaml"), ["chest"])
    assert "there is no data set 'chest'. Choose from phantom-breast" in str(caught.value.error)
    with pytest.raises(RedactedError) as caught:
        backfill.fn(Path("params.yaml"))
    assert "phantom-breast has no manifest. Ingest it" in str(caught.value.error)


def test_mlflow_does_not_start_beyond_loopback_without_a_password() -> None:
    for host in ("0.0.0.0", "192.0.2.7", "::", "reading-room.example"):
        with pytest.raises(ValueError, match=r"there is no default. Set MLFLOW_AUTH_ADMIN_PASSWORD"):
            stack.credentials(host, {})
    for host in ("0.0.0.0", "127.0.0.1"):
        assert stack.credentials(host, {stack.PASSWORD: "my own"}) == stack.Login("admin", "my own")
    assert "my own" not in repr(stack.Login("admin", "my own"))
    for host in ("127.0.0.1", "::1", "localhost"):
        assert stack.credentials(host, {}) is None


def test_a_missing_postgresql_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres.shutil, "which", lambda name: None)
    monkeypatch.setattr(postgres.Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(FileNotFoundError, match="apt-get install postgresql"):
        postgres.find_programs()


PASSWORDS = ("POSTGRES_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "PREFECT_PASSWORD")


def test_containers_have_health_checks_listen_on_loopback_and_contain_no_password() -> None:
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


def test_compose_accepts_the_file_and_rejects_a_missing_password() -> None:
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True).returncode:
        command = ["docker-compose"]
    if not shutil.which(command[0]):
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    command += ["--file", str(ROOT / "compose.yaml"), "config", "--quiet"]
    plain = {name: value for name, value in os.environ.items() if name not in PASSWORDS}
    for missing in (None, *PASSWORDS):
        passwords = {name: "my own" for name in PASSWORDS if name != missing}
        checked = subprocess.run(
            command, env={**plain, **passwords}, capture_output=True, text=True, check=False
        )
        assert (checked.returncode == 0) == (missing is None), checked.stderr
        assert missing is None or missing in checked.stderr
