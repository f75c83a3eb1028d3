"""Retraining as an operation on one machine: databases, MLflow, Prefect, a worker and the schedule.

Everything is a child process of this one and ends with it, in reverse order. Prefect's server has whoever
reaches it run code here, so it listens on loopback alone; MLflow may listen elsewhere, and then asks for a
password.
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

from flows.servers.postgres import ROLE, postgres
from flows.servers.servers import (
    HOST,
    MLFLOW_PORT,
    POOL,
    PREFECT_PORT,
    answers_at,
    living,
    mlflow_keeper,
    prefect_server,
    running,
)
from flows.study.study import find_home
from medfocus.tracking import runs

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # MLflow's own names
NAME = "MLFLOW_AUTH_ADMIN_USERNAME"
_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"
_AUTH = """[mlflow]
default_permission = READ
database_uri = {users}
# A password is hashed slowly on purpose, and one model is a hundred requests. One process serves them all, so
# nothing in its memory is stale.
auth_cache_ttl_seconds = 60
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Login:
    """Who MLflow's server lets in."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Stores:
    """The SQLAlchemy URLs of the three databases."""

    mlflow: str
    users: str  # of MLflow
    prefect: str | None  # None: Prefect's own file in PREFECT_HOME


def main(arguments: Sequence[str] | None = None) -> None:
    """Start it all, say where it is, and wait for Ctrl-C, SIGTERM or the end of one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default=HOST, help="address of MLflow's pages; beyond loopback by password")
    parser.add_argument("--mlflow-port", type=int, default=MLFLOW_PORT)
    parser.add_argument("--prefect-port", type=int, default=PREFECT_PORT)
    parser.add_argument("--sqlite", action="store_true", help="SQLite files instead of PostgreSQL")
    parser.add_argument("--database", type=Path, help="folder of PostgreSQL's data; .postgres without it")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_once)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        sys.exit(f"up: {error}")


def _stop_once(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # the way down is not to be cut short
    print("Stopping: worker, Prefect, MLflow, databases.", flush=True)
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> None:
    home = find_home(Path.cwd())
    login = credentials(options.host, os.environ)
    for option in ("mlflow_port", "prefect_port"):
        port = getattr(options, option)
        if answers_at(port):
            told = f"--{option.replace('_', '-')}"
            raise RuntimeError(f"port {port} is taken. Stop what listens there, or give another {told}.")
    logs = home / ".cache" / "logs"
    with contextlib.ExitStack() as stack:
        stores = stack.enter_context(_stores(options, home, logs))
        mlflow = stack.enter_context(
            mlflow_keeper(
                home,
                options.host,
                options.mlflow_port,
                stores.mlflow,
                guard(login, stores.users, home) if login else {},
                logs / "mlflow.log",
            )
        )
        prefect = stack.enter_context(
            prefect_server(options.prefect_port, stores.prefect, logs / "prefect.log")
        )
        stack.enter_context(_worker(prefect, mlflow, login, logs / "worker.log"))
        page = prefect.removesuffix("/api")
        print(f"MLflow:  {mlflow}\nPrefect: {page}\nLogs:    {logs}\nCtrl-C ends it all.", flush=True)
        _wait(logs)


def credentials(host: str, environment: Mapping[str, str]) -> Login | None:
    """Name and password of MLflow's administrator; None where none is given, which does on loopback alone.

    Raises ValueError where the server is to listen beyond loopback and no password is given.
    """
    password = environment.get(PASSWORD)
    if not password and (host == "localhost" or ipaddress.ip_address(host).is_loopback):
        return None
    if not password:
        raise ValueError(
            f"--host {host} is beyond loopback, where MLflow asks for a password, and there is no default "
            f"one. Set {PASSWORD} in the environment (and {NAME}, or it is admin)."
        )
    return Login(environment.get(NAME) or "admin", password)


def guard(login: Login, users: str, home: Path) -> dict[str, str]:
    """The environment in which MLflow's server asks for a password; its users are kept at the URL ``users``.

    Raises RuntimeError where Flask-WTF is missing, which it needs for that.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise RuntimeError("MLflow needs Flask-WTF to ask for a password: `pip install medfocusclip[auth]`.")
    path = home / ".cache" / "mlflow-auth.ini"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_AUTH.format(users=users), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        NAME: login.name,
        PASSWORD: login.password,
        # Signs the forms of the pages; a form that was opened before a restart is to be opened again.
        _KEY: os.environ.get(_KEY) or secrets.token_hex(32),
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
    """The deployments of prefect.yaml, and a worker of their pool."""
    name = f"up-{os.getpid()}"
    environment = {
        "PREFECT_API_URL": prefect,
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the tasks of the flow try again by themselves
    }
    if login is not None and "MLFLOW_TRACKING_USERNAME" not in os.environ:
        environment["MLFLOW_TRACKING_USERNAME"] = login.name
        environment["MLFLOW_TRACKING_PASSWORD"] = login.password
    command = [sys.executable, "-m", "flows.operations.worker", "--name", name]
    fault = "Prefect's worker does not come up."
    # The runs are asked to end before the worker is: then they still say how they ended.
    with running(command, environment, lambda: _is_online(prefect, name), fault, log=log, from_below=True):
        yield


def _is_online(prefect: str, worker: str) -> bool:
    request = urllib.request.Request(
        f"{prefect}/work_pools/{POOL}/workers/filter", b"{}", {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            workers = json.load(response)
    except OSError:  # no such pool yet
        return False
    return any(each["name"] == worker and each["status"] == "ONLINE" for each in workers)


def _wait(logs: Path) -> None:
    """Until a signal comes, or one of the processes ends by itself: then RuntimeError, so that it shows."""
    children = psutil.Process().children()
    commands = {child.pid: " ".join(child.cmdline()[:4]) for child in children}
    while True:
        time.sleep(1)
        lost = {child.pid for child in children} - {child.pid for child in living(children)}
        if lost:
            told = ", ".join(commands[pid] for pid in sorted(lost))
            raise RuntimeError(f"ended by itself, so all the rest was stopped: {told}. See {logs}.")


if __name__ == "__main__":
    main()
