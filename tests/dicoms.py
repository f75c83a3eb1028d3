"""DICOM and NIfTI files for tests, written like those of scanners."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    generate_uid,
)

from medfocus.images import decode


def dicom(
    stored: np.ndarray, *, frames: Sequence[bytes] = (), syntax: UID = ExplicitVRLittleEndian, **tags: Any
) -> bytes:
    """Return a DICOM file of stored pixels, (H, W), (H, W, 3), or (F, H, W) with NumberOfFrames in ``tags``.

    ``frames`` replaces the pixels by compressed frames of ``syntax``; ``tags`` overwrite the default tags.
    """
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    colour = stored.shape[-1] == 3
    data.Rows, data.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * stored.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(stored.dtype.kind == "i")
    data.PixelData = encapsulate(list(frames)) if frames else stored.tobytes()
    file = io.BytesIO()
    with warnings.catch_warnings():  # some tests write invalid values
        warnings.simplefilter("ignore")
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def jpeg(image: np.ndarray, form: str = "JPEG", **options: Any) -> bytes:
    """Return a compressed frame: JPEG, or JPEG 2000 without boxes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def jpeg2000(stored: np.ndarray, **tags: Any) -> bytes:
    """Return a DICOM file with one frame in lossless JPEG 2000."""
    frame = jpeg(stored, "JPEG2000", no_jp2=True)
    return dicom(stored, frames=[frame], syntax=JPEG2000Lossless, **tags)


def baseline(stored: np.ndarray, **tags: Any) -> bytes:
    """Return a DICOM file with one JPEG frame."""
    return dicom(stored, frames=[jpeg(stored, quality=95)], syntax=JPEGBaseline8Bit, **tags)


def shown(data: bytes, frame: str = "") -> np.ndarray:
    """Return a grey image of a file as it is displayed, (H, W) uint8."""
    stack = decode.open_stack(data, "x")
    assert stack is not None
    pixels = stack.pixels(stack.find(frame) if frame else frame)
    assert pixels.dtype == np.uint8
    return pixels


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    """Write a volume (X, Y, Z); by default its axes point right, forward and up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path
