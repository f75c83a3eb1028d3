"""The types that every room shares: an image of a data set, and its manifest."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set, as its manifest lists it."""

    path: str  # relative to the data set's root, POSIX; unique, so it is the image's id
    sha256: str  # of the file's bytes
    width: int  # pixels, after the EXIF orientation is applied
    height: int  # pixels
    mode: str  # Pillow's: "L", "I;16", "RGB", "RGBA", "P", ...
    label: str
    split: str  # "train", "val", "test", or "" where the data set has no official split
    patient: str  # "" where unknown


def write_manifest(records: Iterable[Record], path: Path) -> None:
    """Write ``records`` as CSV, sorted by path, one line per image."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in sorted(records, key=lambda r: r.path))


def read_manifest(path: Path) -> list[Record]:
    """Read what ``write_manifest`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Record(
                **{
                    **row,
                    **{name: sys.intern(row[name]) for name in ("mode", "label", "split")},  # once in memory
                    "width": int(row["width"]),
                    "height": int(row["height"]),
                }
            )
            for row in csv.DictReader(file)
        ]


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def spread_over_classes(labels: Sequence[str], count: int) -> list[int]:
    """Places of about ``count`` images: as many of each class, at least one, spread over its images."""
    classes = sorted(set(labels))
    chosen: list[int] = []
    for label in classes:
        places = [place for place, own in enumerate(labels) if own == label]
        number = min(len(places), max(1, count // len(classes)))
        chosen += [places[i] for i in np.linspace(0, len(places) - 1, number).astype(int)]
    return chosen
