"""MLflow in this process: a quiet import, the lock of a store, and the process that owns a run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil
from filelock import FileLock

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",  # mlflow ignores "1"
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def quieten() -> None:
    """Import MLflow without its telemetry, progress bars and information messages."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # the import sets the level of MLflow's loggers

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # This logger warns if pip is missing, but an environment of uv has no pip.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def lock(home: Path) -> FileLock:
    """Return the lock of a store. The thread that holds the lock may acquire it again."""
    return FileLock(home / "mlflow.lock", is_singleton=True)


def owner_tags() -> dict[str, str]:
    """Return tags that identify this process, for the runs that it owns."""
    return {
        "owner.host": socket.gethostname(),
        "owner.pid": str(os.getpid()),
        "owner.started": repr(psutil.Process().create_time()),
        "owner.born": _born(os.getpid()),
    }


def is_alive(owner: Mapping[str, str]) -> bool:
    """Return whether a run's owner still runs. Its process id may belong to another process by now."""
    try:
        process = psutil.Process(int(owner["owner.pid"]))
        if born := owner.get("owner.born"):
            same = born == _born(process.pid)
        else:  # on other systems: by the clock, which may have been corrected
            same = abs(process.create_time() - float(owner["owner.started"])) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _born(pid: int) -> str:
    """Return an identity that no other process of this host ever has: the boot's id and the start time.

    Return "" if the system is not Linux or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return ""
    return f"{boot} {ticks.split()[19]}"
