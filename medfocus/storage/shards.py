"""A cache of small entries in few files, in a folder or on shared storage: key -> bytes.

A shard is a plain zip file, stored without compression, that is written once and never changed: it appears
whole or not at all. What a process puts is written about every half second as a small shard of its own; it
unites its small ones now and then, and removes them only when the united one is there. So a killed process
loses half a second, threads, processes and machines may write at once, and a reader that finds a shard gone
looks again. The folder is any URL that fsspec knows (``file``, ``s3``, ...): nothing in it is appended to or
locked, which an object store could not do.

A process reads the directories of the shards once, later only of new ones, and then knows where every entry
lies: a lookup is one of a dictionary, a read one range of one file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
import uuid
import zipfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import merge_offset_ranges

FLUSH_SECONDS = 0.5  # a killed process loses what it put in so long
FLUSH_BYTES = 32 * 2**20  # and no more than this waits in memory
SHARD_BYTES = 32 * 2**20  # from which on a shard is left alone
SHARD_ENTRIES = 2_000  # or from so many on: its directory is read whole
PIECES = 100  # small shards of one process before it unites them
LOOK_SECONDS = 1.0  # after so long a missing entry is looked for among what others have written since

_GAP, _BLOCK = 64 * 2**10, 8 * 2**20  # entries nearer than a gap are read together, in blocks of no more
_SHARD_BITS = 32  # of a place, which is one number to be small in memory: the shard's, then the entry's
_ENTRY = (1 << _SHARD_BITS) - 1
_OBJECT_STORES = {"s3", "gs", "abfs"}  # without folders; to "make" one could make a bucket of a misspelt name
_TRIES = 10  # to read what others keep uniting with other shards
_DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError)  # as zipfile says it
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Directory:
    """Where the entries of one shard lie."""

    path: str
    starts: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    checksums: array[int] = field(default_factory=lambda: array("I"))  # crc32 of the content


class Shards:
    """A folder of shards. Keys are hex digests; entries of equal keys are equal. Threads may share one."""

    def __init__(self, url: str | Path, suffix: str = "") -> None:
        """``url`` is a path or what fsspec knows, made when first written to; names end in ``suffix``."""
        # Listings are asked for when they matter, so that none may be an old one.
        self._files: Any
        self._files, self._folder = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
        protocols = (
            {self._files.protocol} if isinstance(self._files.protocol, str) else {*self._files.protocol}
        )
        self._has_buckets = bool(protocols & _OBJECT_STORES)
        self._suffix = suffix
        self._shards: list[_Directory] = []
        self._known: set[str] = set()  # paths of shards that were read
        self._places: dict[bytes, int] = {}  # key -> shard << _SHARD_BITS | entry
        self._waiting: dict[str, bytes] = {}  # put and not yet written
        self._own: dict[str, int] = {}  # path -> bytes of the small shards that this object wrote
        self._written = self._looked = float("-inf")
        self._lock = threading.RLock()

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Those of ``keys`` that are here, each once and with its content, in the order of the shards.

        A damaged entry is reported and left out, so that it is made and put again.
        """
        wanted = {bytes.fromhex(key): key for key in keys}
        for _ in range(_TRIES):
            with self._lock:
                waiting = {name: self._waiting[key] for name, key in wanted.items() if key in self._waiting}
                if any(name not in self._places and name not in waiting for name in wanted):
                    self._look()
                placed = sorted((self._places[name], name) for name in wanted if name in self._places)
            for name, content in waiting.items():
                yield wanted.pop(name), content
            moved = False
            for number, group in groupby(placed, key=lambda one: one[0] >> _SHARD_BITS):
                members = [(place & _ENTRY, name) for place, name in group if name in wanted]
                shard = self._shards[number]
                try:
                    found = self._read_from(shard, members)
                except FileNotFoundError:  # united with others by its writer, or cleared away
                    with self._lock:
                        self._forget(shard.path)
                        self._looked = float("-inf")
                    moved = True
                    continue
                for name, content in found:
                    yield wanted.pop(name), content
            if not moved:
                return

    def put(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Take entries; see the head of this file for when they are written. ``close`` ends it."""
        with self._lock:
            self._waiting.update(entries)
            size = sum(map(len, self._waiting.values()))
            if time.monotonic() - self._written >= FLUSH_SECONDS or size >= FLUSH_BYTES:
                self._flush()

    def close(self) -> None:
        """Write what waits and unite what was written. More may be read and put after."""
        with self._lock:
            self._flush()
            if len(self._own) > 1:
                self._unite()
            self._own.clear()

    def _flush(self) -> None:
        if self._waiting:
            path, size = self._write(self._waiting)
            self._waiting.clear()
            if size < SHARD_BYTES:
                self._own[path] = size
        self._written = time.monotonic()
        if len(self._own) >= PIECES or sum(self._own.values()) >= SHARD_BYTES:
            self._unite()

    def _unite(self) -> None:
        small, self._own = list(self._own), {}
        self._own = self._rewrite(small)

    def _rewrite(self, paths: Sequence[str]) -> dict[str, int]:
        """Write the sound entries of shards to others, then remove the shards; the last, which is not full.

        In between an entry is in both, which does no harm.
        """
        content: dict[str, bytes] = {}
        last: dict[str, int] = {}
        size = 0
        for path in paths:
            for key, data in self._sound(path):
                content[key] = data
                size += len(data)
                if size >= SHARD_BYTES or len(content) >= SHARD_ENTRIES:
                    self._write(content)
                    content, size = {}, 0
        if content:
            last = dict([self._write(content)])
        for path in paths:
            self._remove(path)
        return last

    def _write(self, entries: Mapping[str, bytes]) -> tuple[str, int]:
        """One more shard, which appears whole or not at all: its path and bytes."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as shard:
            for key in sorted(entries):
                shard.writestr(entry(key + self._suffix), entries[key])
        path = f"{self._folder}/{uuid.uuid4().hex}.zip"
        beside = path.removesuffix(".zip") + ".unfinished"
        try:
            if not self._has_buckets:
                self._files.makedirs(self._folder, exist_ok=True)
            self._files.pipe_file(beside, packed.getvalue())
            self._files.mv(beside, path)
        except BaseException as error:
            with contextlib.suppress(Exception):  # of the two errors the first is the one to tell
                self._files.rm_file(beside)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"{self._folder}: nothing can be written there ({error}). Free the disk, or mend scale.cache "
                "in params.yaml."
            ) from error
        self._learn(path, packed)
        return path, len(packed.getbuffer())

    def _look(self) -> None:
        """Read the directories of shards that others have written since the last look."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            paths = self._files.ls(self._folder, detail=False)
        except FileNotFoundError:
            return
        for path in sorted(paths):
            if path.endswith(".zip") and path not in self._known:
                try:
                    with self._files.open(path, "rb") as file:
                        self._learn(path, file)
                except FileNotFoundError:
                    continue
                except _DAMAGE as error:
                    _log.warning("%s is damaged (%s): what it held is computed again.", path, error)
                    self._remove(path)

    def _learn(self, path: str, file: Any) -> None:
        number = len(self._shards)
        directory = _Directory(path)
        for _, start, size, checksum in (items := self._entries(file)):
            directory.starts.append(start)
            directory.sizes.append(size)
            directory.checksums.append(checksum)
        self._shards.append(directory)
        self._places.update((name, number << _SHARD_BITS | i) for i, (name, *_) in enumerate(items))
        self._known.add(path)

    def _entries(self, file: Any) -> list[tuple[bytes, int, int, int]]:
        """Of every entry of a shard: its name, where its content starts, bytes and crc32."""
        with zipfile.ZipFile(file) as shard:
            items = shard.infolist()
        return [
            (
                bytes.fromhex(item.filename.removesuffix(self._suffix)),
                start_of(item),
                item.file_size,
                item.CRC,
            )
            for item in items
        ]

    def _sound(self, path: str) -> Iterator[tuple[str, bytes]]:
        """The undamaged entries of a shard."""
        try:
            data = self._files.cat_file(path)
            items = self._entries(io.BytesIO(data))
        except (FileNotFoundError, *_DAMAGE):
            return  # another process may have found it damaged
        for name, start, size, checksum in items:
            content = data[start : start + size]
            if _is_sound(content, size, checksum):
                yield name.hex(), content

    def _read_from(
        self, shard: _Directory, members: Sequence[tuple[int, bytes]]
    ) -> list[tuple[bytes, bytes]]:
        """The sound ones among entries (number, name) of one shard; what proves wrong is dropped from it."""
        starts = [shard.starts[i] for i, _ in members]
        blocks = self._blocks(shard.path, starts, [shard.starts[i] + shard.sizes[i] for i, _ in members])
        found = [
            (name, content)
            for (i, name), content in zip(members, blocks, strict=True)
            if _is_sound(content, shard.sizes[i], shard.checksums[i])
        ]
        if bad := len(members) - len(found):
            _log.warning("%s is damaged (%d of its entries): they are computed again.", shard.path, bad)
            with self._lock:
                self._rewrite([shard.path])
        return found

    def _blocks(self, path: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """The ranges of a file, neighbours read together."""
        paths, begins, stops = merge_offset_ranges(
            [path] * len(starts), list(starts), list(ends), max_gap=_GAP, max_block=_BLOCK, sort=False
        )
        blocks = self._files.cat_ranges(paths, begins, stops, on_error="raise")
        found = []
        for start, end in zip(starts, ends, strict=True):
            block = bisect_right(begins, start) - 1
            found.append(blocks[block][start - begins[block] : end - begins[block]])
        return found

    def _remove(self, path: str) -> None:
        self._forget(path)
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def _forget(self, path: str) -> None:
        """Drop the places in a shard that is gone."""
        numbers = {number for number, shard in enumerate(self._shards) if shard.path == path}
        self._known.discard(path)
        for name in [name for name, place in self._places.items() if place >> _SHARD_BITS in numbers]:
            del self._places[name]


def entry(name: str) -> zipfile.ZipInfo:
    """A zip member whose bytes do not depend on the clock or the machine."""
    made = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    made.create_system = 3
    made.external_attr = 0o644 << 16
    return made


def start_of(item: zipfile.ZipInfo) -> int:
    """Where the content of a member begins, which was written as ``entry`` and stored."""
    return item.header_offset + 30 + len(item.filename)  # no extra field


def _is_sound(content: bytes, size: int, checksum: int) -> bool:
    return len(content) == size and zlib.crc32(content) == checksum
