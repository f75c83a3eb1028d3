"""NIfTI: the bytes of a volume -> its slices, upright.

The axes are turned to those of the patient: x to the right, y to the front, z to the head (nibabel's RAS+). A
slice is shown as radiologists look at it, head or front up, the patient's right on the left. Voxels are not
made square.

One window for the whole volume, from the 1st to the 99th percentile of its voxels: with a window of its own
every slice would look alike bright, and minimum and maximum are set by one hot voxel or one speck of metal.
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

from medfocus.images.stack import ImageError, TooLargeError

AXES = "xyz"
MOST_BYTES = 1_000_000_000  # of a volume, unpacked
_WINDOW = (1, 99)  # percentiles
_SAMPLE = 4_000_000  # voxels that the percentiles are taken from, at least, where there are more
_SILENT = logging.Logger("nibabel")  # what it mends in a header changes no voxel
_SILENT.addHandler(logging.NullHandler())
_FIX = "Export it again as a NIfTI file of one volume, or remove it."


class Volume:
    """An opened NIfTI file; see ``medfocus.images.stack.Stack``."""

    is_volume = True
    patient_id = modality = body_part = ""  # a NIfTI header has none
    is_burnt_in = False

    def __init__(self, data: bytes, name: str, *, most_pixels: int) -> None:
        """Unpack and turn a volume; of four dimensions, the first of its volumes.

        Raises ImageError naming ``name`` for broken bytes, more than MOST_BYTES, slices of more than
        ``most_pixels``, a header that promises more than there is, and colours or complex numbers.
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
        except Exception as error:  # nibabel raises nearly anything of a broken header
            said = " ".join(str(error).split())[:300]
            raise ImageError(name, f"cannot be decoded ({said or type(error).__name__})", _FIX) from error
        self.size = len(unpacked)
        shape = self._voxels.shape
        if max(shape[0] * shape[1], shape[0] * shape[2], shape[1] * shape[2]) > most_pixels:
            fault = (
                f"has slices of {' x '.join(map(str, shape))} voxels; {most_pixels // 1_000_000} megapixels"
            )
            raise TooLargeError(name, f"{fault} are the most that is decoded", "Scale it down, or remove it.")
        kind = self._voxels.dtype.kind
        self.mode = "F" if kind == "f" else "L" if self._voxels.dtype.itemsize == 1 else "I;16"
        self._dark, self._bright = _window(self._voxels, name)
        if slope is not None and slope < 0:
            self._dark, self._bright = self._bright, self._dark

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Every so many'th slice along an axis of the patient's, in their order."""
        return tuple(self._named(axis, number) for number in range(0, self._voxels.shape[axis], every))

    @property
    def only(self) -> str | None:
        """The one slice of a volume that has one along z."""
        return self._named(2, 0) if self._voxels.shape[2] == 1 else None

    def find(self, frame: str) -> str:
        """A slice's full name. Raises ImageError where there is no such slice."""
        found = re.fullmatch(r"([xyz])=([0-9]{1,9})", frame)
        if found and int(found[2]) < self._voxels.shape[AXES.index(found[1])]:
            return self._named(AXES.index(found[1]), int(found[2]))
        ends = ", ".join(f"{axis}={n - 1}" for axis, n in zip(AXES, self._voxels.shape, strict=True))
        fault = f"has no slice {frame!r}; they go from 0 to {ends}"
        raise ImageError(self.name, fault, "Correct what stands behind the #.")

    def has_window(self, frame: str) -> bool:
        """Every slice has the volume's."""
        return True

    def pixels(self, frame: str) -> np.ndarray:
        """(H, W) uint8."""
        axis, number = AXES.index(frame[0]), int(frame[2:])
        plane = np.moveaxis(self._voxels, axis, 0)[number].T[::-1, ::-1].astype(np.float64)
        share = (plane - self._dark) / (self._bright - self._dark)  # dark above bright: a negative slope
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
        raise ImageError(name, f"cannot be unpacked ({error})", "Copy it again, or remove it.") from error
    if len(unpacked) > MOST_BYTES:
        raise _too_large(name)
    return unpacked


def _voxels(header: Any, unpacked: bytes, name: str) -> tuple[np.ndarray, int]:
    """The first volume (X, Y, Z) in the patient's axes, its voxels as stored; and how many there are."""
    shape = tuple(int(n) for n in header.get_data_shape())
    dtype = header.get_data_dtype()
    if bytes(header["magic"]).startswith(b"ni1"):
        raise ImageError(name, "has its voxels in a second file (.img)", _FIX)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        fault = f"has voxels of type {header.get_value_label('datatype')}, which are no shades of grey"
        raise ImageError(name, fault, _FIX)
    if len(shape) < 2 or min(shape) < 1:
        raise ImageError(name, f"has the shape {shape}, which is no volume", _FIX)
    first = (*shape, 1)[:3]
    count, offset = math.prod(first), int(header.get_data_offset())
    if count * dtype.itemsize > MOST_BYTES:
        raise _too_large(name)
    if offset < 0 or offset + count * dtype.itemsize > len(unpacked):
        fault = (
            f"promises {count * dtype.itemsize} bytes of voxels and holds {max(0, len(unpacked) - offset)}"
        )
        raise ImageError(name, fault, "Copy it again, or remove it.")
    voxels = np.frombuffer(unpacked, dtype, count, offset).reshape(first, order="F")
    turned = apply_orientation(voxels, io_orientation(header.get_best_affine()))
    return turned, math.prod(shape[3:])


def _window(voxels: np.ndarray, name: str) -> tuple[float, float]:
    """The values that become black and white, as they are stored; of a constant volume all becomes black."""
    flat = voxels.ravel(order="K")
    some = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)
    some = some[np.isfinite(some)]
    if not some.size:
        raise ImageError(name, "holds no value that is finite", "Replace them and export it again.")
    dark, bright = (float(value) for value in np.percentile(some, _WINDOW))
    if dark == bright:  # nearly all of it is air
        dark, bright = float(some.min()), float(some.max())
    return dark, bright if bright > dark else dark + 1


def _too_large(name: str) -> ImageError:
    fault = f"unpacks to more than {MOST_BYTES // 1_000_000} MB, the most that is read"
    return TooLargeError(name, fault, "Cut it into volumes that are smaller, or remove it.")
