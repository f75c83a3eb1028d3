"""A private PostgreSQL cluster as a child process: in a folder, on a Unix socket, without a network port.

Nobody but this account (and root) gets into the socket's folder, so no password is needed and none is kept.
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

from flows.servers.servers import running

ROLE = "medfocus"
_PROGRAMS = ("initdb", "postgres", "pg_isready", "psql", "createdb")


@dataclass(frozen=True)
class Postgres:
    """A running cluster."""

    socket: Path  # the folder of its socket

    def url(self, database: str, driver: str) -> str:
        """The SQLAlchemy URL of a database, for ``psycopg2`` or ``asyncpg``."""
        return f"postgresql+{driver}://{ROLE}@/{database}?host={self.socket}"


@contextlib.contextmanager
def postgres(folder: Path, databases: Sequence[str], log: Path) -> Iterator[Postgres]:
    """The cluster in ``folder`` for the ``with`` block, made where there is none, with these databases.

    PostgreSQL refuses to run as root: started by root, it runs as the account ``postgres``, or ``nobody``.

    Raises RuntimeError, with PostgreSQL's own words, where it does not come up.
    """
    programs, account = find_programs(), _account()
    _own(folder, account)
    data = folder / "data"
    if not data.is_dir():
        _make(programs, data, account)
    socket = Path(
        tempfile.mkdtemp(prefix="medfocus-")
    )  # a socket's path may have 107 bytes: not in ``folder``
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
            f"PostgreSQL does not come up on {data}.",
            log=log,
            user=account,
            ask=signal.SIGINT,  # it ends its connections; at SIGTERM it would wait for them
        ):
            for database in databases:
                _create(programs, socket, database)
            yield Postgres(socket)
    finally:
        shutil.rmtree(socket, ignore_errors=True)


def find_programs() -> Path:
    """The folder of initdb, postgres and its clients: of the path, or the newest of Debian's.

    Raises FileNotFoundError, saying how to install it, where there is none.
    """
    found = shutil.which("initdb")
    beside = Path(found).resolve().parent if found else Path()
    if all((beside / name).exists() for name in _PROGRAMS):
        return beside
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
    """Make a folder that only the account may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if account is not None:
        shutil.chown(folder, account)


def _make(programs: Path, data: Path, account: str | None) -> None:
    """A new cluster, made beside and moved in: a killed start leaves nothing half made."""
    beside = data.with_name("making")
    shutil.rmtree(beside, ignore_errors=True)
    command = [
        *(str(programs / "initdb"), "--pgdata", str(beside), "--username", ROLE, "--encoding", "UTF8"),
        *("--no-locale", "--auth-local", "trust", "--auth-host", "reject"),
    ]
    made = subprocess.run(command, user=account, cwd="/", capture_output=True, text=True, check=False)
    if made.returncode != 0:
        whose = "" if account is None else f" It runs as {account!r}, who must be let into {data.parent}."
        raise RuntimeError(f"initdb made no cluster in {data}.{whose} It said: {made.stderr[-1000:]}")
    beside.rename(data)


def _create(programs: Path, socket: Path, database: str) -> None:
    """Create a database where there is none of this name."""
    ask = [str(programs / "psql"), "--no-psqlrc", "--host", str(socket), "--username", ROLE, "--dbname"]
    query = f"SELECT 1 FROM pg_database WHERE datname = '{database}'"
    found = subprocess.run(
        [*ask, "postgres", "-Atc", query], capture_output=True, text=True, check=True
    ).stdout
    if not found.strip():
        made = [str(programs / "createdb"), "--host", str(socket), "--username", ROLE, database]
        subprocess.run(made, check=True)
