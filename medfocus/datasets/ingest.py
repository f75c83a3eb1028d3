"""Read a data set from folders or a manifest: checked records, and one report of all faults.

Layouts of ``root``:

    {split}/{class}/**/x.png   split is train, val (valid, validation) or test, or all (no official split)
    {class}/**/x.png           no official split
    a manifest                 columns path, label, and optionally split and patient, or other names
                               mapped by ``columns``; CSV with commas, semicolons or tabs, or Parquet

Images are PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI. Each frame or slice of a file becomes a record,
``x.dcm#07`` or ``x.nii.gz#z=057`` (see ``medfocus.images.stack``); a manifest may name one of them. The
patient comes from the manifest, else from the pattern, else from the DICOM header as a pseudonym (see
``medfocus.datasets.pseudonyms``). The frames or slices of a file without a patient count as one patient.

If ``root`` only wraps a data set of folders (it holds one folder, possibly nested), ingestion reads the inner
folder. A manifest comes with the images and is not trusted: its paths must not leave ``root`` through ``..``,
an absolute path or a link. Links inside class folders belong to the owner of the data and are followed.

The top folder ``masks`` and ``x_mask.png`` (or ``x_mask_1.png``) next to ``x.png`` hold known regions for
measuring masks; they are not listed as images. Hidden files and files of file managers are ignored.

Faults have three severities. *Left out*: the image cannot be used, the data set can (broken bytes, not an
image, no label, one image under two labels, ...). *Reported*: the image stays, but a reader of the results
needs to know (the same bytes in train and test of an official split). *Fatal*: no result could be trusted (a
label in two spellings, a class without images, a single class, ...). One ``IngestError`` lists all faults of
all severities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfocus.datasets import scan
from medfocus.datasets.faults import Fault, IngestReport
from medfocus.datasets.listing import check_spellings, label_of, list_folders, list_manifest, with_patients
from medfocus.datasets.pseudonyms import Salt
from medfocus.datasets.records import Record
from medfocus.storage.fingerprint import fingerprint
from medfocus.storage.shards import Shards


@dataclass(frozen=True)
class Ingested:
    """A usable data set."""

    records: list[Record]  # sorted by path
    left_out: list[Fault]  # faults of files that are not among the records
    reported: list[Fault]  # faults of records; a reader of the results needs to know them


class IngestError(ValueError):
    """A data set that cannot be used. The text and the three lists hold all faults."""

    def __init__(self, root: Path, fatal: list[Fault], left_out: list[Fault], reported: list[Fault]) -> None:
        self.fatal, self.left_out, self.reported = fatal, left_out, reported
        text = [f"{root}: {len(fatal)} fault(s) prevent the use of this data set; fix all and ingest again."]
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
    """Open and check all images of the data set at ``root``.

    Args:
        root: The folder of the data set; record paths are relative to it.
        manifest: A table inside ``root`` that lists the images; its paths are relative to its own folder.
        columns: Our names path, label, split and patient -> the manifest's names, where they differ.
        patient_pattern: A regular expression with one group, the patient, searched in each relative path. A
            patient in the manifest has precedence.
        workers: Threads that open images; None means one per core.
        progress: Whether to show a progress bar.
        cache: A folder or fsspec URL for the properties of decoded images, so that unchanged images are not
            decoded again.
        slices: The axis along which volumes are cut (0 sagittal, 1 coronal, 2 axial), and the step between
            slices.
        salt_file: The secret for pseudonyms of patient ids in DICOM headers; see
            ``medfocus.datasets.pseudonyms``.

    Raises:
        FileNotFoundError: ``root`` or the manifest does not exist.
        IngestError: At least one fault is fatal.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the data set's images.")
    report = IngestReport()
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


def _check_bytes(records: list[Record], report: IngestReport) -> list[Record]:
    """Leave out images with two labels, and report test images with the same bytes in another split."""
    same: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same[record.sha256].append(record)
    conflicting: set[str] = set()
    for record in records:
        twins = same[record.sha256]
        if other := next((twin for twin in twins if twin.label != record.label), None):
            conflicting.add(record.path)
            fault = f"holds the same bytes as {other.path}, but that has the label {other.label!r}"
            fix = "Keep the file with the correct label and remove the other."
            report.leave_out(record.path, "same bytes under two labels", fault, fix)
        elif record.split == "test" and (other := next((t for t in twins if t.split != "test"), None)):
            fault = f"holds the same bytes as {other.path}, so training sees this test image"
            fix = "Nothing to do: it stays in the official test set and is excluded from the clean one."
            report.mention(record.path, "test image with the same bytes in train", fault, fix)
    return [record for record in records if record.path not in conflicting]


def _check_classes(labels: set[str], records: Sequence[Record], report: IngestReport) -> None:
    """Check that there are at least two classes, each with training images."""
    splits: dict[str, set[str]] = {label: set() for label in sorted(labels)}
    for record in records:
        splits[record.label].add(record.split)
    official = any(record.split == "test" for record in records)
    for label, present in splits.items():
        if not present:
            report.stop(label, "the class has no usable image", "Add images, or remove the class.")
        elif official and present == {"test"}:
            report.stop(label, "the class has test images but no training images", "Add some, or remove it.")
        elif official and "test" not in present:
            fix = "Add some; without them its recall cannot be measured."
            report.mention(label, "class without test images", "the class has no test image", fix)
    if not labels and not report.fatal:
        fix = "Give a folder of split/class/*.png, of class/*.png, or a CSV manifest."
        report.stop(".", "no class folder was found", fix)
    elif len(labels) == 1:
        report.stop(".", f"there is only one class, {min(labels)!r}", "Add another.")
