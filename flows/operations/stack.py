"""Operation on one machine: databases, MLflow, Prefect, a worker and the schedule.

All are child processes of this process and end with it, in reverse order. Prefect's server can run code on
this machine, so it listens only on loopback. MLflow may also listen beyond loopback, with a password.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import json
import os
import secrets
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows.servers.mlflow import MLFLOW_PORT, mlflow_artifact_server
from flows.servers.postgres import ROLE, postgres
from flows.servers.prefect import POOL, PREFECT_PORT, prefect_server
from flows.servers.processes import HOST, answers_at, living, running
from flows.study.study import find_home
from medfocus.tracking import runs

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # MLflow's own variables
USERNAME = "MLFLOW_AUTH_ADMIN_USERNAME"
_SECRET_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AUTH = """[mlflow]
default_permission = READ
database_uri = {users}
# Password hashing is slow on purpose, and one model needs a hundred requests. The server is one process, so
# its cache is never stale.
auth_cache_ttl_seconds = 60
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Login:
    """MLflow's administrator."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Stores:
    """The SQLAlchemy URLs of the three databases."""

    mlflow: str
    users: str  # the users of MLflow
    prefect: str | None  # None: Prefect's own file in PREFECT_HOME


def main(arguments: Sequence[str] | None = None) -> None:
    """Start everything, print the addresses, and wait for Ctrl-C, SIGTERM or the end of a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default=HOST, help="address of MLflow; beyond loopback it needs a password")
    parser.add_argument("--mlflow-port", type=int, default=MLFLOW_PORT)
    parser.add_argument("--prefect-port", type=int, default=PREFECT_PORT)
    parser.add_argument("--sqlite", action="store_true", help="use SQLite files instead of PostgreSQL")
    parser.add_argument("--database", type=Path, help="folder of PostgreSQL's data; default: .postgres")
    options = parser.parse_args(arguments)
    for number in _SIGNALS:
        signal.signal(number, _stop_once)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        sys.exit(f"up: {error}")


def _stop_once(number: int, frame: object) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    print("Stopping: worker, Prefect, MLflow, databases.", flush=True)
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> None:
    home = find_home(Path.cwd())
    login = credentials(options.host, os.environ)
    _check_port(options.mlflow_port, "--mlflow-port")
    _check_port(options.prefect_port, "--prefect-port")
    logs = home / ".cache" / "logs"
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        stores = start(_stores(options, home, logs))
        auth = auth_settings(login, stores.users, home) if login else {}
        address = home, options.host, options.mlflow_port
        mlflow = start(mlflow_artifact_server(*address, stores.mlflow, auth, logs / "mlflow.log"))
        prefect = start(prefect_server(options.prefect_port, stores.prefect, logs / "prefect.log"))
        start(_worker(prefect, mlflow, login, logs / "worker.log"))
        pages = prefect.removesuffix("/api")
        print(f"MLflow:  {mlflow}\nPrefect: {pages}\nLogs:    {logs}\nCtrl-C stops everything.", flush=True)
        _wait(logs)


def _check_port(port: int, option: str) -> None:
    if answers_at(port):
        raise RuntimeError(f"port {port} is taken. Stop the program that uses it, or set {option}.")


def credentials(host: str, environment: Mapping[str, str]) -> Login | None:
    """Return the login of MLflow's administrator; on loopback, None if the environment has no password.

    Raises ValueError if the server should listen beyond loopback and the environment has no password.
    """
    password = environment.get(PASSWORD)
    if not password and _is_loopback(host):
        return None
    if not password:
        raise ValueError(
            f"--host {host} is beyond loopback, where MLflow needs a password, and there is no default. Set "
            f"{PASSWORD} in the environment, and {USERNAME} if the name should not be admin."
        )
    return Login(environment.get(USERNAME) or "admin", password)


def _is_loopback(host: str) -> bool:
    """Return True for an address of loopback and for localhost, and False for every other name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def auth_settings(login: Login, users: str, home: Path) -> dict[str, str]:
    """Return the variables that make MLflow's server ask for a password.

    ``users`` is the URL of the database of its users.

    Raises RuntimeError if Flask-WTF, which MLflow needs for this, is missing.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise RuntimeError("MLflow needs Flask-WTF to ask for a password: `pip install medfocusclip[auth]`.")
    path = home / ".cache" / "mlflow-auth.ini"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_AUTH.format(users=users), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        USERNAME: login.name,
        PASSWORD: login.password,
        # Signs the forms of the pages. With a new key, a form opened before a restart must be reloaded.
        _SECRET_KEY: os.environ.get(_SECRET_KEY) or secrets.token_hex(32),
    }


@contextlib.contextmanager
def _stores(options: argparse.Namespace, home: Path, logs: Path) -> Iterator[Stores]:
    if options.sqlite:
        runs.create_database(home)
        yield Stores(f"sqlite:///{home / 'mlflow.db'}", f"sqlite:///{home / 'mlflow-users.db'}", None)
        return
    if importlib.util.find_spec("psycopg2") is None:
        raise RuntimeError("MLflow needs psycopg2 for PostgreSQL: `pip install medfocusclip[postgres]`.")
    folder = (options.database or home / ".postgres").resolve()
    names = ("mlflow", "mlflow_users", "prefect")
    with postgres(folder, names, logs / "postgres.log") as cluster:
        print(f"PostgreSQL: psql --host {cluster.socket} --username {ROLE} {names[0]}", flush=True)
        mlflow, users = (cluster.url(name, "psycopg2") for name in names[:2])
        yield Stores(mlflow, users, cluster.url(names[2], "asyncpg"))


@contextlib.contextmanager
def _worker(prefect: str, mlflow: str, login: Login | None, log: Path) -> Iterator[None]:
    """Register the deployments of prefect.yaml and run a worker of their pool."""
    name = f"up-{os.getpid()}"
    environment = {
        "PREFECT_API_URL": prefect,
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the flow's tasks retry too
    }
    if login is not None and "MLFLOW_TRACKING_USERNAME" not in os.environ:
        environment["MLFLOW_TRACKING_USERNAME"] = login.name
        environment["MLFLOW_TRACKING_PASSWORD"] = login.password
    command = [sys.executable, "-m", "flows.operations.worker", "--name", name]
    with running(
        command,
        environment,
        lambda: _is_online(prefect, name),
        "Prefect's worker does not start.",
        log=log,
        children_first=True,  # so that the runs can still record their end
    ):
        yield


def _is_online(prefect: str, worker: str) -> bool:
    request = urllib.request.Request(
        f"{prefect}/work_pools/{POOL}/workers/filter", b"{}", {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            workers = json.load(response)
    except OSError:  # the pool does not exist yet
        return False
    return any(each["name"] == worker and each["status"] == "ONLINE" for each in workers)


def _wait(logs: Path) -> None:
    """Wait for a signal; raise RuntimeError if one of the processes ends by itself."""
    children = psutil.Process().children()
    commands = {child.pid: " ".join(child.cmdline()[:4]) for child in children}
    while True:
        time.sleep(1)
        ended = commands.keys() - {child.pid for child in living(children)}
        if ended:
            names = ", ".join(commands[pid] for pid in sorted(ended))
            raise RuntimeError(f"a process ended by itself, so the others were stopped: {names}. See {logs}.")


if __name__ == "__main__":
    main()
