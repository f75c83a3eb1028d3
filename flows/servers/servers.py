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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import psutil
from filelock import FileLock

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
POOL = "medfocus"  # the work pool of prefect.yaml
_PATIENCE = 20.0  # seconds that a process has to end by itself


@contextlib.contextmanager
def prefect_server(
    port: int = PREFECT_PORT, database: str | None = None, log: Path | None = None
) -> Iterator[str]:
    """A Prefect server on loopback for the ``with`` block; its API address. One that runs there is used.

    Its database is at the SQLAlchemy URL ``database``, or a file in PREFECT_HOME.
    """
    api = f"http://{HOST}:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    if database is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    with contextlib.ExitStack() as stack:
        # Not from prefect.settings: to import Prefect now would fix the address that ``schedule`` sets later.
        home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        home.mkdir(parents=True, exist_ok=True)
        # Two servers that migrate one new database at once break each other: they come up one by one.
        with FileLock(home / "server.lock"), _whole_database(home):
            stack.enter_context(_server(command, environment, f"{api}/health", "Prefect's server", log))
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


def answers_at(port: int) -> bool:
    """Whether anything listens there on loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def prefect_answers(port: int = PREFECT_PORT) -> bool:
    """Whether a Prefect server runs on loopback."""
    return answers(f"http://{HOST}:{port}/api/health")


@contextlib.contextmanager
def mlflow_server(home: Path, port: int = MLFLOW_PORT) -> Iterator[str]:
    """MLflow's server on loopback over the project's own database; its address."""
    options = ["--default-artifact-root", (home / "mlruns").as_uri()]
    with _mlflow(HOST, port, f"sqlite:///{home / 'mlflow.db'}", options, {}, None):
        yield f"http://{HOST}:{port}"


@contextlib.contextmanager
def mlflow_keeper(
    home: Path, host: str, port: int, store: str, environment: Mapping[str, str], log: Path
) -> Iterator[str]:
    """MLflow's server over a database, which takes and hands out the artefacts too; its loopback address.

    Args:
        home: Its folder ``mlruns`` holds the artefacts.
        host: The address it listens on.
        port: The port.
        store: SQLAlchemy URL of the database.
        environment: With MLFLOW_AUTH_CONFIG_PATH in it the server asks for a password.
        log: The file that it writes to.
    """
    options = ["--serve-artifacts", "--artifacts-destination", (home / "mlruns").as_uri()]
    if "MLFLOW_AUTH_CONFIG_PATH" in environment:
        options += ["--app-name", "basic-auth"]
    with _mlflow(host, port, store, options, environment, log):
        yield f"http://{_reached(host)}:{port}"


@contextlib.contextmanager
def model_server(store: str, model: str, port: int, log: Path | None = None) -> Iterator[str]:
    """MLflow's scoring server on loopback, out of this environment and without a network; its address.

    Args:
        store: The tracking URI of the registry.
        model: Such as ``models:/NAME@champion``.
        port: The port.
        log: The file that it writes to.
    """
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"),
        *("--host", HOST, "--port", str(port)),
    ]
    environment = {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",  # warnings would put the names of foreign columns into the log
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it starts uvicorn by name
    }
    address = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory() as temporary:  # it does not tidy up when it is ended
        environment["TMPDIR"] = temporary
        with _server(command, environment, f"{address}/ping", "The scoring server", log):
            yield address


def _mlflow(
    host: str, port: int, store: str, options: list[str], environment: Mapping[str, str], log: Path | None
) -> contextlib.AbstractContextManager[None]:
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", store, *options),
    ]
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 16 processes instead of 2
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    health = f"http://{_reached(host)}:{port}/health"
    return _server(command, {**quiet, **environment}, health, "MLflow's server", log)


def _reached(host: str) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    return HOST if host == "0.0.0.0" else host


@contextlib.contextmanager
def _server(
    command: list[str], environment: Mapping[str, str], health: str, name: str, log: Path | None
) -> Iterator[None]:
    if answers(health):
        yield
        return
    fault = f"{name} does not answer at {health}; is its port taken?"
    with running(command, environment, lambda: answers(health), fault, log=log):
        yield


@contextlib.contextmanager
def running(
    command: list[str],
    environment: Mapping[str, str],
    ready: Callable[[], bool],
    fault: str,
    *,
    log: Path | None = None,
    user: str | None = None,
    ask: signal.Signals = signal.SIGTERM,
    from_below: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process for the ``with`` block. After it neither the child nor a child of it is left.

    Args:
        command: Program and arguments.
        environment: Added to this process's own.
        ready: Whether it does its work by now.
        fault: What to say where it never does.
        log: The file it writes to; without one its last words are kept for the error alone.
        user: The account it runs as; for root only.
        ask: The signal that asks it to end.
        from_below: Whether its children are asked before it is.

    Raises RuntimeError where it ends before it is ready, or is not within five minutes.
    """
    with _log_file(log) as written:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd="/" if user else None,  # the account may not be let into the present one
            stdin=subprocess.DEVNULL,
            stdout=written if log else subprocess.DEVNULL,
            stderr=written,
            user=user,
            group=None if user is None else _group(user),
            extra_groups=None if user is None else [],
            process_group=0,  # Ctrl-C reaches the starter alone, which ends its children in their order
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            if not _comes_up(ready, process):
                written.seek(0)
                said = written.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{fault} It said: {said}")
            yield process
        finally:
            _end(process, ask, from_below)


def _log_file(path: Path | None) -> BinaryIO:
    if path is None:  # a pipe that nobody reads would fill up and stop the process
        return tempfile.TemporaryFile()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def _group(user: str) -> int:
    import pwd  # not on Windows

    return pwd.getpwnam(user).pw_gid


def _end(process: subprocess.Popen[bytes], ask: signal.Signals, from_below: bool) -> None:
    """End a process, and whatever of its children outlives it."""
    if from_below:
        _terminate(_children(process))
    family = _children(process)
    process.send_signal(ask)
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _terminate(family)


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _terminate(processes: Iterable[psutil.Process]) -> None:
    """Ask them to end, and kill those that do not."""
    left = living(processes)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    end = time.monotonic() + _PATIENCE
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = living(left)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a dead one that nobody has asked about yet does not."""
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _end_with_parent() -> None:
    """Have Linux end this process when its parent is killed and can do so no more."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _comes_up(ready: Callable[[], bool], process: subprocess.Popen[bytes], timeout: float = 300) -> bool:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return True
        time.sleep(0.3)
    return False


def answers(health: str) -> bool:
    """Whether a server says at this address that it is well."""
    try:
        with urllib.request.urlopen(health, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
