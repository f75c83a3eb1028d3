"""One retraining at a time in a checkout, whoever started it: a deployment, a worker, a person."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class NotAloneError(RuntimeError):
    """Another retraining or back-fill works in this checkout."""


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the checkout for the ``with`` block. The system gives it back when the process is killed.

    Raises NotAloneError at once where it is held.
    """
    path = home / ".cache" / "retrain.lock"
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise NotAloneError(
            f"{home}: another retraining or back-fill works here. Start this one again when it is over."
        ) from None
    try:
        yield
    finally:
        lock.release()
