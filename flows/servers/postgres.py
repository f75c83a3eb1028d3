"""A private PostgreSQL cluster as a child process: in a folder, on a Unix socket, without a network port.

Only this account and root can enter the socket's folder, so the cluster needs no password.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.servers.processes import running

ROLE = "medfocus"
_PROGRAMS = ("initdb", "postgres", "pg_isready", "psql", "createdb")


@dataclass(frozen=True)
class Postgres:
    """A running cluster."""

    socket: Path  # the folder of its socket

    def url(self, database: str, driver: str) -> str:
        """Return the SQLAlchemy URL of a database, for ``psycopg2`` or ``asyncpg``."""
        return f"postgresql+{driver}://{ROLE}@/{database}?host={self.socket}"


@contextlib.contextmanager
def postgres(folder: Path, databases: Sequence[str], log: Path) -> Iterator[Postgres]:
    """Run the cluster in ``folder`` for the ``with`` block; create the cluster and databases if missing.

    PostgreSQL refuses to run as root. If this process runs as root, the cluster runs as the account
    ``postgres`` or, if there is no such account, as ``nobody``.

    Raises RuntimeError, with PostgreSQL's last output, if it does not start.
    """
    programs, account = find_programs(), _account()
    _own(folder, account)
    data = folder / "data"
    if not data.is_dir():
        _make(programs, data, account)
    # Not in ``folder``: a socket's path may have at most 107 bytes.
    socket = Path(tempfile.mkdtemp(prefix="medfocus-"))
    try:
        _own(socket, account)
        command = [
            *(str(programs / "postgres"), "-D", str(data), "-k", str(socket)),
            *("-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"),
        ]
        ready = [str(programs / "pg_isready"), "--quiet", "--host", str(socket)]
        with running(
            command,
            {},
            lambda: subprocess.run(ready, check=False).returncode == 0,
            f"PostgreSQL does not start on {data}.",
            log=log,
            user=account,
            stop_signal=signal.SIGINT,  # at SIGTERM it would wait until its clients disconnect
        ):
            for database in databases:
                _create(programs, socket, database)
            yield Postgres(socket)
    finally:
        shutil.rmtree(socket, ignore_errors=True)


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs: from PATH, or of the newest version from Debian.

    Raises FileNotFoundError, with the command that installs PostgreSQL, if there is none.
    """
    initdb = shutil.which("initdb")
    folder = Path(initdb).resolve().parent if initdb else Path()
    if all((folder / name).exists() for name in _PROGRAMS):
        return folder
    versions = {
        int(folder.parent.name): folder
        for folder in Path("/usr/lib/postgresql").glob("*/bin")
        if folder.parent.name.isdigit() and all((folder / name).exists() for name in _PROGRAMS)
    }
    if not versions:
        raise FileNotFoundError(
            "PostgreSQL's server is not installed: no initdb in PATH or in /usr/lib/postgresql/*/bin. "
            "Install it (Debian: `apt-get install postgresql`), or use SQLite by `make up SQLITE=1`."
        )
    return versions[max(versions)]


def _account() -> str | None:
    if os.geteuid() != 0:
        return None
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _own(folder: Path, account: str | None) -> None:
    """Create a folder that only the account may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if account is not None:
        shutil.chown(folder, account)


def _make(programs: Path, data: Path, account: str | None) -> None:
    """Create a new cluster under another name and rename it, so that it is never incomplete."""
    temporary = data.with_name("making")
    shutil.rmtree(temporary, ignore_errors=True)
    command = [
        *(str(programs / "initdb"), "--pgdata", str(temporary), "--username", ROLE, "--encoding", "UTF8"),
        *("--no-locale", "--auth-local", "trust", "--auth-host", "reject"),
    ]
    done = subprocess.run(command, user=account, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        access = "" if account is None else f" It runs as {account!r}, which needs access to {data.parent}."
        raise RuntimeError(f"initdb failed in {data}.{access} Its last output: {done.stderr[-1000:]}")
    temporary.rename(data)


def _create(programs: Path, socket: Path, database: str) -> None:
    """Create a database unless it exists."""
    login = ["--host", str(socket), "--username", ROLE]
    query = f"SELECT 1 FROM pg_database WHERE datname = '{database}'"
    psql = [str(programs / "psql"), "--no-psqlrc", *login, "--dbname", "postgres", "-Atc", query]
    if not subprocess.run(psql, capture_output=True, text=True, check=True).stdout.strip():
        subprocess.run([str(programs / "createdb"), *login, database], check=True)
