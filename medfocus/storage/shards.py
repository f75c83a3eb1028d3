"""A cache from keys to bytes: many small entries in few files, in a folder or on shared storage.

A shard is an uncompressed zip file that appears complete and never changes. About every half second, a
process writes its new entries as a small shard. Now and then it merges its small shards, and removes them
only after the merged shard exists. Therefore threads, processes and machines can write at the same time. A
killed process loses only the entries that wait to be written, and a reader that misses a shard looks again.
The folder is any fsspec URL (``file``, ``s3``, ...). No file is appended to or locked, because an object
store offers neither.

A process reads the directory of each shard once and then knows the place of every entry: a lookup is a
dictionary lookup, and a read is one range of one file.
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

FLUSH_SECONDS = 0.5  # a ``put`` this long after the last write writes all waiting entries
FLUSH_BYTES = 32 * 2**20  # waiting bytes that are written at once
SHARD_BYTES = 32 * 2**20  # a larger shard is not merged
SHARD_ENTRIES = 2_000  # a shard with more entries is not merged, because readers read its whole directory
PIECES = 100  # a process merges its small shards when it has this many
LOOK_SECONDS = 1.0  # minimum time between searches for other writers' shards

_GAP, _BLOCK = 64 * 2**10, 8 * 2**20  # bytes; entries closer than a gap are read as one block
_SHARD_BITS = 32  # a place is one number to save memory: shard << 32 | entry
_ENTRY = (1 << _SHARD_BITS) - 1
_OBJECT_STORES = {"s3", "gs", "abfs"}  # no folders; makedirs could create a misspelt bucket
_TRIES = 10  # reads of entries while other processes merge shards
_DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError)  # raised by zipfile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Directory:
    """The places of the entries of a shard."""

    path: str
    starts: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    checksums: array[int] = field(default_factory=lambda: array("I"))  # crc32 of the content


class Shards:
    """A folder of shards. Keys are hex digests, and equal keys have equal entries. Thread-safe."""

    def __init__(self, url: str | Path, suffix: str = "") -> None:
        """Use the folder ``url``, a path or fsspec URL; names of entries end in ``suffix``."""
        self._files: Any
        self._files, self._folder = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
        protocols = (
            {self._files.protocol} if isinstance(self._files.protocol, str) else {*self._files.protocol}
        )
        self._has_buckets = bool(protocols & _OBJECT_STORES)
        self._suffix = suffix
        self._shards: list[_Directory] = []
        self._known: set[str] = set()  # paths of shards with a known directory
        self._places: dict[bytes, int] = {}  # key -> shard << _SHARD_BITS | entry
        self._waiting: dict[str, bytes] = {}  # entries not yet written
        self._own: dict[str, int] = {}  # path -> bytes of each small shard of this object
        self._written = self._looked = float("-inf")
        self._lock = threading.RLock()

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the existing entries of ``keys``, each once, in the order of the shards.

        A damaged entry is logged and left out, so that the caller computes and puts it again.
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
            has_moved = False
            for number, group in groupby(placed, key=lambda one: one[0] >> _SHARD_BITS):
                members = [(place & _ENTRY, name) for place, name in group if name in wanted]
                shard = self._shards[number]
                try:
                    sound = self._read_from(shard, members)
                except FileNotFoundError:  # merged by its writer, or deleted
                    with self._lock:
                        self._forget(shard.path)
                        self._looked = float("-inf")
                    has_moved = True
                    continue
                for name, content in sound:
                    yield wanted.pop(name), content
            if not has_moved:
                return

    def put(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Add entries. The first ``put`` after ``FLUSH_SECONDS`` writes them, and so does ``close``."""
        with self._lock:
            self._waiting.update(entries)
            size = sum(map(len, self._waiting.values()))
            if time.monotonic() - self._written >= FLUSH_SECONDS or size >= FLUSH_BYTES:
                self._flush()

    def close(self) -> None:
        """Write waiting entries and merge small shards. Reading and putting can continue afterwards."""
        with self._lock:
            self._flush()
            if len(self._own) > 1:
                self._merge()
            self._own.clear()

    def _flush(self) -> None:
        if self._waiting:
            path, size = self._write(self._waiting)
            self._waiting.clear()
            if size < SHARD_BYTES:
                self._own[path] = size
        self._written = time.monotonic()
        if len(self._own) >= PIECES or sum(self._own.values()) >= SHARD_BYTES:
            self._merge()

    def _merge(self) -> None:
        small, self._own = list(self._own), {}
        self._own = self._rewrite(small)

    def _rewrite(self, paths: Sequence[str]) -> dict[str, int]:
        """Write the sound entries of shards to new shards, remove the old ones, return the last new shard.

        Meanwhile an entry may exist twice; this is harmless.
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
        """Write a shard atomically; return its path and size."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as shard:
            for key in sorted(entries):
                shard.writestr(entry(key + self._suffix), entries[key])
        path = f"{self._folder}/{uuid.uuid4().hex}.zip"
        temporary = path.removesuffix(".zip") + ".unfinished"
        try:
            if not self._has_buckets:
                self._files.makedirs(self._folder, exist_ok=True)
            self._files.pipe_file(temporary, packed.getvalue())
            self._files.mv(temporary, path)
        except BaseException as error:
            with contextlib.suppress(Exception):  # do not hide the first error
                self._files.rm_file(temporary)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"{self._folder}: cannot be written ({error}). Free disk space, or correct scale.cache in "
                "params.yaml."
            ) from error
        self._learn(path, packed)
        return path, len(packed.getbuffer())

    def _look(self) -> None:
        """Read the directories of shards that other writers have added."""
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
                    _log.warning("%s is damaged (%s); its entries are computed again.", path, error)
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
        """Return name, start, size and crc32 of every entry of a shard."""
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
        """Yield the sound entries of a shard."""
        try:
            data = self._files.cat_file(path)
            items = self._entries(io.BytesIO(data))
        except (FileNotFoundError, *_DAMAGE):
            return  # another process may have removed it as damaged
        for name, start, size, checksum in items:
            content = data[start : start + size]
            if _is_sound(content, size, checksum):
                yield name.hex(), content

    def _read_from(
        self, shard: _Directory, members: Sequence[tuple[int, bytes]]
    ) -> list[tuple[bytes, bytes]]:
        """Return the sound entries among ``members`` (number, name); rewrite a shard that is damaged."""
        starts = [shard.starts[i] for i, _ in members]
        blocks = self._blocks(shard.path, starts, [shard.starts[i] + shard.sizes[i] for i, _ in members])
        sound = [
            (name, content)
            for (i, name), content in zip(members, blocks, strict=True)
            if _is_sound(content, shard.sizes[i], shard.checksums[i])
        ]
        if bad := len(members) - len(sound):
            _log.warning("%s is damaged (%d of its entries); these are computed again.", shard.path, bad)
            with self._lock:
                self._rewrite([shard.path])
        return sound

    def _blocks(self, path: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Return ranges of a file; neighbouring ranges are read together."""
        paths, begins, stops = merge_offset_ranges(
            [path] * len(starts), list(starts), list(ends), max_gap=_GAP, max_block=_BLOCK, sort=False
        )
        blocks = self._files.cat_ranges(paths, begins, stops, on_error="raise")
        contents = []
        for start, end in zip(starts, ends, strict=True):
            block = bisect_right(begins, start) - 1
            contents.append(blocks[block][start - begins[block] : end - begins[block]])
        return contents

    def _remove(self, path: str) -> None:
        self._forget(path)
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def _forget(self, path: str) -> None:
        """Forget a removed shard and the places of its entries."""
        numbers = {number for number, shard in enumerate(self._shards) if shard.path == path}
        self._known.discard(path)
        for name in [name for name, place in self._places.items() if place >> _SHARD_BITS in numbers]:
            del self._places[name]


def entry(name: str) -> zipfile.ZipInfo:
    """Return a zip member with bytes that do not depend on time or machine."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


def start_of(item: zipfile.ZipInfo) -> int:
    """Return the offset of the content of a stored member made by ``entry``."""
    return item.header_offset + 30 + len(item.filename)  # no extra field


def _is_sound(content: bytes, size: int, checksum: int) -> bool:
    return len(content) == size and zlib.crc32(content) == checksum
