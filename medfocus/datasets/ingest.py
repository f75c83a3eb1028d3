"""A data set's folders or manifest -> checked records, and one report of every fault in it.

What is read from ``root``:

    {split}/{class}/**/x.png   split is train, val (valid, validation), test, or all: no official split
    {class}/**/x.png           no official split
    a manifest                 columns path, label, and optionally split and patient, or others that
                               ``columns`` names; CSV, semicolons, tabs or Parquet

An image is PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI. A file of several frames or slices becomes a record
each, ``x.dcm#07`` or ``x.nii.gz#z=057`` (see ``medfocus.images.stack``), and a manifest may name one of them.
The patient is the manifest's, else the pattern's, else that of the DICOM header as a pseudonym (see
``medfocus.datasets.pseudonyms``); frames or slices of a file whose patient nobody knows are together one
patient's.

Where ``root`` only wraps one of the first two (one folder inside, that in turn), it is read from there. A
manifest comes with the images and is not trusted: what it names has to lie in ``root``, whether by ``..``,
by an absolute path or by a link. Links in folders of classes are their owner's, and are followed.

Ground truth for measuring masks is never an image: the folder ``masks`` at the top, and ``x_mask.png``
(or ``x_mask_1.png``) beside ``x.png``. Hidden files and those of file managers are ignored.

Faults are of three weights. *Left out*: the image cannot be used, the data set can (broken bytes, no
image, no label, one image under two labels, ...). *Reported*: kept as it is, but a reader of the results
has to know (the same bytes in train and test: the official split stays). *Fatal*: nothing could be trusted
(a label in two spellings, a class without images, one class only, ...); then one ``IngestError``
names every fault of every weight.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from medfocus.datasets import scan
from medfocus.datasets.listing import (
    Fault,
    check_spellings,
    label_of,
    list_folders,
    list_manifest,
    with_patients,
)
from medfocus.datasets.listing import Report as _Report
from medfocus.datasets.pseudonyms import Salt
from medfocus.datasets.records import Record
from medfocus.storage.fingerprint import fingerprint
from medfocus.storage.shards import Shards


@dataclass(frozen=True)
class Ingested:
    """A data set that can be used."""

    records: list[Record]  # sorted by path
    left_out: list[Fault]  # what is not among the records
    reported: list[Fault]  # what is, although a reader of the results has to know of it


class IngestError(ValueError):
    """The data set cannot be used. The text lists every fault; so do the three lists."""

    def __init__(self, root: Path, fatal: list[Fault], left_out: list[Fault], reported: list[Fault]) -> None:
        self.fatal, self.left_out, self.reported = fatal, left_out, reported
        text = [f"{root}: {len(fatal)} fault(s) keep this data set from being used; mend all, ingest again."]
        for heading, faults in (("", fatal), ("left out:", left_out), ("kept, but:", reported)):
            text += [heading] if heading and faults else []
            text += [f"  {fault.path}: {fault.fault}. {fault.fix}" for fault in faults]
        super().__init__("\n".join(text).encode("utf-8", "backslashreplace").decode())


def ingest(
    root: Path,
    *,
    manifest: str | None = None,
    columns: Mapping[str, str] | None = None,
    patient_pattern: str | None = None,
    workers: int | None = None,
    progress: bool = False,
    cache: str | Path | None = None,
    slices: tuple[int, int] = (2, 1),
    salt_file: Path | None = None,
) -> Ingested:
    """Read, open and check every image of the data set at ``root``.

    Args:
        root: The data set's folder; record paths are relative to it.
        manifest: A table inside ``root`` that lists the images; its paths are relative to its own folder.
        columns: What the manifest calls path, label, split and patient, where it is not that.
        patient_pattern: A regular expression whose one group, searched for in each relative path, is the
            patient. A patient that the manifest gives has precedence.
        workers: Threads that open images; None takes one a core.
        progress: Whether a bar is shown.
        cache: A folder, or what fsspec knows, that keeps by their bytes what decoding said of good images:
            those in it are read and not decoded again.
        slices: The axis of the patient's along which volumes are cut (0 sagittal, 1 coronal, 2 axial), and
            every how many'th slice is taken.
        salt_file: What patients' ids in DICOM headers are made pseudonyms with; see
            ``medfocus.datasets.pseudonyms``.

    Raises:
        FileNotFoundError: ``root`` or the manifest does not exist.
        IngestError: All faults at once, where at least one is fatal.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the data set's images.")
    report = _Report()
    if manifest is None:
        listed = list_folders(root, report)
    else:
        listed = list_manifest(root, manifest, report, columns)
    listed = with_patients(listed, patient_pattern, report)
    check_spellings(listed, report)
    known = None if cache is None else Shards(f"{cache}/{fingerprint(scan)[:32]}", ".json")
    reading = scan.Reading(*slices, Salt(salt_file))
    files = [item for item in listed if item.path]
    records = scan.open_all(root, files, reading, workers, progress, known, report)
    records = _check_bytes(records, report)
    _check_classes({label_of(item.label) for item in listed}, records, report)
    if report.fatal:
        raise IngestError(root, report.fatal, report.left_out, report.reported)
    return Ingested(sorted(records, key=lambda r: r.path), report.left_out, report.reported)


def write_left_out(left_out: Iterable[Fault], path: Path) -> None:
    """Write faults as CSV: path, fault, fix."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Fault)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(fault) for fault in left_out)


def _check_bytes(records: list[Record], report: _Report) -> list[Record]:
    """Leave out what has two labels, and report what is in two splits."""
    same: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same[record.sha256].append(record)
    torn: set[str] = set()
    for record in records:
        twins = same[record.sha256]
        if other := next((twin for twin in twins if twin.label != record.label), None):
            torn.add(record.path)
            fault = f"holds the same bytes as {other.path}, which has another label, {other.label!r}"
            report.leave_out(record.path, fault, "Decide which label is right and remove the other file.")
        elif record.split == "test" and (other := next((t for t in twins if t.split != "test"), None)):
            fault = f"holds the same bytes as {other.path}, so this test image is seen in training"
            report.mention(record.path, fault, "Kept in the official test set; the clean one is without it.")
    return [record for record in records if record.path not in torn]


def _check_classes(labels: set[str], records: Sequence[Record], report: _Report) -> None:
    """What makes a data set: two classes or more, each with images to train on."""
    splits: dict[str, set[str]] = {label: set() for label in sorted(labels)}
    for record in records:
        splits[record.label].add(record.split)
    official = any(record.split == "test" for record in records)
    for label, present in splits.items():
        if not present:
            report.stop(label, "the class has no usable image", "Add images, or remove the class.")
        elif official and present == {"test"}:
            report.stop(label, "the class has test images but none to train on", "Add some, or remove it.")
        elif official and "test" not in present:
            fix = "Add some; until then its recall cannot be measured."
            report.mention(label, "the class has no test image", fix)
    if not labels and not report.fatal:
        fix = "Give a folder of split/class/*.png, of class/*.png, or a CSV manifest."
        report.stop(".", "no class folder was found", fix)
    elif len(labels) == 1:
        report.stop(".", f"there is one class only, {min(labels)!r}", "Add another.")
