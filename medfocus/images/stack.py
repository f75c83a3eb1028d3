"""Recognise files of several images, and name one image in such a file.

``x.dcm#07`` is a frame of a DICOM file, counted from 0; ``x.nii.gz#z=057`` is a slice of a NIfTI volume. The
numbers are padded with zeros, so that names sort in order. An existing file may have a ``#`` in its name.
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
_NIFTI_HEADERS = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}  # size -> offset, magic
_PAIRED = (344, b"ni1\0")  # offset and magic of a header with its voxels in another file
_LONGEST = 256  # upper bound of bytes of the first element in a DICOM file without preamble


class Stack(Protocol):
    """An open file of one or more images of the same size; see ``dicom`` and ``nifti``."""

    sha256: str  # of the file's bytes
    mode: str  # Pillow's mode of the stored values: "L", "I;16", "F", "RGB"
    size: int  # bytes in memory
    is_volume: bool  # whether the images are slices
    volumes: int  # number of volumes; only the first is used
    patient_id: str  # from the header, only for ``medfocus.datasets.pseudonyms``; "" where unknown
    modality: str  # DICOM term: "CR", "DX", "CT", "MR", "US", ...; "" where unknown
    body_part: str  # DICOM term: "CHEST", "HEAD", ...; "" where unknown
    is_burnt_in: bool  # whether the pixels contain text, according to the header

    @property
    def only(self) -> str | None:
        """The name of the only image; None if there are several."""
        ...

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Return the names of the images in order; in a volume, of every ``every``-th slice along an axis."""
        ...

    def find(self, frame: str) -> str:
        """Return the full name of an image from a name with or without leading zeros. Raises ImageError."""
        ...

    def has_window(self, frame: str) -> bool:
        """Return whether the display range is known. If not, it is the image's minimum to maximum."""
        ...

    def pixels(self, frame: str) -> np.ndarray:
        """Return an image, (H, W) or (H, W, 3) uint8. Raises ImageError."""
        ...


def kind(data: bytes) -> Literal["dicom", "nifti", ""]:
    """Return the kind of a file from its first bytes; "" if it is neither DICOM nor NIfTI."""
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
    """Split a path into a file and the name of an image in it; "" if the path names no image in a file."""
    file, _, frame = path.name.rpartition(MARK)
    try:
        if not file or path.exists() or not path.with_name(file).is_file():
            return path, ""
    except (OSError, ValueError):  # the name is too long or holds a null byte
        return path, ""
    return path.with_name(file), frame


def stem(name: str) -> str:
    """Return a file's name without its suffix; .nii.gz counts as one suffix."""
    is_packed = name.casefold().endswith(".nii.gz")
    return name[: -len(".nii.gz")] if is_packed else Path(name).stem


def flat(name: str) -> str:
    """Return the stem for files derived from an image: ``x_07`` for ``x.dcm#07``."""
    match = re.fullmatch(r"(.+)#(\d+|[xyz]=\d+)", name)
    return f"{stem(match[1])}_{match[2]}" if match else stem(name)


def digest(sha256: str, frame: str) -> str:
    """Return the sha256 hex that identifies an image in a file; without ``frame``, the file's own sha256."""
    return hashlib.sha256(f"{sha256}{MARK}{frame}".encode()).hexdigest() if frame else sha256


def _begins_as_dicom(data: bytes) -> bool:
    """Return whether the data begin with a DICOM element without a preamble, as no other format does."""
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
