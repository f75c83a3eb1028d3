"""Publish the masks of one manifest as a few deterministic files, which DVC versions.

``masks.zip`` holds the masks as PNG, uncompressed. Above ``SHARD_SIZE`` masks, ``masks-<prefix>.zip`` holds
the masks of the images whose sha256 begins with the prefix, so that a new image changes one file.
``mask_status.csv`` lists rung, score and coverage of each image.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from medfocus.datasets.records import Record
from medfocus.masks.segmenter import STATUSES
from medfocus.masks.store import MaskFacts, MaskStore, decode_mask, read_facts
from medfocus.storage.shards import entry, start_of

STATUS_FILE = "mask_status.csv"
SHARD_SIZE = 1000  # masks per file; DVC is slow with one file per mask


@dataclass(frozen=True)
class MaskStatus:
    """One image's line in ``mask_status.csv``."""

    path: str
    label: str
    status: str  # rung of the fallback ladder
    score: float  # in [0, 1]
    coverage: float  # share of the image inside the mask


def publish(records: Iterable[Record], store: MaskStore, segmenter_key: str, folder: Path) -> None:
    """Write the masks of exactly these records to ``folder`` and replace its previous content.

    The same masks give the same bytes. A temporary folder receives the files and then replaces ``folder``.

    Raises ValueError if the store lacks a mask.
    """
    records = sorted(records, key=lambda record: record.path)
    shas = sorted({record.sha256 for record in records})
    facts: dict[str, MaskFacts] = {}  # by sha256
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp gives access only to the owner
        for prefix, members in _shards(shas):
            with zipfile.ZipFile(temporary / _shard_name(prefix), "w", zipfile.ZIP_STORED) as shard:
                masks = dict(store.encoded(members, segmenter_key))
                if len(masks) < len(members):
                    raise ValueError(_missing(records, store, segmenter_key))
                for sha in members:
                    shard.writestr(entry(f"{sha}.png"), masks[sha])
                    facts[sha] = read_facts(masks[sha])
        with (temporary / STATUS_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(MaskStatus))
            writer.writerows((record.path, record.label, *facts[record.sha256]) for record in records)
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class PublishedMasks:
    """Masks that ``publish`` wrote: ``masks[sha256]`` is a region, ``masks.status[path]`` a status line."""

    def __init__(self, folder: Path) -> None:
        """Read the status file; masks are read on demand. Raises FileNotFoundError without it."""
        if not (folder / STATUS_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {STATUS_FILE}. Run the masks stage, which writes it.")
        self.folder = folder
        with (folder / STATUS_FILE).open(newline="", encoding="utf-8") as file:
            rows = [
                MaskStatus(path, label, status, float(score), float(coverage))
                for path, label, status, score, coverage in list(csv.reader(file))[1:]
            ]
        self.status: dict[str, MaskStatus] = {row.path: row for row in rows}
        prefixes = (path.stem.removeprefix("masks-") for path in folder.glob("masks-*.zip"))
        self._prefix_length = len(next(prefixes, ""))  # all prefixes have one length

    def __getitem__(self, sha256: str) -> np.ndarray:
        """Return the region (H, W) bool of the image with this sha256. Raises KeyError if it has no mask."""
        shard = self.folder / _shard_name(sha256[: self._prefix_length])
        position = _index(shard, shard.stat().st_mtime_ns).get(sha256) if shard.is_file() else None
        if position is None:
            raise KeyError(f"{self.folder}: no mask of an image with sha256 {sha256}. Run the masks stage.")
        offset, size = position
        with shard.open("rb") as file:
            file.seek(offset)
            return decode_mask(file.read(size)).region

    def summary(self) -> list[dict[str, str | int | float]]:
        """Summarise coverage, score and rungs by class; see ``summarise``."""
        return summarise(self.status.values())


def summarise(rows: Iterable[MaskStatus]) -> list[dict[str, str | int | float]]:
    """Return a line per class, sorted by label: images, mean coverage and score, share of each rung.

    Numbers have four decimals, so that they do not depend on the CPU. A rung that occurs mostly in one class
    is a shortcut: the masks reveal the class without the image.
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
                "coverage": round(sum(row.coverage for row in members) / n, 4),
                "score": round(sum(row.score for row in members) / n, 4),
                **{status: round(rungs[status] / n, 4) for status in STATUSES},
            }
        )
    return lines


def _shards(shas: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (prefix, members) of sorted sha256, with the shortest prefixes of at most SHARD_SIZE members."""
    length = 0
    while shas and max(Counter(sha[:length] for sha in shas).values()) > SHARD_SIZE:
        length += 1
    members: dict[str, list[str]] = {}
    for sha in shas:
        members.setdefault(sha[:length], []).append(sha)
    yield from members.items()


def _missing(records: Iterable[Record], store: MaskStore, segmenter_key: str) -> str:
    """Return the error message that names a missing mask."""
    paths = [record.path for record in store.missing(records, segmenter_key)]
    return (
        f"{paths[0]}: the cache {store.url} lacks its mask by this segmenter (missing in all: {len(paths)}). "
        "Run cache_masks on the same records first."
    )


def _shard_name(prefix: str) -> str:
    return f"masks-{prefix}.zip" if prefix else "masks.zip"


def _replace(folder: Path, finished: Path) -> None:
    """Move the folder ``finished`` to ``folder``."""
    old = finished.with_name(finished.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(finished, folder)
    shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=64)
def _index(shard: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Return sha256 -> (offset, bytes) of a shard's masks; with a new mtime ``changed``, read it again."""
    with zipfile.ZipFile(shard) as file:
        return {
            item.filename.removesuffix(".png"): (start_of(item), item.file_size) for item in file.infolist()
        }
