"""Turn listed files into records: decode each image once, unless the cache knows its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from medfocus.datasets.faults import IngestReport
from medfocus.datasets.listing import Listed, label_of
from medfocus.datasets.pseudonyms import Salt
from medfocus.datasets.records import Record, chunks
from medfocus.images import decode, stack
from medfocus.images.errors import ImageError
from medfocus.storage.shards import Shards

_BATCH = 1000  # images per read of the cache
_volumes = threading.Semaphore(2)  # volumes in memory; one may take a gigabyte


@dataclass(frozen=True)
class Reading:
    """Settings for files of several images and the patients in their headers."""

    axis: int  # axis along which a volume is cut: 0 sagittal, 1 coronal, 2 axial
    every: int  # take every ``every``-th slice
    salt: Salt

    def key(self, data: bytes, frame: str) -> str:
        """Return the sha256 hex under which the cache keeps the facts of a file."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not stack.kind(data):
            return sha256
        salt = self.salt.fingerprint if stack.kind(data) == "dicom" else ""
        content = f"{sha256} {frame} {self.axis} {self.every} {salt}"
        return hashlib.sha256(content.encode()).hexdigest()


class _Facts(NamedTuple):
    """The properties of a file that only decoding reveals."""

    sha256: str
    width: int
    height: int
    mode: str
    frames: int  # frames of a TIFF, volumes of a NIfTI file; only the first is used
    names: Sequence[str] = ("",)  # the name of each image in the file
    patient: str = ""  # a pseudonym
    is_group: bool = False  # whether the file holds several images of one patient
    constant: int = 0  # constant slices, which are left out
    without_window: int = 0  # images displayed from their minimum to their maximum
    is_burnt_in: bool = False


def open_all(
    root: Path,
    files: Sequence[Listed],
    reading: Reading,
    workers: int | None,
    progress: bool,
    known: Shards | None,
    report: IngestReport,
) -> list[Record]:
    """Return a record for each usable image, and report each other image as left out."""
    records: list[Record] = []
    without_window = without_patient = 0
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # Pillow decodes without the GIL
        tqdm(desc="images", total=len(files), disable=not progress) as bar,
    ):
        for batch in chunks(files, _BATCH):
            cached: dict[str, _Facts] = {}
            if known is not None:
                keys = {key for key in pool.map(lambda item: _key(root, item, reading), batch) if key}
                cached = {key: _Facts(*json.loads(facts)) for key, facts in known.read(keys)}
            opened = pool.map(lambda item, cached=cached: _open(root, item, reading, cached), batch)
            for item, result in zip(batch, opened, strict=True):
                bar.update()
                if isinstance(result, ImageError):
                    report.leave_out(item.path, result.kind, result.fault, result.fix)
                    continue
                key, facts = result
                records += _records(root, item, facts)
                _mention(item.path, facts, report)
                without_window += facts.without_window
                without_patient += facts.is_group and not (item.patient or facts.patient)
                if known is not None and key not in cached:
                    known.put([(key, json.dumps(facts).encode())])
    if known is not None:
        known.close()
    _mention_totals(without_window, without_patient, report)
    return _once_each(records, report)


def _records(root: Path, item: Listed, facts: _Facts) -> list[Record]:
    named = stack.split(root / item.path)[1]
    file = item.path.removesuffix(f"{stack.MARK}{named}") if named else item.path
    patient = item.patient or facts.patient or (f"file-{facts.sha256[:16]}" if facts.is_group else "")
    return [
        Record(
            f"{file}{stack.MARK}{name}" if name else file,
            stack.digest(facts.sha256, name),
            facts.width,
            facts.height,
            facts.mode,
            label_of(item.label),
            item.split,
            patient,
        )
        for name in facts.names
    ]


def _mention(path: str, facts: _Facts, report: IngestReport) -> None:
    if facts.frames > 1:
        unit = "volumes" if facts.is_group else "images"
        fault = f"holds {facts.frames} {unit}; only the first is used"
        report.mention(path, "several images in one file", fault, "Export each as a separate file.")
    if facts.constant:
        fault = f"holds {facts.constant} constant slice(s), which are left out"
        report.mention(path, "constant slices", fault, "Nothing to do: the other slices are used.")
    if facts.is_burnt_in:
        fault = "has text in its pixels, according to its header; the text may name the patient"
        report.mention(path, "text in the pixels", fault, "Check the images before you show them to others.")


