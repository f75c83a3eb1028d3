"""Files that hold several images: how they are known, and how one image in them is named.

``x.dcm#07`` is a frame of a DICOM file, from 0; ``x.nii.gz#z=057`` a slice of a NIfTI volume. The numbers are
padded with zeros, so that sorting is order. A file whose own name has a ``#`` stays that file.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

MARK = "#"
_NIFTI_HEADERS = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}  # size of a header -> its magic's place
_PAIRED = (344, b"ni1\0")  # a header whose voxels lie in another file
_LONGEST = 256  # bytes of the first element of a DICOM file without a preamble


class ImageError(ValueError):
    """A file that is no usable image: which, why, and what to do."""

    def __init__(self, name: str, fault: str, fix: str) -> None:
        super().__init__(f"{name}: {fault}. {fix}")
        self.name, self.fault, self.fix = name, fault, fix

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        """So that a worker process can hand it back."""
        return type(self), (self.name, self.fault, self.fix)


class TooLargeError(ImageError):
    """A file past a limit of ``medfocus.images.decode``, however good it may be."""


class Stack(Protocol):
    """An opened file of one image or more, all of one size; see ``dicom`` and ``nifti``."""

    sha256: str  # of the file's bytes
    mode: str  # Pillow's word for what is stored: "L", "I;16", "F", "RGB"
    size: int  # bytes that it keeps in memory
    is_volume: bool  # whether its images are slices
    volumes: int  # of which the first is used
    patient_id: str  # as the header has it, for ``medfocus.datasets.pseudonyms`` alone; "" where it has none
    modality: str  # DICOM's word: "CR", "DX", "CT", "MR", "US", ...; "" where unknown
    body_part: str  # DICOM's word: "CHEST", "HEAD", ...; "" where unknown
    is_burnt_in: bool  # whether the header says that there is text in the pixels

    @property
    def only(self) -> str | None:
        """The name of its one image; None where it has several."""
        ...

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Its images in their order; of a volume every so many'th slice along an axis of the patient's."""
        ...

    def find(self, frame: str) -> str:
        """The full name of an image that is named with or without zeros. Raises ImageError."""
        ...

    def has_window(self, frame: str) -> bool:
        """Whether it is known how to show the image; else it goes from its minimum to its maximum."""
        ...

    def pixels(self, frame: str) -> np.ndarray:
        """(H, W) or (H, W, 3) uint8. Raises ImageError."""
        ...


def kind(data: bytes) -> Literal["dicom", "nifti", ""]:
    """What a file is by its first bytes; "" for what is neither DICOM nor NIfTI."""
    if data[128:132] == b"DICM" or _begins_as_dicom(data):
        return "dicom"
    head = data[:544]
    if data[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(data[:4096], 544)
        except zlib.error:
            return ""
    return "nifti" if _begins_as_nifti(head) else ""


def split(path: Path) -> tuple[Path, str]:
    """A file, and the name of the image in it: "" for a file that is one image, or that is not there."""
    file, _, frame = path.name.rpartition(MARK)
    try:
        if not file or path.exists() or not path.with_name(file).is_file():
            return path, ""
    except (OSError, ValueError):  # too long a name, or one with a null byte
        return path, ""
    return path.with_name(file), frame


def stem(name: str) -> str:
    """A file's name without its suffix, .nii.gz being one."""
    packed = name.casefold().endswith(".nii.gz")
    return name[: -len(".nii.gz")] if packed else Path(name).stem


def flat(name: str) -> str:
    """An image's name for files that are made of it: that of ``x.dcm#07`` is ``x_07``."""
    found = re.fullmatch(r"(.+)#(\d+|[xyz]=\d+)", name)
    return f"{stem(found[1])}_{found[2]}" if found else stem(name)


def digest(sha256: str, frame: str) -> str:
    """sha256 hex that names one image of a file with that sha256: the file's own for its only one."""
    return hashlib.sha256(f"{sha256}{MARK}{frame}".encode()).hexdigest() if frame else sha256


def _begins_as_dicom(data: bytes) -> bool:
    """Whether a file without a preamble begins with an element of DICOM's; no image's format does."""
    if len(data) < 12 or data[:2] not in (b"\x02\0", b"\x08\0") or data[3] != 0:
        return False
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    return explicit or struct.unpack_from("<I", data, 4)[0] <= min(_LONGEST, len(data))


def _begins_as_nifti(head: bytes) -> bool:
    if len(head) < 348:
        return False
    for order in "<>":
        place, magic = _NIFTI_HEADERS.get(struct.unpack_from(f"{order}i", head)[0], (0, b"\0"))
        if head[place : place + len(magic)] == magic != b"\0":
            return True
        if magic != b"\0" and head[_PAIRED[0] : _PAIRED[0] + 4] == _PAIRED[1]:
            return True
    return False
