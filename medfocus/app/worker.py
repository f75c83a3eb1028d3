"""One thread for everything heavy, and a queue that ends somewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")


class Busy(Exception):
    """The queue is full."""


class Worker:
    """Runs jobs one after the other, so that the page answers meanwhile and the memory is that of one job."""

    def __init__(self, most: int) -> None:
        """At most ``most`` jobs run or wait."""
        self._most = most
        self._jobs = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    async def do(self, work: Callable[[], Made]) -> Made:
        """The job's result, or its error. Raises Busy, at once, where the queue is full."""
        with self._lock:
            if self._jobs >= self._most:
                raise Busy
            self._jobs += 1
        job = self._thread.submit(work)
        job.add_done_callback(lambda _: self._done())
        return await asyncio.wrap_future(job)

    def stop(self) -> None:
        """Take no more jobs; those that wait are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self) -> None:
        with self._lock:
            self._jobs -= 1
