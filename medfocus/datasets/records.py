"""The image records of a data set, and their manifest."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from medfocus.storage.tables import write_csv

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set: a line of the manifest."""

    path: str  # relative to the root of the data set, POSIX; unique, so it is the id of the image
    sha256: str  # of the bytes of the file
    width: int  # pixels, after the EXIF orientation is applied
    height: int  # pixels
    mode: str  # Pillow's mode: "L", "I;16", "RGB", "RGBA", "P", ...
    label: str
    split: str  # "train", "val", "test", or "" if the data set has no official split
    patient: str  # "" if unknown


def write_manifest(records: Iterable[Record], path: Path) -> None:
    """Write records as CSV, sorted by path, one line per image."""
    rows = sorted(records, key=lambda record: record.path)
    write_csv(path, [field.name for field in fields(Record)], (astuple(row) for row in rows))


def read_manifest(path: Path) -> list[Record]:
    """Read a manifest that ``write_manifest`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Record(
                **{
                    **row,
                    **{name: sys.intern(row[name]) for name in ("mode", "label", "split")},  # saves memory
                    "width": int(row["width"]),
                    "height": int(row["height"]),
                }
            )
            for row in csv.DictReader(file)
        ]


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items; the last list may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def spread_over_classes(labels: Sequence[str], count: int) -> list[int]:
    """Choose about ``count`` indices: at least one and equally many of each class, spread over the class."""
    classes = sorted(set(labels))
    chosen: list[int] = []
    for label in classes:
        places = [place for place, other in enumerate(labels) if other == label]
        number = min(len(places), max(1, count // len(classes)))
        chosen += [places[i] for i in np.linspace(0, len(places) - 1, number).astype(int)]
    return chosen
