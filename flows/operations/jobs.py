"""One main job at a time on a study, one retraining on a checkout, and what is said when one fails."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flows.study.study import Study
from medfocus.storage import atomic
from medfocus.storage.redaction import unredacted

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
_SAFE = "What was finished is kept: run the same command again."
_MOMENT = 0.1  # seconds
_LITTLE = 2**20  # bytes: a disk with less is called full
# Libraries hide the OSError of a disk: safetensors, SQLAlchemy, MLflow and joblib's workers keep its words.
_FULL = ("no space left", "disk is full", "disk quota exceeded")
_READ_ONLY = ("read-only file system", "readonly database", "permission denied")
_UNANSWERED = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError")


class JobRunningError(RuntimeError):
    """Another main job holds the study, or another retraining the checkout."""


def only_job(study: Study) -> contextlib.AbstractContextManager[None]:
    """Hold a study for one main job; the process that holds it may do so again inside.

    The lock is the operating system's: it goes with the process, however that ends.

    Raises JobRunningError, naming the holder, at once where another process has it.
    """
    return _held(study.paths.data, "job", f"{study.folder}: another main job")


def only_retraining(home: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a checkout, whichever its study, for one retraining or back-fill; otherwise as ``only_job``."""
    return _held(home / ".cache", "retraining", f"{home}: another retraining or back-fill")


@contextlib.contextmanager
def _held(folder: Path, name: str, another: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f".{name}.json"
    lock = FileLock(folder / f".{name}.lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise JobRunningError(f"{another} runs here, {_told(holder)}") from None
    try:
        if lock.lock_counter == 1:
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
            atomic.write(holder, json.dumps(facts | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        lock.release()


def _told(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        who = f"process {facts['pid']} on {facts['host']} since {facts['since']} ({facts['command']})"
    except (OSError, ValueError, KeyError):  # it has only just begun
        who = "begun this moment"
    return f"{who}. Wait for it, or end it: what it has finished is kept."


@contextlib.contextmanager
def faults_in_one_line() -> Iterator[None]:
    """Let a program end with what went wrong inside the block in one line, or at Ctrl-C with 130."""
    before, sys.unraisablehook = sys.unraisablehook, _insist
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not any(isinstance(cause, KeyboardInterrupt) for cause in _chain(unredacted(error))):
            sys.exit(f"medfocus: {explained(unredacted(error))}")
        # Or what a library made of it on its way here.
        print("\nmedfocus: interrupted. What was finished is kept.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(INTERRUPTED)  # all is told and closed; an interpreter takes seconds to take itself apart
    finally:
        sys.unraisablehook = before


def _insist(dropped: sys.UnraisableHookArgs) -> None:
    """Say Ctrl-C again where it came while memory was tidied up: Python drops what is raised there."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        again = threading.Timer(_MOMENT, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)


def explained(error: BaseException) -> str:
    """An error in one line; for a fault of a disk or a server with the place and what to do."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    told = f"{type(error).__name__}: {' '.join(f'{error}{notes}'.split())}"
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        text = str(cause).lower()
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in _FULL):
            return f"the disk is full: {_place(error)}. Free some. {_SAFE} ({told})"
        if number in (errno.EROFS, errno.EACCES) or any(words in text for words in _READ_ONLY):
            return f"nothing can be written: {_place(error)}. Make it writable. {_SAFE} ({told})"
        library = type(cause).__module__.partition(".")[0]
        if library == "httpx" and type(cause).__name__ in _UNANSWERED:
            return f"Prefect's server does not answer. Start it again. {_SAFE} ({told})"
        if library == "mlflow" and "max retries exceeded" in text:
            return f"MLflow's server does not answer. Start it again. {_SAFE} ({told})"
    return told


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _place(error: BaseException) -> str:
    """The file that could not be written or, where nothing says it, the folders that are full."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.filename:
            return str(Path(str(cause.filename)).absolute())
    here, prefect = Path.cwd(), Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    own = [here, *(here / name for name in (".cache", "data", "reports", ".dvc/cache", "mlruns"))]
    disks: dict[int, Path] = {}
    for place in (*own, prefect, Path(tempfile.gettempdir())):
        if place.exists():
            disks.setdefault(place.stat().st_dev, place)
    full = [place for place in disks.values() if shutil.disk_usage(place).free < _LITTLE]
    return " and ".join(map(str, full)) or str(here)
