"""Prefect's and MLflow's servers on loopback, as child processes that end with their starter."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000


@contextlib.contextmanager
def prefect_server(port: int = PREFECT_PORT) -> Iterator[str]:
    """A Prefect server on loopback for the ``with`` block; its API address. One that runs there is used."""
    api = f"http://{HOST}:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    with contextlib.ExitStack() as stack:
        # Not from prefect.settings: to import Prefect now would fix the address that ``schedule`` sets later.
        home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        home.mkdir(parents=True, exist_ok=True)
        # Two servers that migrate one new database at once break each other: they come up one by one.
        with FileLock(home / "server.lock"), _whole_database(home):
            stack.enter_context(_running(command, environment, f"{api}/health", "Prefect's server"))
        yield api


@contextlib.contextmanager
def _whole_database(home: Path) -> Iterator[None]:
    """Around the start of a server: a new database whose making was cut short is made anew."""
    database, making = home / "prefect.db", home / "prefect.db.making"
    if making.exists():
        for left in home.glob("prefect.db*"):
            left.unlink()
    if not database.exists():
        making.touch()
    yield
    making.unlink(missing_ok=True)


@contextlib.contextmanager
def prefect_api() -> Iterator[None]:
    """The Prefect server of the environment, or one on loopback for the ``with`` block.

    Prefect would start one by itself, but that one loses the last records of a process that ends.

    Raises ConnectionError where the environment names a server and none answers.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if given := PREFECT_API_URL.value():
        must_answer(f"{given}/health", "PREFECT_API_URL", "a server on loopback is then started for the run")
        yield
        return
    port = PREFECT_PORT if prefect_answers() else free_port()
    with prefect_server(port) as api, temporary_settings({PREFECT_API_URL: api}):
        try:
            yield
        finally:  # else they would be sent at exit, to a server that is gone
            EventsWorker.drain_all(timeout=15)
            APILogWorker.drain_all(timeout=15)


def must_answer(url: str, setting: str, without: str, seconds: float = 10) -> None:
    """See to it that a server is there before anything is computed; any answer will do.

    Raises ConnectionError, naming the setting that asks for it, when none came in time.
    """
    end, reason = time.monotonic() + seconds, ""
    while (left := end - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(url, timeout=left):
                return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, OSError) as error:
            reason = str(error)
            time.sleep(min(1, left))
    raise ConnectionError(
        f"{setting}: no server answers at {url} in {seconds:g} seconds ({reason}). Start it, mend the "
        f"address, or unset {setting}: {without}."
    )


def free_port() -> int:
    """A port on loopback that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def prefect_answers(port: int = PREFECT_PORT) -> bool:
    """Whether a Prefect server runs on loopback."""
    return _answers(f"http://{HOST}:{port}/api/health")


@contextlib.contextmanager
def mlflow_server(home: Path, port: int = MLFLOW_PORT) -> Iterator[str]:
    """MLflow's server on loopback over the project's own database; its address."""
    address = f"http://{HOST}:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"),
        *("--default-artifact-root", (home / "mlruns").as_uri()),
    ]
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 16 processes instead of 2
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    with _running(command, environment, f"{address}/health", "MLflow's server"):
        yield address


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], health: str, name: str) -> Iterator[None]:
    if _answers(health):
        yield
        return
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up and stop the server
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=log,
            process_group=0,  # Ctrl-C is for the run, which still has to tell the server of it
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            if not _comes_up(health, process):
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{name} does not answer at {health}; is its port taken? It said: {said}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """Have Linux end this process when its parent is killed and can do so no more."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _comes_up(health: str, process: subprocess.Popen[bytes], timeout: float = 120) -> bool:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if _answers(health):
            return True
        time.sleep(0.3)
    return False


def _answers(health: str) -> bool:
    try:
        with urllib.request.urlopen(health, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
