"""Prefect's server: the server that the environment names, a server on loopback, or a child process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from flows.servers.processes import HOST, answers, free_port, must_answer, server

PREFECT_PORT = 4200
POOL = "medfocus"  # the work pool of prefect.yaml


@contextlib.contextmanager
def prefect_server(
    port: int = PREFECT_PORT, database: str | None = None, log: Path | None = None
) -> Iterator[str]:
    """Run a Prefect server on loopback for the ``with`` block and yield its API address.

    A server that already answers at this port is used. ``database`` is a SQLAlchemy URL; without it, the
    database is a file in PREFECT_HOME.
    """
    api = f"http://{HOST}:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {"PREFECT_API_URL": api, "PREFECT_UI_API_URL": api}
    if database is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    with contextlib.ExitStack() as stack:
        # Importing prefect.settings here would fix the API address before the stack sets it.
        home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        home.mkdir(parents=True, exist_ok=True)
        # Two servers that migrate one new database at once break each other, so they start in turn.
        with FileLock(home / "server.lock"), whole_database(home):
            stack.enter_context(server(command, environment, f"{api}/health", "Prefect's server", log))
        yield api


@contextlib.contextmanager
def whole_database(home: Path) -> Iterator[None]:
    """Delete a partly created database, so that the server in the ``with`` block creates it again."""
    database, making = home / "prefect.db", home / "prefect.db.making"
    if making.exists():
        for part in home.glob("prefect.db*"):
            part.unlink()
    if not database.exists():
        making.touch()
    yield
    making.unlink(missing_ok=True)


@contextlib.contextmanager
def prefect_api() -> Iterator[None]:
    """Use the Prefect server that the environment names, or run a server on loopback for the ``with`` block.

    Prefect would start a server itself, but lose the last records when the process ends.

    Raises ConnectionError if the environment names a server that does not answer.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if address := PREFECT_API_URL.value():
        must_answer(f"{address}/health", "PREFECT_API_URL", "the run then starts a server on loopback")
        yield
        return
    port = PREFECT_PORT if prefect_answers() else free_port()
    with prefect_server(port) as api, temporary_settings({PREFECT_API_URL: api}):
        try:
            yield
        finally:  # otherwise Prefect would send the last records at exit, when the server is gone
            EventsWorker.drain_all(timeout=15)
            APILogWorker.drain_all(timeout=15)


def prefect_answers(port: int = PREFECT_PORT) -> bool:
    """Return whether a Prefect server runs on loopback."""
    return answers(f"http://{HOST}:{port}/api/health")
