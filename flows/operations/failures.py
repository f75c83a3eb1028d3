"""Failures of a program in one line: the error and, for a disk or a server, the place and the fix."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from medfocus.storage.redaction import unredacted

EXIT_INTERRUPTED = 130  # as in shells: 128 + SIGINT
INTERRUPTED = "interrupted. Finished work is kept."
_RERUN = "Finished work is kept; run the same command again."
_REPEAT_AFTER = 0.1  # seconds
_FULL_BELOW = 2**20  # free bytes: a disk with less counts as full
# safetensors, SQLAlchemy, MLflow and joblib's workers hide the disk's OSError but keep its words.
_FULL = ("no space left", "disk is full", "disk quota exceeded")
_READ_ONLY = ("read-only file system", "readonly database", "permission denied")
_UNANSWERED = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError")


@contextlib.contextmanager
def faults_in_one_line() -> Iterator[None]:
    """End the program with one line if the block fails, and with exit code 130 at Ctrl-C."""
    before, sys.unraisablehook = sys.unraisablehook, _repeat_interrupt
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not any(isinstance(cause, KeyboardInterrupt) for cause in causes(unredacted(error))):
            sys.exit(f"medfocus: {explained(unredacted(error))}")
        print(f"\nmedfocus: {INTERRUPTED}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(EXIT_INTERRUPTED)  # everything is closed; the interpreter's own shutdown takes seconds
    finally:
        sys.unraisablehook = before


def _repeat_interrupt(dropped: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again if it came in a finalizer, because Python drops exceptions that are raised there."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        again = threading.Timer(_REPEAT_AFTER, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)


def explained(error: BaseException) -> str:
    """Return an error as one line; for a fault of a disk or a server, with its place and the fix."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    line = f"{type(error).__name__}: {' '.join(f'{error}{notes}'.split())}"
    for cause in causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        text = str(cause).lower()
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in _FULL):
            return f"the disk is full: {_place(error)}. Free some space. {_RERUN} ({line})"
        if number in (errno.EROFS, errno.EACCES) or any(words in text for words in _READ_ONLY):
            return f"no permission to write: {_place(error)}. Make it writable. {_RERUN} ({line})"
        library = type(cause).__module__.partition(".")[0]
        if library == "httpx" and type(cause).__name__ in _UNANSWERED:
            return f"Prefect's server does not answer. Start it again. {_RERUN} ({line})"
        if library == "mlflow" and "max retries exceeded" in text:
            return f"MLflow's server does not answer. Start it again. {_RERUN} ({line})"
    return line


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes and contexts."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _place(error: BaseException) -> str:
    """Return the file that could not be written or, if no error names it, the folders on full disks."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.filename:
            return str(Path(str(cause.filename)).absolute())
    here, prefect = Path.cwd(), Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    project = [here, *(here / name for name in (".cache", "data", "reports", ".dvc/cache", "mlruns"))]
    disks: dict[int, Path] = {}
    for folder in (*project, prefect, Path(tempfile.gettempdir())):
        if folder.exists():
            disks.setdefault(folder.stat().st_dev, folder)
    full = [folder for folder in disks.values() if shutil.disk_usage(folder).free < _FULL_BELOW]
    return " and ".join(map(str, full)) or str(here)
