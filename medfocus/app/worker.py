"""One thread for all heavy work, with a bounded queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Busy(Exception):
    """The queue is full."""


class Worker:
    """Runs jobs one after another, so that the server keeps answering and only one job needs memory."""

    def __init__(self, most: int) -> None:
        """Allow at most ``most`` jobs, running or waiting."""
        self._most = most
        self._jobs = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def do(self, work: Callable[[], Result]) -> Result:
        """Run a job and return its result, or raise its error. Raises Busy at once if the queue is full."""
        with self._lock:
            if self._jobs >= self._most:
                raise Busy
            self._jobs += 1
        job = self._thread.submit(work)
        job.add_done_callback(lambda _: self._done())
        return await asyncio.wrap_future(job)

    def stop(self) -> None:
        """Accept no more jobs, drop the waiting jobs, and wait for the running job."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self) -> None:
        with self._lock:
            self._jobs -= 1
