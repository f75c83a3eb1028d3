"""Where masks are kept: a cache by content, and the published view of one manifest.

The cache names a mask by the image's bytes and the segmenter's key, so masks of other settings and other
data sets live side by side and nothing in it is ever out of date. The published view holds exactly one
manifest's masks, in a few deterministic files, and is what gets versioned.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medfocus.datasets.records import Record, chunks
from medfocus.images import decode
from medfocus.masks.segmenter import STATUSES, Mask, Segmenter
from medfocus.storage.shards import Shards, entry, start_of

STATUS_FILE = "mask_status.csv"
SHARD_SIZE = 1000  # masks a published file: version control is slow for one file a mask

_LOOKED_UP = 1000  # images whose masks are looked for at once


class MaskStore:
    """A cache of masks: a folder of shards for each segmenter (see ``medfocus.storage.shards``).

    Many threads and processes may read and write it at once. An entry is a 1-bit PNG, named by its image's
    sha256, with score, status and coverage in its text chunks.
    """

    def __init__(self, url: str | Path) -> None:
        """A folder, or any URL that fsspec knows; made at the first ``put``."""
        self.url = str(url)
        self._shards: dict[str, Shards] = {}  # by the segmenter's key

    def encoded(self, shas: Iterable[str], segmenter_key: str) -> Iterator[tuple[str, bytes]]:
        """sha256 and PNG bytes of those images that have a mask; a damaged one counts as none."""
        return self._of(segmenter_key).read(shas)

    def get(self, sha256: str, segmenter_key: str) -> Mask | None:
        """One image's mask, or None where there is none."""
        data = dict(self.encoded([sha256], segmenter_key)).get(sha256)
        return None if data is None else decode_mask(data)

    def put(self, masks: Mapping[str, Mask], segmenter_key: str) -> None:
        """Keep the masks of images, named by their sha256; on disk in half a second, or at ``close``."""
        self._of(segmenter_key).put((sha, encode_mask(mask)) for sha, mask in masks.items())

    def close(self) -> None:
        """Have everything on disk."""
        for shards in self._shards.values():
            shards.close()

    def _of(self, segmenter_key: str) -> Shards:
        if segmenter_key not in self._shards:
            name = hashlib.sha256(segmenter_key.encode()).hexdigest()[:32]
            self._shards[segmenter_key] = Shards(f"{self.url}/{name}", suffix=".png")
        return self._shards[segmenter_key]


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
    with decode.read_header(data, "mask", ("PNG",)) as image:
        return Mask(np.array(image), float(image.info["score"]), image.info["status"])


@dataclass(frozen=True)
class Cached:
    """What ``cache_masks`` did."""

    computed: int  # images that the segmenter saw
    reused: int  # images whose mask was there already, among them further copies of the same bytes


def cache_masks(
    images: Iterable[tuple[Record, Path]],
    segmenter: Segmenter,
    store: MaskStore,
    *,
    batch_size: int,
    workers: int = 2,
    progress: Callable[[int], object] = lambda images: None,
) -> Cached:
    """See to it that the store has every image's mask, computing only what is missing.

    ``workers`` threads read and decode the next images while the segmenter runs, at most two batches ahead,
    so memory does not grow with the number of images. The segmenter
    always gets ``batch_size`` images (its own batch size, or a multiple), so that a mask does not depend
    on what else was missing. ``progress`` is called with the number of images finished since its last
    call, as ``tqdm.update`` takes it.

    Raises:
        ValueError: An image cannot be decoded, or is not the one that its record was made from. Masks
            finished before it stay in the store.
    """
    computed = reused = 0
    waiting: deque[tuple[Record, Future[np.ndarray]]] = deque()
    in_work: set[str] = set()  # sha256 of the images in waiting

    def run_batch() -> int:
        batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        decoded = [image.result() for _, image in batch]
        # A short batch is filled up: the last bits of a network's output can depend on the batch's size.
        filled = decoded + decoded[-1:] * (batch_size - len(decoded))
        masks = segmenter.segment(filled)[: len(decoded)]
        for (record, _), image, mask in zip(batch, decoded, masks, strict=True):
            if mask.region.shape != image.shape[:2]:
                raise ValueError(
                    f"{record.path}: the segmenter gave a mask of {mask.region.shape} for an image of "
                    f"{image.shape[:2]}; segment() has to keep the image's size."
                )
        keys = [record.sha256 for record, _ in batch]
        store.put(dict(zip(keys, masks, strict=True)), segmenter.key)
        in_work.difference_update(keys)
        progress(len(batch))
        return len(batch)

    with ThreadPoolExecutor(workers) as pool, contextlib.closing(store):
        for some in chunks(images, _LOOKED_UP):
            known = {sha for sha, _ in store.encoded((record.sha256 for record, _ in some), segmenter.key)}
            for record, path in some:
                if record.sha256 in in_work or record.sha256 in known:
                    reused += 1
                    progress(1)
                    continue
                in_work.add(record.sha256)
                known.add(record.sha256)
                waiting.append((record, pool.submit(_read_as_recorded, record, path)))
                if len(waiting) >= 2 * batch_size:
                    computed += run_batch()
        while waiting:
            computed += run_batch()
    return Cached(computed, reused)


