"""Read NIfTI volumes as upright slices.

The axes follow the patient: x points to the right, y to the front, z to the head (nibabel's RAS+). A slice is
displayed in the radiological convention: head or front up, the patient's right on the left. Voxels are not
resampled to squares.

One window applies to the whole volume, from the 1st to the 99th percentile of its voxels. A window per slice
would make all slices equally bright. A window from minimum to maximum would depend on a single hot voxel.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import re
import zlib
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import apply_orientation, io_orientation

from medfocus.images.errors import ImageError, not_finite, too_many_pixels, unpacks_too_large

AXES = "xyz"
MOST_BYTES = 1_000_000_000  # of an unpacked volume
_WINDOW = (1, 99)  # percentiles
_SAMPLE = 4_000_000  # the percentiles use at least this many voxels, or all voxels
_SILENT = logging.Logger("nibabel")  # nibabel logs repairs of headers, which change no voxel
_SILENT.addHandler(logging.NullHandler())
_FIX = "Export it again as a NIfTI file of one volume, or remove it."


class Volume:
    """An open NIfTI file; see ``medfocus.images.stack.Stack``."""

    is_volume = True
    patient_id = modality = body_part = ""  # a NIfTI header has none of them
    is_burnt_in = False

    def __init__(self, data: bytes, name: str, *, most_pixels: int) -> None:
        """Unpack a volume and reorient it. In a file with a fourth dimension, this is the first volume.

        Raises ImageError with ``name`` for broken bytes, more than MOST_BYTES, slices of more than
        ``most_pixels``, fewer voxels than the header declares, and colours or complex numbers.
        """
        self.name, self.sha256 = name, hashlib.sha256(data).hexdigest()
        unpacked = _unpacked(data, name)
        try:
            sort = Nifti2Header if unpacked[4:7] == b"n+2" else Nifti1Header
            header = sort.from_fileobj(io.BytesIO(unpacked), check=False)
            header.check_fix(logger=_SILENT)
            self._voxels, self.volumes = _voxels(header, unpacked, name)
            slope, _ = header.get_slope_inter()
        except ImageError:
            raise
        except Exception as error:  # nibabel raises many types for a broken header
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ImageError(name, "cannot be decoded", f"cannot be decoded ({reason})", _FIX) from error
        self.size = len(unpacked)
        shape = self._voxels.shape
        if max(shape[0] * shape[1], shape[0] * shape[2], shape[1] * shape[2]) > most_pixels:
            raise too_many_pixels(name, f"slices of {' x '.join(map(str, shape))} voxels", most_pixels)
        kind = self._voxels.dtype.kind
        self.mode = "F" if kind == "f" else "L" if self._voxels.dtype.itemsize == 1 else "I;16"
        self._dark, self._bright = _window(self._voxels, name)
        if slope is not None and slope < 0:
            self._dark, self._bright = self._bright, self._dark

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Return the names of every ``every``-th slice along an axis of the patient, in order."""
        return tuple(self._named(axis, number) for number in range(0, self._voxels.shape[axis], every))

    @property
    def only(self) -> str | None:
        """The only slice along z; None if there are several."""
        return self._named(2, 0) if self._voxels.shape[2] == 1 else None

    def find(self, frame: str) -> str:
        """Return the full name of a slice. Raises ImageError if it does not exist."""
        match = re.fullmatch(r"([xyz])=([0-9]{1,9})", frame)
        if match and int(match[2]) < self._voxels.shape[AXES.index(match[1])]:
            return self._named(AXES.index(match[1]), int(match[2]))
        last = ", ".join(f"{axis}={n - 1}" for axis, n in zip(AXES, self._voxels.shape, strict=True))
        fault = f"has no slice {frame!r}; its last slices are {last}"
        raise ImageError(self.name, "no such frame", fault, "Correct the name after the #.")

    def has_window(self, frame: str) -> bool:
        """Return True: the window of the volume applies to every slice."""
        return True

    def pixels(self, frame: str) -> np.ndarray:
        """Return a slice, (H, W) uint8."""
        axis, number = AXES.index(frame[0]), int(frame[2:])
        plane = np.moveaxis(self._voxels, axis, 0)[number].T[::-1, ::-1].astype(np.float64)
        share = (plane - self._dark) / (self._bright - self._dark)  # a negative slope makes dark > bright
        return np.rint(np.clip(np.nan_to_num(share, nan=0.0), 0, 1) * 255).astype(np.uint8)

    def _named(self, axis: int, number: int) -> str:
        return f"{AXES[axis]}={number:0{len(str(self._voxels.shape[axis] - 1))}}"


def _unpacked(data: bytes, name: str) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(
            name, "cannot be decoded", f"cannot be unpacked ({error})", "Copy it again, or remove it."
        ) from error
    if len(unpacked) > MOST_BYTES:
        raise unpacks_too_large(name, MOST_BYTES)
    return unpacked


def _voxels(header: Any, unpacked: bytes, name: str) -> tuple[np.ndarray, int]:
    """Return the first volume, (X, Y, Z) in the patient's axes as stored, and the number of volumes."""
    shape = tuple(int(n) for n in header.get_data_shape())
    dtype = header.get_data_dtype()
    if bytes(header["magic"]).startswith(b"ni1"):
        raise ImageError(name, "unsupported encoding", "has its voxels in a second file (.img)", _FIX)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        fault = f"has voxels of type {header.get_value_label('datatype')}; only grey values are supported"
        raise ImageError(name, "unsupported encoding", fault, _FIX)
    if len(shape) < 2 or min(shape) < 1:
        raise ImageError(name, "no image in the file", f"has shape {shape}, which is not a volume", _FIX)
    first = (*shape, 1)[:3]
    count, offset = math.prod(first), int(header.get_data_offset())
    if count * dtype.itemsize > MOST_BYTES:
        raise unpacks_too_large(name, MOST_BYTES)
    if offset < 0 or offset + count * dtype.itemsize > len(unpacked):
        held = max(0, len(unpacked) - offset)
        fault = f"declares {count * dtype.itemsize} bytes of voxels but holds {held}"
        raise ImageError(name, "truncated file", fault, "Copy it again, or remove it.")
    voxels = np.frombuffer(unpacked, dtype, count, offset).reshape(first, order="F")
    upright = apply_orientation(voxels, io_orientation(header.get_best_affine()))
    return upright, math.prod(shape[3:])


def _window(voxels: np.ndarray, name: str) -> tuple[float, float]:
    """Return the stored values that become black and white; a constant volume becomes black."""
    flat = voxels.ravel(order="K")
    sample = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise not_finite(name)
    dark, bright = (float(value) for value in np.percentile(sample, _WINDOW))
    if dark == bright:  # nearly all voxels are air
        dark, bright = float(sample.min()), float(sample.max())
    return dark, bright if bright > dark else dark + 1
