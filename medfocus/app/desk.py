"""The images at hand, in memory alone: the oldest make room, and none stays longer than it is looked at."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What is kept."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        ...


Kept = TypeVar("Kept", bound=Sized)


@dataclass
class _Place(Generic[Kept]):
    kept: Kept
    used: float  # seconds of the clock


class Desk(Generic[Kept]):
    """Images by ids that nobody can guess. For one thread."""

    def __init__(
        self, *, most: int, most_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep ``most`` at most, of ``most_bytes`` together, each for ``seconds`` after its last use.

        The newest is kept whatever it weighs.
        """
        self.most, self.most_bytes, self.seconds = most, most_bytes, seconds
        self._clock = clock
        self._places: OrderedDict[str, _Place[Kept]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._places)

    def put(self, kept: Kept) -> str:
        """Keep one more; its id, 128 random bits."""
        name = secrets.token_urlsafe(16)
        self._places[name] = _Place(kept, self._clock())
        self.tidy()
        return name

    def get(self, name: str) -> Kept | None:
        """What has this id, if it is still there; its time begins anew."""
        self.tidy()
        place = self._places.get(name)
        if place is None:
            return None
        place.used = self._clock()
        self._places.move_to_end(name)
        return place.kept

    def remove(self, name: str) -> bool:
        """Forget one; whether it was there."""
        return self._places.pop(name, None) is not None

    def clear(self) -> None:
        """Forget all."""
        self._places.clear()

    def tidy(self) -> None:
        """Forget what is over time, and the least recently used beyond the limits."""
        while self._places and self._is_over(next(iter(self._places.values()))):
            self._places.popitem(last=False)
        while len(self._places) > 1 and self._is_full():
            self._places.popitem(last=False)

    def _is_over(self, place: _Place[Kept]) -> bool:
        return self._clock() - place.used >= self.seconds

    def _is_full(self) -> bool:
        held = sum(place.kept.nbytes for place in self._places.values())
        return len(self._places) > self.most or held > self.most_bytes