@dataclass(frozen=True)
class MaskStatus:
    """One image's line in the published ``mask_status.csv``."""

    path: str
    label: str
    status: str  # the rung of the fallback ladder
    score: float  # in [0, 1]
    coverage: float  # share of the image inside the mask


def publish(records: Iterable[Record], store: MaskStore, segmenter_key: str, folder: Path) -> None:
    """Write the masks of exactly these records to ``folder``, in place of what was there.

    ``masks.zip`` holds the masks, uncompressed; where there are more than SHARD_SIZE, ``masks-<prefix>.zip``
    those of the images whose sha256 begins with that prefix, so that a new image changes one file.
    ``mask_status.csv`` says an image's rung, score and coverage. The same masks give the same bytes.
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
                masks = dict(store.encoded(members, segmenter_key))
                if len(masks) < len(members):
                    raise ValueError(_lacking(records, store, segmenter_key))
                for sha in members:
                    shard.writestr(entry(f"{sha}.png"), masks[sha])
                    facts[sha] = _read_facts(masks[sha])
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
    """What ``publish`` wrote: ``masks[sha256]`` is an image's region, ``masks.status[path]`` its line."""

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
        """The region (H, W) bool of the image with these bytes. Raises KeyError when there is none."""
        shard = self.folder / _shard_name(sha256[: self._prefix_length])
        place = _index(shard, shard.stat().st_mtime_ns).get(sha256) if shard.is_file() else None
        if place is None:
            raise KeyError(f"{self.folder}: no mask of an image with sha256 {sha256}; run the masks stage.")
        with shard.open("rb") as file:
            file.seek(place[0])
            return decode_mask(file.read(place[1])).region

    def summary(self) -> list[dict[str, str | int | float]]:
        """Coverage, score and rungs a class; see ``summarise``."""
        return summarise(self.status.values())


def summarise(rows: Iterable[MaskStatus]) -> list[dict[str, str | int | float]]:
    """One line a class, sorted by label: images, mean coverage and score, and each rung's share.

    A rung of the fallback ladder that goes with a class tells the class without its image: a shortcut.
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
                "images": n,
                "coverage": sum(row.coverage for row in members) / n,
                "score": sum(row.score for row in members) / n,
                **{status: rungs[status] / n for status in STATUSES},
            }
        )
    return lines


def _read_as_recorded(record: Record, path: Path) -> np.ndarray:
    """The image (H, W, 3) uint8 of a record, if its file still holds the recorded bytes."""
    sha256, image = decode.read_named(path)
    if sha256 != record.sha256:
        raise ValueError(f"{path}: its bytes are not the manifest's (sha256 differs). Run ingest again.")
    return image


def _read_facts(data: bytes) -> tuple[str, float, float]:
    """Status, score and coverage of an encoded mask, without decoding its pixels."""
    with decode.read_header(data, "mask", ("PNG",)) as image:
        return image.info["status"], float(image.info["score"]), float(image.info["coverage"])


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
    records = list(records)
    there = {sha for sha, _ in store.encoded((record.sha256 for record in records), segmenter_key)}
    paths = [record.path for record in records if record.sha256 not in there]
    more = f", and those of {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"{paths[0]}: the cache {store.url} lacks its mask by this segmenter{more}. "
        "Run cache_masks on the same records first."
    )


def _shard_name(prefix: str) -> str:
    return f"masks-{prefix}.zip" if prefix else "masks.zip"


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
        for item in file.infolist():
            places[item.filename.removesuffix(".png")] = (start_of(item), item.file_size)
    return places
