"""The images in memory: an image expires some time after its last use, and new images displace old images."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """An object that knows its memory."""

    @property
    def nbytes(self) -> int:
        """Return the size of the object in memory, in bytes."""
        ...


Item = TypeVar("Item", bound=Sized)


@dataclass
class _Entry(Generic[Item]):
    item: Item
    used: float  # seconds of the clock


class Desk(Generic[Item]):
    """A store of items by ids that nobody can guess. For one thread.

    Unlike a cache with a fixed time to live, the store counts time from the last use. It measures items
    again, because they grow while they are in use.
    """

    def __init__(
        self, *, most: int, most_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep at most ``most`` items of ``most_bytes`` in total, each for ``seconds`` after its last use.

        The newest item stays, however large it is.
        """
        self.most, self.most_bytes, self.seconds = most, most_bytes, seconds
        self._clock = clock
        self._entries: OrderedDict[str, _Entry[Item]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, item: Item) -> str:
        """Add an item and return its id, 128 random bits."""
        name = secrets.token_urlsafe(16)
        self._entries[name] = _Entry(item, self._clock())
        self.tidy()
        return name

    def get(self, name: str) -> Item | None:
        """Return the item with this id, or None if it expired, and restart its time."""
        self.tidy()
        entry = self._entries.get(name)
        if entry is None:
            return None
        entry.used = self._clock()
        self._entries.move_to_end(name)
        return entry.item

    def remove(self, name: str) -> bool:
        """Remove an item; return whether it was present."""
        return self._entries.pop(name, None) is not None

    def clear(self) -> None:
        """Remove all items."""
        self._entries.clear()

    def tidy(self) -> None:
        """Remove expired items, and the least recently used items beyond the limits."""
        while self._entries and self._is_expired(next(iter(self._entries.values()))):
            self._entries.popitem(last=False)
        while len(self._entries) > 1 and self._is_full():
            self._entries.popitem(last=False)

    def _is_expired(self, entry: _Entry[Item]) -> bool:
        return self._clock() - entry.used >= self.seconds

    def _is_full(self) -> bool:
        total = sum(entry.item.nbytes for entry in self._entries.values())
        return len(self._entries) > self.most or total > self.most_bytes
