"""Pictures become features: views are made in threads while the model runs, and no view is encoded twice.

The cache has one folder for each kind of feature and shards in it, safetensors files that are only ever
added: "keys" (n, 32) uint8, the sha256 of each key, and "rows" (n, ...). A shard appears whole or not at
all, so a killed run loses what was not yet written, and two processes at once can at worst write the same
rows twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FLUSH_SECONDS = 5.0  # a killed run loses no more than this
FLUSH_BYTES = 64 * 2**20  # and no more than this waits in memory

Item = TypeVar("Item")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One kind of features: what makes them of views, and what names them in the cache."""

    encode_batch: Callable[[Tensor], Tensor]  # views (B, S, S, C) uint8 -> (B, D), tokens, or any B rows
    settings: str  # what all items share: the encoder, the part of it, the view's settings
    dtype: torch.dtype = torch.float32  # of the result and of the cache


def encode(
    items: Sequence[Item],
    keys: Sequence[str],
    make_view: Callable[[Item], np.ndarray],
    encode_batch: Callable[[Tensor], Tensor],
    *,
    cache: Path | None,
    settings: str,
    batch_size: int,
    workers: int = 2,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Items (N) -> features (N, ...) of one kind; see ``encode_together`` and ``Kind``."""
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
    cache: Path | None,
    batch_size: int,
    workers: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> list[Tensor]:
    """Items (N) -> features (N, ...) of every kind on the CPU, in the items' order, whether cached or not.

    A view is made once for all kinds that lack it, and they get it in the same batch, one after the other.

    Args:
        items: Whatever ``make_view`` turns into a view; called in ``workers`` threads.
        keys: One for each item, naming its view's content (picture, mask, crop). Equal keys are encoded once.
        make_view: Item -> view (S, S, C) uint8; reads and decodes, focuses, letterboxes.
        kinds: One or more.
        cache: Folder that keeps rows between runs; None keeps nothing.
        batch_size: Views a forward pass.
        workers: Threads that make views, one batch ahead of the model.
        progress: Called with the number of items done and N after every batch.

    Raises:
        ValueError: No items, another number of keys, or features that are not finite in their ``dtype``.
        Anything that ``make_view`` raises; what was encoded before stays in the cache.
    """
    if not items or len(items) != len(keys):
        raise ValueError(
            f"features: {len(items)} items and {len(keys)} keys; give at least one, and one key each."
        )
    places: dict[str, list[int]] = {}  # key -> where its row goes
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    tables = [_Table(kind, places, len(items), cache) for kind in kinds]
    missing = [key for key in places if any(key in table.missing for table in tables)]
    done = len(items) - sum(len(places[key]) for key in missing)
    if progress:
        progress(done, len(items))
    try:
        # Closed also when the model fails: its threads would make views that nobody takes.
        firsts = [items[places[key][0]] for key in missing]
        with closing(_batches(firsts, make_view, batch_size, workers)) as batches:
            for first, views in batches:
                batch = missing[first : first + len(views)]
                for table in tables:
                    table.encode(batch, views)
                done += sum(len(places[key]) for key in batch)
                if progress:
                    progress(done, len(items))
    finally:
        for table in tables:
            table.close()
    return [table.result for table in tables]


class _Table:
    """The features of one kind as they come together: the cached ones at once, the others batch by batch."""

    def __init__(self, kind: Kind, places: Mapping[str, list[int]], count: int, cache: Path | None) -> None:
        self.kind = kind
        self.missing = set(places)  # keys without a row
        self._places = places
        self._count = count
        self._rows: Tensor | None = None  # (N, ...), made with the first row
        self._shards = Shards(cache / _name(kind.settings, str(kind.dtype))) if cache else None
        if self._shards:
            for key, row in self._shards.read(list(places)):
                self._place(key, row)

    @property
    def result(self) -> Tensor:
        """(N, ...)"""
        assert self._rows is not None and not self.missing  # there is at least one item
        return self._rows

    def encode(self, batch: Sequence[str], views: Tensor) -> None:
        """Fill in what is missing of a batch of keys (B), of their views (B, S, S, C) uint8."""
        lacking = [i for i, key in enumerate(batch) if key in self.missing]
        if not lacking:
            return
        # The whole batch goes through: the last bits of a row can depend on those beside it.
        rows = self.kind.encode_batch(views).detach().to("cpu", self.kind.dtype)  # (B, ...)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"features: the encoder gave values that are not finite in {self.kind.dtype}, for {batch[0]} "
                f"or the {len(batch) - 1} after it. Check its weights, or use torch.float32."
            )
        for i in lacking:
            self._place(batch[i], rows[i])
        if self._shards:
            self._shards.add([batch[i] for i in lacking], rows[lacking])

    def close(self) -> None:
        """Have the cache keep what it was given."""
        if self._shards:
            self._shards.flush()

    def _place(self, key: str, row: Tensor) -> None:
        if self._rows is None:
            self._rows = torch.empty((self._count, *row.shape), dtype=self.kind.dtype)
        self._rows[self._places[key]] = row
        self.missing.discard(key)


def _batches(
    items: Sequence[Item], make_view: Callable[[Item], np.ndarray], batch_size: int, workers: int
) -> Generator[tuple[int, Tensor], None, None]:
    """Where a batch starts and its views (B, S, S, 3) uint8; those of the next batch are made meanwhile."""
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
            yield start, torch.from_numpy(np.stack(views))
    finally:
        pool.shutdown(
            cancel_futures=True
        )  # after an error or an interrupt the views not yet begun are not made


@dataclass
class Shards:
    """One folder of the cache; see the head of this file."""

    folder: Path
    _keys: list[str] = field(default_factory=list, init=False)  # not yet written
    _rows: list[Tensor] = field(default_factory=list, init=False)
    _written: float = field(default_factory=time.monotonic, init=False)

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Those of ``keys`` that are here, each once and with its row; a damaged shard is removed."""
        wanted = {_hash(key): key for key in keys}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not wanted:
                return
            try:
                with safe_open(path, "pt") as file:
                    hashes = file.get_tensor("keys").numpy()  # (n, 32)
                    hits = [i for i, name in enumerate(map(bytes, hashes)) if name in wanted]
                    if not hits:
                        continue
                    rows = file.get_tensor("rows")  # (n, ...)
                    if _checksum(hashes, rows) != file.metadata()["crc32"]:
                        raise ValueError("its checksum is another")
            except FileNotFoundError:
                continue  # another process found it damaged
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is damaged (%s): its features are computed again.", path, error)
                path.unlink(missing_ok=True)
                continue
            for i in hits:
                if key := wanted.pop(bytes(hashes[i]), None):
                    yield key, rows[i]

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Take rows (n, ...) for ``keys``; now and then write what was taken."""
        self._keys.extend(keys)
        self._rows.append(rows)
        waiting = sum(part.nbytes for part in self._rows)
        if time.monotonic() - self._written >= FLUSH_SECONDS or waiting >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was taken and not yet written, as one shard; all of it or nothing appears."""
        if self._keys:
            hashes = np.frombuffer(b"".join(map(_hash, self._keys)), dtype=np.uint8).reshape(-1, 32)
            rows = torch.cat(self._rows)
            path = self.folder / f"{_name(*self._keys)}.safetensors"
            unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {"keys": torch.from_numpy(hashes.copy()), "rows": rows}
            save_file(tensors, unfinished, metadata={"crc32": _checksum(hashes, rows)})
            os.replace(unfinished, path)
        self._keys, self._rows = [], []
        self._written = time.monotonic()


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name(*keys: str) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]


def _checksum(hashes: np.ndarray, rows: Tensor) -> str:
    content = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{zlib.crc32(content, zlib.crc32(np.ascontiguousarray(hashes).data)):08x}"
