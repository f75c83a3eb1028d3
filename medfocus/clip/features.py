"""Encode images as features. Threads make views while the model runs, and a cache keeps the features.

The cache has one folder of shards for each kind of feature (see ``medfocus.storage.shards``), with one entry
in NumPy's file format for each row. Two concurrent processes can at worst write the same rows twice.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from medfocus.storage.shards import Shards

Item = TypeVar("Item")


@dataclass(frozen=True)
class Kind:
    """One kind of features: its function and its name in the cache."""

    encode_batch: Callable[[Tensor], Tensor]  # views (B, S, S, C) uint8 -> (B, D), tokens, or any B rows
    settings: str  # the keys of the encoder and of the views, equal for all items
    dtype: torch.dtype = torch.float32  # of the result and of the cache


def encode(
    items: Sequence[Item],
    keys: Sequence[str],
    make_view: Callable[[Item], np.ndarray],
    encode_batch: Callable[[Tensor], Tensor],
    *,
    cache: str | Path | None,
    settings: str,
    batch_size: int,
    workers: int = 2,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Encode N items as features (N, ...) of one kind; see ``encode_together`` and ``Kind``."""
    (features,) = encode_together(
        items,
        keys,
        make_view,
        [Kind(encode_batch, settings, dtype)],
        cache=cache,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    return features


def encode_together(
    items: Sequence[Item],
    keys: Sequence[str],
    make_view: Callable[[Item], np.ndarray],
    kinds: Sequence[Kind],
    *,
    cache: str | Path | None,
    batch_size: int,
    workers: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> list[Tensor]:
    """Encode N items as features (N, ...) of every kind, on the CPU and in the order of the items.

    Each view is made once for all kinds, which encode it in the same batch.

    Args:
        items: Arguments of ``make_view``.
        keys: One key for each item, which identifies the content of its view (image, mask, crop). Items with
            equal keys are encoded once.
        make_view: Returns the view (S, S, C) uint8 of an item. It runs in ``workers`` threads.
        kinds: One or more.
        cache: A folder or fsspec URL that keeps rows between runs; None keeps nothing.
        batch_size: Views per forward pass. The last batch is padded to this size, because the last bits of a
            row can depend on the size of its batch, and must not depend on the content of the cache.
        workers: Threads that make views, one batch ahead of the model.
        progress: Called after every batch with the number of encoded items and N.

    Raises:
        ValueError: There are no items, not one key for each item, or features not finite in their ``dtype``.
        Anything that ``make_view`` raises; the cache keeps the features of earlier batches.
    """
    if not items or len(items) != len(keys):
        raise ValueError(
            f"features: {len(items)} items and {len(keys)} keys. Pass one key for each item, at least one."
        )
    places: dict[str, list[int]] = {}  # key -> indices of its rows
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    tables = [_Table(kind, places, len(items), cache) for kind in kinds]
    missing = [key for key in places if any(key in table.missing for table in tables)]
    done = len(items) - sum(len(places[key]) for key in missing)
    if progress:
        progress(done, len(items))
    try:
        # ``closing`` stops the threads if the model fails.
        firsts = [items[places[key][0]] for key in missing]
        with closing(_batches(firsts, make_view, batch_size, workers)) as batches:
            for first, views in batches:
                batch = missing[first : first + batch_size]
                for table in tables:
                    table.encode(batch, views)
                done += sum(len(places[key]) for key in batch)
                if progress:
                    progress(done, len(items))
    finally:
        for table in tables:
            table.close()
    return [table.result for table in tables]


def lacking(keys: Sequence[str], kinds: Sequence[Kind], cache: str | Path) -> list[bool]:
    """Return for each of N keys whether the cache lacks its row of at least one kind."""
    missing = set().union(*(_Table(kind, {key: [] for key in keys}, 0, cache).missing for kind in kinds))
    return [key in missing for key in keys]


class _Table:
    """The features of one kind, filled with the rows in the cache and then with the others by batch."""

    def __init__(
        self, kind: Kind, places: Mapping[str, list[int]], count: int, cache: str | Path | None
    ) -> None:
        self.kind = kind
        self.missing = set(places)  # keys without a row
        self._places = places
        self._count = count
        self._rows: Tensor | None = None  # (N, ...), created with the first row
        self._shards: Shards | None = None
        if cache:
            name = _hash(f"{kind.settings}\n{kind.dtype}")[:32]
            self._shards = _opened(f"{cache}/{name}", os.getpid())
            hashes = {_hash(key): key for key in places}
            for hash_, content in self._shards.read(hashes):
                self._place(hashes[hash_], _unpacked(content))

    @property
    def result(self) -> Tensor:
        """All features, (N, ...)."""
        assert self._rows is not None and not self.missing  # encode_together has at least one item
        return self._rows

    def encode(self, batch: Sequence[str], views: Tensor) -> None:
        """Encode views (B, S, S, C) uint8 and keep the missing rows of their keys (B)."""
        lacking = [i for i, key in enumerate(batch) if key in self.missing]
        if not lacking:
            return
        # Encode the whole batch; see ``batch_size``.
        rows = self.kind.encode_batch(views).detach().to("cpu", self.kind.dtype)[: len(batch)]  # (B, ...)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"features: the encoder returned values that are not finite in {self.kind.dtype}, for "
                f"{batch[0]} or the next {len(batch) - 1} items. Check its weights, or use torch.float32."
            )
        for i in lacking:
            self._place(batch[i], rows[i])
        if self._shards:
            self._shards.put((_hash(batch[i]), _packed(rows[i])) for i in lacking)

    def close(self) -> None:
        """Close the cache's shards."""
        if self._shards:
            self._shards.close()

    def _place(self, key: str, row: Tensor) -> None:
        if self._rows is None:
            self._rows = torch.empty((self._count, *row.shape), dtype=self.kind.dtype)
        self._rows[self._places[key]] = row
        self.missing.discard(key)


def _batches(
    items: Sequence[Item], make_view: Callable[[Item], np.ndarray], batch_size: int, workers: int
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield the first index and the views (B, S, S, C) uint8 of each batch; threads make the next views.

    Copies of the last view pad the last batch.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
    ahead: deque[Future[np.ndarray]] = deque()
    begun = 0
    try:
        for start in range(0, len(items), batch_size):
            stop = min(start + batch_size, len(items))
            views: list[np.ndarray] = []
            while start + len(views) < stop:
                while begun < min(start + len(views) + 1 + batch_size, len(items)):
                    ahead.append(pool.submit(make_view, items[begun]))
                    begun += 1
                views.append(ahead.popleft().result())
            yield start, torch.from_numpy(np.stack(views + views[-1:] * (batch_size - len(views))))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, make no further views


@lru_cache(maxsize=32)
def _opened(url: str, process: int) -> Shards:
    """Return a folder's shards, kept open for each ``process``, so that later calls read new entries only."""
    return Shards(url, suffix=".npy")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _packed(row: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, row.numpy(), allow_pickle=False)
    return file.getvalue()


def _unpacked(content: bytes) -> Tensor:
    """Invert ``_packed``. All rows of a kind have the same header, which is parsed once."""
    start = 10 + int.from_bytes(content[8:10], "little")  # magic, version and length of the header
    shape, dtype = _header(content[:start])
    return torch.from_numpy(np.frombuffer(content, dtype, offset=start).reshape(shape).copy())


@lru_cache(maxsize=64)
def _header(content: bytes) -> tuple[tuple[int, ...], np.dtype]:
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype
