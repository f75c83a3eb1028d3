"""Where masks are kept: a cache by content, and the published view of one manifest.

The cache holds one file a mask, named by the picture's bytes and the segmenter's key, so masks of other
settings and other data sets live side by side and nothing in it is ever out of date. The published view
holds exactly one manifest's masks, in a few deterministic files, and is what gets versioned.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medfocus import images
from medfocus.masks.segmenter import STATUSES, Mask, Segmenter
from medfocus.records import Record

STATUS_FILE = "mask_status.csv"
SHARD_SIZE = 1000  # masks a published file: version control is slow for one file a mask

_PNG_START = b"\x89PNG\r\n\x1a\n"


class MaskStore:
    """A cache of masks in a folder. Many threads and processes may read and write it at once.

    A mask is one file, a 1-bit PNG with score, status and coverage in its text chunks. It appears whole
    or not at all, so a run that is killed leaves only finished masks behind.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is made at the first ``put``."""
        self.folder = folder

    def path(self, sha256: str, segmenter_key: str) -> Path:
        """The file of one picture's mask, whether or not it exists."""
        key = hashlib.sha256(f"{sha256} {segmenter_key}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.png"

    def encoded(self, sha256: str, segmenter_key: str) -> bytes | None:
        """The PNG bytes of one picture's mask, or None where there is none. A damaged file is removed."""
        path = self.path(sha256, segmenter_key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if _is_whole_png(data):
            return data
        path.unlink(missing_ok=True)
        return None

    def get(self, sha256: str, segmenter_key: str) -> Mask | None:
        """One picture's mask, or None where there is none. A damaged file is removed."""
        data = self.encoded(sha256, segmenter_key)
        return None if data is None else decode_mask(data)

    def put(self, sha256: str, segmenter_key: str, mask: Mask) -> None:
        """Keep one picture's mask: written beside, then moved into place."""
        path = self.path(sha256, segmenter_key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(encode_mask(mask))
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


def encode_mask(mask: Mask) -> bytes:
    """A mask as a 1-bit PNG whose text chunks hold its score, status and coverage."""
    text = PngInfo()
    for name, value in (("status", mask.status), ("score", mask.score), ("coverage", mask.coverage)):
        text.add_text(name, str(value))
    file = io.BytesIO()
    Image.fromarray(mask.region).save(file, "PNG", pnginfo=text, compress_level=6)
    return file.getvalue()


def decode_mask(data: bytes) -> Mask:
    """The inverse of ``encode_mask``."""
    with Image.open(io.BytesIO(data)) as picture:
        return Mask(np.array(picture), float(picture.info["score"]), picture.info["status"])


@dataclass(frozen=True)
class Cached:
    """What ``cache_masks`` did."""

    computed: int  # pictures that the segmenter saw
    reused: int  # pictures whose mask was there already, among them further copies of the same bytes


def cache_masks(
    pictures: Iterable[tuple[Record, Path]],
    segmenter: Segmenter,
    store: MaskStore,
    *,
    batch_size: int,
    workers: int = 2,
    progress: Callable[[int], object] = lambda pictures: None,
) -> Cached:
    """See to it that the store has every picture's mask, computing only what is missing.

    ``workers`` threads read and decode the next pictures and write the last masks while the segmenter
    runs, at most two batches ahead, so memory does not grow with the number of pictures. The segmenter
    always gets ``batch_size`` pictures (its own batch size, or a multiple), so that a mask does not depend
    on what else was missing. ``progress`` is called with the number of pictures finished since its last
    call, as ``tqdm.update`` takes it.

    Raises:
        ValueError: A picture cannot be decoded, or is not the one that its record was made from. Masks
            finished before it stay in the store.
    """
    computed = reused = 0
    waiting: deque[tuple[Record, Future[np.ndarray]]] = deque()
    in_work: set[str] = set()  # sha256 of the pictures in waiting

    with ThreadPoolExecutor(workers) as pool:

        def run_batch() -> int:
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            decoded = [picture.result() for _, picture in batch]
            # A short batch is filled up: the last bits of a network's output can depend on the batch's size.
            filled = decoded + decoded[-1:] * (batch_size - len(decoded))
            masks = segmenter.segment(filled)[: len(decoded)]
            for (record, _), picture, mask in zip(batch, decoded, masks, strict=True):
                if mask.region.shape != picture.shape[:2]:
                    raise ValueError(
                        f"{record.path}: the segmenter gave a mask of {mask.region.shape} for a picture of "
                        f"{picture.shape[:2]}; segment() has to keep the picture's size."
                    )
            keys = [record.sha256 for record, _ in batch]
            list(pool.map(store.put, keys, [segmenter.key] * len(batch), masks))
            in_work.difference_update(keys)
            progress(len(batch))
            return len(batch)

        for record, path in pictures:
            if record.sha256 in in_work or store.encoded(record.sha256, segmenter.key) is not None:
                reused += 1
                progress(1)
                continue
            in_work.add(record.sha256)
            waiting.append((record, pool.submit(_read_as_recorded, record, path)))
            if len(waiting) >= 2 * batch_size:
                computed += run_batch()
        while waiting:
            computed += run_batch()
    return Cached(computed, reused)


@dataclass(frozen=True)
class MaskStatus:
    """One picture's line in the published ``mask_status.csv``."""

    path: str
    label: str
    status: str  # the rung of the fallback ladder
    score: float  # in [0, 1]
    coverage: float  # share of the picture inside the mask


def publish(records: Iterable[Record], store: MaskStore, segmenter_key: str, folder: Path) -> None:
    """Write the masks of exactly these records to ``folder``, in place of what was there.

    ``masks.zip`` holds the masks, uncompressed; where there are more than SHARD_SIZE, ``masks-<prefix>.zip``
    those of the pictures whose sha256 begins with that prefix, so that a new picture changes one file.
    ``mask_status.csv`` says a picture's rung, score and coverage. The same masks give the same bytes.
    Everything is written beside and then swapped in.

    Raises ValueError when the store lacks a mask.
    """
    records = sorted(records, key=lambda record: record.path)
    shas = sorted({record.sha256 for record in records})
    facts: dict[str, tuple[str, float, float]] = {}  # sha256 -> status, score, coverage
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        beside.chmod(0o755)  # mkdtemp's own is for its owner alone
        for prefix, members in _shards(shas):
            with zipfile.ZipFile(beside / _shard_name(prefix), "w", zipfile.ZIP_STORED) as shard:
                for sha in members:
                    data = store.encoded(sha, segmenter_key)
                    if data is None:
                        raise ValueError(_lacking(records, store, segmenter_key))
                    shard.writestr(_zip_entry(f"{sha}.png"), data)
                    facts[sha] = _read_facts(data)
        with (beside / STATUS_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(MaskStatus))
            for record in records:
                status, score, coverage = facts[record.sha256]
                writer.writerow([record.path, record.label, status, f"{score:.6f}", f"{coverage:.6f}"])
        _swap_in(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class PublishedMasks:
    """What ``publish`` wrote: ``masks[sha256]`` is a picture's region, ``masks.status[path]`` its line."""

    def __init__(self, folder: Path) -> None:
        """Read the status file; the masks are read when asked for. Raises FileNotFoundError."""
        if not (folder / STATUS_FILE).is_file():
            raise FileNotFoundError(
                f"{folder}: no {STATUS_FILE} in it; run the masks stage, which writes it."
            )
        self.folder = folder
        with (folder / STATUS_FILE).open(newline="", encoding="utf-8") as file:
            rows = [
                MaskStatus(path, label, status, float(score), float(coverage))
                for path, label, status, score, coverage in list(csv.reader(file))[1:]
            ]
        self.status: dict[str, MaskStatus] = {row.path: row for row in rows}
        prefixes = (path.stem.removeprefix("masks-") for path in folder.glob("masks-*.zip"))
        self._prefix_length = len(next(prefixes, ""))  # one length for all

    def __getitem__(self, sha256: str) -> np.ndarray:
        """The region (H, W) bool of the picture with these bytes. Raises KeyError when there is none."""
        shard = self.folder / _shard_name(sha256[: self._prefix_length])
        place = _index(shard, shard.stat().st_mtime_ns).get(sha256) if shard.is_file() else None
        if place is None:
            raise KeyError(f"{self.folder}: no mask of a picture with sha256 {sha256}; run the masks stage.")
        with shard.open("rb") as file:
            file.seek(place[0])
            return decode_mask(file.read(place[1])).region

    def summary(self) -> list[dict[str, str | int | float]]:
        """Coverage, score and rungs a class; see ``summarise``."""
        return summarise(self.status.values())


def summarise(rows: Iterable[MaskStatus]) -> list[dict[str, str | int | float]]:
    """One line a class, sorted by label: pictures, mean coverage and score, and each rung's share.

    A rung of the fallback ladder that goes with a class tells the class without its picture: a shortcut.
    """
    by_label: dict[str, list[MaskStatus]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    lines: list[dict[str, str | int | float]] = []
    for label, members in sorted(by_label.items()):
        n = len(members)
        rungs = Counter(row.status for row in members)
        lines.append(
            {
                "label": label,
                "pictures": n,
                "coverage": sum(row.coverage for row in members) / n,
                "score": sum(row.score for row in members) / n,
                **{status: rungs[status] / n for status in STATUSES},
            }
        )
    return lines


def _read_as_recorded(record: Record, path: Path) -> np.ndarray:
    """The picture (H, W, 3) uint8 of a record, if its file still holds the recorded bytes."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ValueError(f"{path}: its bytes are not the manifest's (sha256 differs). Run ingest again.")
    return images.decode(data, str(path))


def _is_whole_png(data: bytes) -> bool:
    """Whether every chunk is there and matches its own checksum, up to the end mark."""
    if not data.startswith(_PNG_START):
        return False
    at, kind = len(_PNG_START), b""
    while at + 12 <= len(data) and kind != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        at = end + 4
    return kind == b"IEND" and at == len(data)


def _read_facts(data: bytes) -> tuple[str, float, float]:
    """Status, score and coverage of an encoded mask, without decoding its pixels."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.info["status"], float(picture.info["score"]), float(picture.info["coverage"])


def _shards(shas: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Sorted sha256 hex -> (prefix, its members), by the shortest prefixes that keep to SHARD_SIZE."""
    length = 0
    while shas and max(Counter(sha[:length] for sha in shas).values()) > SHARD_SIZE:
        length += 1
    members: dict[str, list[str]] = {}
    for sha in shas:
        members.setdefault(sha[:length], []).append(sha)
    yield from members.items()


def _lacking(records: Iterable[Record], store: MaskStore, segmenter_key: str) -> str:
    """The error of a publication for which masks are lacking."""
    paths = [record.path for record in records if store.encoded(record.sha256, segmenter_key) is None]
    more = f", and those of {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"{paths[0]}: the cache {store.folder} lacks its mask by this segmenter{more}. "
        "Run cache_masks on the same records first."
    )


def _shard_name(prefix: str) -> str:
    return f"masks-{prefix}.zip" if prefix else "masks.zip"


def _zip_entry(name: str) -> zipfile.ZipInfo:
    """A zip member whose bytes do not depend on the clock or the machine."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _swap_in(beside: Path, folder: Path) -> None:
    """Put the finished folder ``beside`` in the place of ``folder``."""
    old = beside.with_name(beside.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=64)
def _index(shard: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where a shard's masks lie: sha256 -> (offset, bytes). ``changed``, its mtime, tells versions apart."""
    places: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(shard) as file:
        for entry in file.infolist():
            start = entry.header_offset + 30 + len(entry.filename)  # as _zip_entry writes it: no extra field
            places[entry.filename.removesuffix(".png")] = (start, entry.file_size)
    return places
