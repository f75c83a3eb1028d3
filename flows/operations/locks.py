"""Locks: one main job at a time on a study, one retraining or back-fill at a time on a checkout."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flows.study.study import Study
from medfocus.storage import atomic


class JobRunningError(RuntimeError):
    """Another process holds the lock of the study or of the checkout."""


def only_job(study: Study) -> contextlib.AbstractContextManager[None]:
    """Lock a study for one main job; the process that holds the lock may take it again.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises JobRunningError at once, naming the holder, if another process has the lock.
    """
    return _locked(study.paths.data, "job", f"{study.folder}: another main job")


def only_retraining(home: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a checkout for one retraining or back-fill of any study, as ``only_job`` locks a study."""
    return _locked(home / ".cache", "retraining", f"{home}: another retraining or back-fill")


@contextlib.contextmanager
def _locked(folder: Path, name: str, other: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f".{name}.json"
    lock = FileLock(folder / f".{name}.lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise JobRunningError(
            f"{other} is running: {_describe(holder)}. Wait until it ends, or stop it; its finished work is "
            "kept."
        ) from None
    try:
        if lock.lock_counter == 1:
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
            atomic.write(holder, json.dumps(facts | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        lock.release()


def _describe(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']} ({facts['command']})"
    except (OSError, ValueError, KeyError):  # the holder writes its file after it takes the lock
        return "it started a moment ago"
