"""Listed files -> records: every image of them is decoded once, or was by these bytes before."""

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

from medfocus.datasets.listing import Listed, Report, label_of
from medfocus.datasets.pseudonyms import Salt
from medfocus.datasets.records import Record, chunks
from medfocus.images import decode, stack
from medfocus.images.stack import ImageError
from medfocus.storage.shards import Shards

_AT_ONCE = 1000  # images of which the cache is asked together
_volumes = threading.Semaphore(2)  # a volume may take a gigabyte


@dataclass(frozen=True)
class Reading:
    """How files of several images, and the patients in their headers, are read."""

    axis: int  # of the patient's, along which a volume is cut: 0 sagittal, 1 coronal, 2 axial
    every: int  # so many'th slice is taken
    salt: Salt

    def key(self, data: bytes, frame: str) -> str:
        """sha256 hex that names what is known of a file; of most it is their own."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not stack.kind(data):
            return sha256
        salt = self.salt.fingerprint if stack.kind(data) == "dicom" else ""
        content = f"{sha256} {frame} {self.axis} {self.every} {salt}"
        return hashlib.sha256(content.encode()).hexdigest()


class _Facts(NamedTuple):
    """What decoding a file says of it."""

    sha256: str
    width: int
    height: int
    mode: str
    frames: int  # of a TIFF or, of a NIfTI file, its volumes; of both the first is used
    names: Sequence[str] = ("",)  # of its images
    patient: str = ""  # a pseudonym
    is_group: bool = False  # whether it is a group of images of one patient's, whoever that is
    constant: int = 0  # slices of one shade, which are left out
    without_window: int = 0  # images that are shown from their minimum to their maximum
    is_burnt_in: bool = False


def open_all(
    root: Path,
    files: Sequence[Listed],
    reading: Reading,
    workers: int | None,
    progress: bool,
    known: Shards | None,
    report: Report,
) -> list[Record]:
    """Every image that can be used as a record; the others are left out of it in ``report``."""
    records: list[Record] = []
    without_window = without_patient = 0
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,  # Pillow decodes outside of the GIL
        tqdm(desc="images", total=len(files), disable=not progress) as bar,
    ):
        for some in chunks(files, _AT_ONCE):
            there: dict[str, _Facts] = {}
            if known is not None:
                keys = {key for key in pool.map(lambda item: _key(root, item, reading), some) if key}
                there = {key: _Facts(*json.loads(facts)) for key, facts in known.read(keys)}
            opened = pool.map(lambda item, there=there: _open(root, item, reading, there), some)
            for item, result in zip(some, opened, strict=True):
                bar.update()
                if isinstance(result, ImageError):
                    report.leave_out(item.path, result.fault, result.fix)
                    continue
                key, facts = result
                records += _records(root, item, facts)
                _tell(item.path, facts, report)
                without_window += facts.without_window
                without_patient += facts.is_group and not (item.patient or facts.patient)
                if known is not None and key not in there:
                    known.put([(key, json.dumps(facts).encode())])
    if known is not None:
        known.close()
    _tell_of_all(without_window, without_patient, report)
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


def _tell(path: str, facts: _Facts, report: Report) -> None:
    if facts.frames > 1:
        what = "volumes" if facts.is_group else "images"
        fault = f"holds {facts.frames} {what}, of which the first is used"
        report.mention(path, fault, "Export each as a file of its own.")
    if facts.constant:
        some = "1 slice" if facts.constant == 1 else f"{facts.constant} slices"
        report.mention(path, f"has {some} of one shade, left out", "Nothing to do: the others are used.")
    if facts.is_burnt_in:
        fault = "has text burnt into its pixels, as its header says, which may name the patient"
        report.mention(path, fault, "Look at it before its images are shown to others.")


def _tell_of_all(without_window: int, without_patient: int, report: Report) -> None:
    if without_window:
        fault = f"{without_window} DICOM images have no window, so each goes from its minimum to its maximum"
        report.mention(".", fault, "Export them with a window if they look wrong.")
    if without_patient:
        fault = f"files of several images without a known patient: {without_patient}; each counts as one"
        report.mention(".", fault, "Give patients by a manifest or a pattern if they have several files.")


def _once_each(records: list[Record], report: Report) -> list[Record]:
    """A slice may be listed by itself and with its file: twice the same is once, else it is left out."""
    found: dict[str, set[Record]] = defaultdict(set)
    for record in records:
        found[record.path].add(record)
    for path, same in found.items():
        if len(same) > 1:
            fault = "is listed by itself and with its file, with different labels, splits or patients"
            report.leave_out(path, fault, "Decide which row is right and remove the other.")
    return [record for (record, *others) in found.values() if not others]


def _key(root: Path, item: Listed, reading: Reading) -> str | None:
    """The name of a file's facts; None where it cannot be read, of which ``_open`` tells."""
    try:
        file, frame = stack.split(root / item.path)
        return reading.key(decode.read_bytes(file, item.path), frame)
    except (OSError, ImageError):
        return None


def _open(
    root: Path, item: Listed, reading: Reading, known: Mapping[str, _Facts]
) -> tuple[str, _Facts] | ImageError:
    """The name of a file's facts and these, or why it is no image; decoded where it is not ``known``."""
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
            fix = "Leave out the # and what follows."
            return ImageError(item.path, "is one image of a file that has no others", fix)
        image = decode.open_image(data, item.path)
        decode.to_rgb(image, item.path)
        count = _frames(data, item.path) if image.format == "TIFF" else 1
    except OSError as error:
        return ImageError(item.path, f"cannot be read ({error.strerror})", "Copy or link it again.")
    except ImageError as error:
        return error
    return key, _Facts(key, image.width, image.height, image.mode, count)


def _of_stack(data: bytes, name: str, frame: str, reading: Reading) -> _Facts:
    """The facts of a DICOM or NIfTI file, or of the one image ``frame`` in it."""
    stack = decode.open_stack(data, name)
    assert stack is not None  # by its first bytes it is one
    names, constant, without_window, width, height = [], 0, 0, 0, 0
    for found in [stack.find(frame)] if frame else stack.names(reading.axis, reading.every):
        pixels = stack.pixels(found)
        if stack.is_volume and not frame and pixels.min() == pixels.max():
            constant += 1
            continue
        names.append(found)
        height, width = pixels.shape[:2]
        without_window += not stack.has_window(found)
    if not names:
        raise ImageError(name, "holds slices of one shade alone", "Take another, or remove it.")
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
    except Exception as error:  # as in ``decode.open_image``
        fault = f"holds several images, of which a later one is broken ({error})"
        raise ImageError(name, fault, "Export the first as PNG, or remove it.") from error