def _mention_totals(without_window: int, without_patient: int, report: IngestReport) -> None:
    if without_window:
        fault = f"{without_window} DICOM images have no window and are displayed from minimum to maximum"
        fix = "Export them with a window if they look wrong."
        report.mention(".", "images without a known display range", fault, fix)
    if without_patient:
        fault = f"{without_patient} files of several images have no patient; each counts as one patient"
        fix = "Give patients in a manifest or by a pattern if a patient has several files."
        report.mention(".", "images without a patient", fault, fix)


def _once_each(records: list[Record], report: IngestReport) -> list[Record]:
    """Merge the records of an image listed by itself and with its file; leave it out if they differ."""
    by_path: dict[str, set[Record]] = defaultdict(set)
    for record in records:
        by_path[record.path].add(record)
    for path, same in by_path.items():
        if len(same) > 1:
            fault = "is listed by itself and with its file, with different labels, splits or patients"
            report.leave_out(path, "conflicting rows", fault, "Keep the correct row and remove the other.")
    return [record for (record, *others) in by_path.values() if not others]


def _key(root: Path, item: Listed, reading: Reading) -> str | None:
    """Return the key of a file's facts; None if the file cannot be read, as ``_open`` will report."""
    try:
        file, frame = stack.split(root / item.path)
        return reading.key(decode.read_bytes(file, item.path), frame)
    except (OSError, ImageError):
        return None


def _open(
    root: Path, item: Listed, reading: Reading, known: Mapping[str, _Facts]
) -> tuple[str, _Facts] | ImageError:
    """Return key and facts of a file, or its error. Decode the file only if its facts are not ``known``."""
    try:
        file, frame = stack.split(root / item.path)
        data = decode.read_bytes(file, item.path)
        key = reading.key(data, frame)
        if key in known:
            return key, known[key]
        if stack.kind(data):
            with _volumes:
                return key, _of_stack(data, item.path, frame, reading)
        if frame:
            fix = "Remove the # and the text after it."
            return ImageError(item.path, "no such frame", "names a frame, but the file holds one image", fix)
        image = decode.open_image(data, item.path)
        decode.to_rgb(image, item.path)
        count = _frames(data, item.path) if image.format == "TIFF" else 1
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
        return ImageError(item.path, "cannot be read", fault, "Copy or link it again.")
    except ImageError as error:
        return error
    return key, _Facts(key, image.width, image.height, image.mode, count)


def _of_stack(data: bytes, name: str, frame: str, reading: Reading) -> _Facts:
    """Return the facts of a DICOM or NIfTI file, or of the image ``frame`` in it."""
    stack = decode.open_stack(data, name)
    assert stack is not None  # the caller has checked the kind
    names, constant, without_window, width, height = [], 0, 0, 0, 0
    for image in [stack.find(frame)] if frame else stack.names(reading.axis, reading.every):
        pixels = stack.pixels(image)
        if stack.is_volume and not frame and pixels.min() == pixels.max():
            constant += 1
            continue
        names.append(image)
        height, width = pixels.shape[:2]
        without_window += not stack.has_window(image)
    if not names:
        raise ImageError(name, "constant slices", "holds only constant slices", "Remove it.")
    return _Facts(
        stack.sha256,
        width,
        height,
        stack.mode,
        stack.volumes,
        names,
        reading.salt.pseudonym(stack.patient_id),
        stack.is_volume or stack.only is None,
        constant,
        without_window,
        stack.is_burnt_in,
    )


def _frames(data: bytes, name: str) -> int:
    try:
        with decode.read_header(data, name) as stack:
            return getattr(stack, "n_frames", 1)
    except Exception as error:  # see ``decode.open_image``
        fault, fix = (
            f"holds a broken image after the first ({error})",
            "Export the first as PNG, or remove it.",
        )
        raise ImageError(name, "several images in one file", fault, fix) from error
