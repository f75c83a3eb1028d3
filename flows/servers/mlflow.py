"""MLflow's server as a child process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.servers.processes import HOST, server

MLFLOW_PORT = 5000


@contextlib.contextmanager
def mlflow_server(home: Path, port: int = MLFLOW_PORT) -> Iterator[str]:
    """Run MLflow's server on loopback with the project's own database; yield the server's address."""
    options = ["--default-artifact-root", (home / "mlruns").as_uri()]
    with _mlflow(HOST, port, f"sqlite:///{home / 'mlflow.db'}", options, {}, None):
        yield f"http://{HOST}:{port}"


@contextlib.contextmanager
def mlflow_artifact_server(
    home: Path, host: str, port: int, store: str, environment: Mapping[str, str], log: Path
) -> Iterator[str]:
    """Run MLflow's server with a database, and serve the artifacts too; yield the server's local address.

    Args:
        home: The project; its folder ``mlruns`` holds the artifacts.
        host: The address on which the server listens.
        port: The port.
        store: SQLAlchemy URL of the database.
        environment: Variables for the server. With MLFLOW_AUTH_CONFIG_PATH, the server asks for a password.
        log: The server's log file.
    """
    options = ["--serve-artifacts", "--artifacts-destination", (home / "mlruns").as_uri()]
    if "MLFLOW_AUTH_CONFIG_PATH" in environment:
        options += ["--app-name", "basic-auth"]
    with _mlflow(host, port, store, options, environment, log):
        yield f"http://{_local(host)}:{port}"


def _mlflow(
    host: str, port: int, store: str, options: list[str], environment: Mapping[str, str], log: Path | None
) -> contextlib.AbstractContextManager[None]:
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", store, *options),
    ]
    few_processes = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # 2 processes instead of 16
    health = f"http://{_local(host)}:{port}/health"
    return server(command, {**few_processes, **environment}, health, "MLflow's server", log)


def _local(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return HOST
    return f"[{host}]" if ":" in host else host
