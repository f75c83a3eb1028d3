"""Child processes that end with the process that started them, and checks of the servers' addresses."""

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

HOST = "127.0.0.1"
_PATIENCE = 20.0  # seconds that a process gets to end after the signal
_START_SECONDS = 300.0


def must_answer(url: str, setting: str, without: str, seconds: float = 10) -> None:
    """Raise ConnectionError if no server answers at ``url`` in time; an HTTP error counts as an answer.

    Args:
        url: The address.
        setting: The environment variable that names the address.
        without: The effect of unsetting the variable, as the end of the message.
        seconds: The time limit.
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
        f"{setting}: no server answers at {url} in {seconds:g} seconds ({reason}). Start the server, correct "
        f"the address, or unset {setting}: {without}."
    )


def free_port() -> int:
    """Return a port on loopback that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def answers_at(port: int) -> bool:
    """Return whether a program listens on this port on loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def answers(health: str) -> bool:
    """Return whether the server at this address reports that it is healthy."""
    try:
        with urllib.request.urlopen(health, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def server(
    command: list[str], environment: Mapping[str, str], health: str, name: str, log: Path | None
) -> Iterator[None]:
    """Run a server for the ``with`` block, unless a server already answers at ``health``.

    Raises RuntimeError as ``running`` does.
    """
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
    stop_signal: signal.Signals = signal.SIGTERM,
    children_first: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child process for the ``with`` block, then end it and all its descendants.

    Args:
        command: Program and arguments.
        environment: Variables added to those of this process.
        ready: Returns whether the process is ready for work.
        fault: The message of the error if the process does not become ready.
        log: The process's log file; without it, only an error shows the last output.
        user: The account of the process; only root may choose an account.
        stop_signal: The signal that asks the process to end.
        children_first: Whether the children of the process get SIGTERM before the process gets a signal.

    Raises RuntimeError if the process ends before it is ready or is not ready within five minutes.
    """
    with _log_file(log) as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd="/" if user else None,  # the account may have no access to the present folder
            stdin=subprocess.DEVNULL,
            stdout=output if log else subprocess.DEVNULL,
            stderr=output,
            user=user,
            group=None if user is None else _group(user),
            extra_groups=None if user is None else [],
            process_group=0,  # Ctrl-C reaches only this process, which then ends its children in order
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            if not _becomes_ready(ready, process):
                output.seek(0)
                last_output = output.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{fault} Its last output: {last_output}")
            yield process
        finally:
            _end(process, stop_signal, children_first)


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that still run; zombies do not count."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _log_file(path: Path | None) -> BinaryIO:
    if path is None:  # an unread pipe would fill up and block the process
        return tempfile.TemporaryFile()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def _group(user: str) -> int:
    import pwd  # not on Windows

    return pwd.getpwnam(user).pw_gid


def _becomes_ready(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return True
        time.sleep(0.3)
    return False


def _end(process: subprocess.Popen[bytes], stop_signal: signal.Signals, children_first: bool) -> None:
    """End a process and all descendants that outlive it."""
    if children_first:
        _terminate(_descendants(process))
    descendants = _descendants(process)
    process.send_signal(stop_signal)
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _terminate(descendants)


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _terminate(processes: Iterable[psutil.Process]) -> None:
    """Ask processes to end; kill them if they have not ended after ``_PATIENCE`` seconds."""
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


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
