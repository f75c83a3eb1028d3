"""Define the faults of a data set, the report that ingestion fills, and the CSV file of faults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from medfocus.images.errors import ImageFault
from medfocus.storage.tables import write_csv

FaultKind = (
    ImageFault
    | Literal[
        "unknown file type",
        "file name is not UTF-8",
        "file outside the class folders",
        "folder outside the splits",
        "copy of the split folders",
        "missing file",
        "path outside the data set",
        "malformed row",
        "missing label",
        "unknown split",
        "conflicting rows",
        "known region listed as an image",
        "same bytes under two labels",
        "test image with the same bytes in train",
        "class without test images",
        "images without a patient",
        "images without a known display range",
        "text in the pixels",
        "invalid annotation",
        "data set cannot be used",
    ]
)
LABEL_NOISE: tuple[FaultKind, ...] = ("same bytes under two labels", "conflicting rows")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, a folder or a setting, and how to fix it."""

    path: str  # relative to the root of the data set
    kind: FaultKind  # never names a file or patient, so reports may show it
    fault: str
    fix: str


class IngestReport:
    """All faults of a data set by severity."""

    def __init__(self) -> None:
        self.fatal: list[Fault] = []
        self.left_out: list[Fault] = []
        self.reported: list[Fault] = []

    def stop(self, path: str, fault: str, fix: str) -> None:
        """Record that the data set cannot be used."""
        self.fatal.append(Fault(path, "data set cannot be used", fault, fix))

    def leave_out(self, path: str, kind: FaultKind, fault: str, fix: str) -> None:
        """Record that a file cannot be used; the data set can."""
        self.left_out.append(Fault(path, kind, fault, fix))

    def mention(self, path: str, kind: FaultKind, fault: str, fix: str) -> None:
        """Record a fault of files that stay in the data set; a reader of the results needs to know it."""
        self.reported.append(Fault(path, kind, fault, fix))


def write_faults(faults: Iterable[Fault], path: Path) -> None:
    """Write faults as CSV, one line per fault."""
    write_csv(path, [field.name for field in fields(Fault)], (astuple(fault) for fault in faults))
