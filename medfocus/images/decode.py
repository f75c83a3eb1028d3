"""Decode image files to RGB arrays, within limits.

Images come from untrusted sources, so three limits apply before any pixel is decoded: the format, the bytes
of the file, and the pixels that its header declares. Pillow's own limit against decompression bombs is
higher. DICOM and NIfTI files are recognised by their bytes, not by their names, and have the same limits.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medfocus.images import stack as stacks
from medfocus.images.errors import ImageError, TooLargeError, not_finite, too_many_pixels
from medfocus.images.stack import Stack

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # Pillow's names; its other decoders are not used
MOST_PIXELS = 64_000_000  # per image
MOST_BYTES = 256_000_000  # per file
_MOST_CACHED = 1_000_000_000  # bytes of open stacks
_EXPORT = "Export it again as PNG, or remove it."


def read_bytes(path: Path, name: str | None = None) -> bytes:
    """Read an image file, up to MOST_BYTES.

    Raises OSError, or ImageError with ``name`` (default: the path) if the file is too large or is not a
    regular file, such as a pipe that never ends.
    """
    name = str(path) if name is None else name
    if path.exists() and not path.is_file():
        fix = "Replace it with the image itself, or remove it."
        raise ImageError(name, "not a regular file", "is not a regular file", fix)
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    _check_bytes(len(data), name)
    return data


def read_header(data: bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an encoded image within the limits, without decoding pixels. Raises ImageError with ``name``."""
    if not data:
        raise ImageError(name, "empty file", "the file is empty (0 bytes)", "Copy it again or remove it.")
    _check_bytes(len(data), name)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        known = (*formats, "DICOM", "NIFTI") if formats == FORMATS else formats
        fault = f"is not in a supported image format ({', '.join(known)})"
        raise ImageError(name, "unknown image format", fault, _EXPORT) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # far above the limit
        raise too_many_pixels(name, "too many pixels", MOST_PIXELS) from error
    except Exception as error:
        raise _undecodable(name, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise too_many_pixels(name, f"{image.width} x {image.height} pixels", MOST_PIXELS)
    return image


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode the first frame of an encoded image in its own mode, and apply the EXIF orientation.

    Raises ImageError with ``name`` if the bytes are empty, broken or truncated, or if the image exceeds a
    limit. An image above a limit is not decoded.
    """
    image = read_header(data, name)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # in place, so that an upright image is not copied
        return image
    except Exception as error:  # broken bytes: OSError, SyntaxError, struct.error, ...
        raise _undecodable(name, error) from error


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert an image of any mode to (H, W, 3) uint8 RGB; see ``decode``. Raises ImageError."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_window(np.asarray(image, dtype=np.float32), name))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)  # a writable copy


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode an encoded image to (H, W, 3) uint8 RGB.

    Grey values of more than 8 bits, and floats, are scaled from their minimum and maximum to 0 and 255. Alpha
    is composited over black. The EXIF orientation is applied. Only the first frame of a TIFF is decoded.

    ``dicom`` and ``nifti`` define how their files are displayed. A file with several images is refused,
    because the caller must choose one of them. Raises ImageError with ``name``.
    """
    stack = open_stack(data, name)
    if stack is None:
        return to_rgb(open_image(data, name), name)
    if stack.only is None:
        fix = "Name one of them after a #, or export it as a separate file."
        raise ImageError(name, "several images in one file", "holds several images", fix)
    return _rgb(stack.pixels(stack.only))


def open_stack(data: bytes, name: str) -> Stack | None:
    """Open a DICOM or NIfTI file within the limits; return None for any other file.

    Raises ImageError with ``name``.
    """
    kind = stacks.kind(data)
    if not kind:
        return None
    _check_bytes(len(data), name)
    if kind == "dicom":
        from medfocus.images.dicom import Dicom

        return Dicom(data, name, most_pixels=MOST_PIXELS, most_bytes=MOST_BYTES)
    from medfocus.images.nifti import Volume

    return Volume(data, name, most_pixels=MOST_PIXELS)


def read(path: Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB; see ``decode``. ``x.dcm#07`` names a frame; see ``stack``.

    Raises FileNotFoundError or ImageError.
    """
    return read_named(path)[1]


def read_named(path: Path) -> tuple[str, np.ndarray]:
    """Return the sha256 hex of an image, as in its record, and its pixels; see ``read``."""
    file, frame = stacks.split(path)
    if frame:
        stack = _open_cached(file)
        frame = stack.find(frame)
        return stacks.digest(stack.sha256, frame), _rgb(stack.pixels(frame))
    data = read_bytes(path)
    return hashlib.sha256(data).hexdigest(), decode(data, str(path))


def frames_of(path: Path) -> list[Path]:
    """Return a path for each frame or axial slice of a file; for a file of one image, its own path.

    Raises FileNotFoundError or ImageError.
    """
    file, frame = stacks.split(path)
    if frame or not stacks.kind(_head(file)):
        return [path]
    stack = _open_cached(file)
    if stack.only is not None:
        return [path]
    return [path.with_name(f"{path.name}{stacks.MARK}{name}") for name in stack.names()]


def modality_and_body_part(path: Path) -> tuple[str, str]:
    """Return the modality and body part from a DICOM header, such as "CR" and "CHEST"; "" where unknown.

    Raises FileNotFoundError or ImageError.
    """
    file, _ = stacks.split(path)
    if stacks.kind(_head(file)) != "dicom":
        return "", ""
    stack = _open_cached(file)
    return stack.modality, stack.body_part


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


_cache: OrderedDict[tuple[object, ...], Stack] = OrderedDict()
_cache_lock = threading.Lock()


def _open_cached(file: Path) -> Stack:
    """Open a stack, or return it from the cache, because the next frame usually comes from the same file.

    The cache always keeps the last stack, and earlier ones up to _MOST_CACHED bytes. Raises as ``read`` does.
    """
    status = file.stat()
    key = (os.path.realpath(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _cache_lock:  # otherwise several threads would open the same file
        stack = _cache.pop(key, None) or open_stack(read_bytes(file), str(file))
        if stack is None:
            fix = "Remove the # and the text after it."
            raise ImageError(str(file), "no such frame", "holds one image", fix)
        _cache[key] = stack
        while len(_cache) > 1 and sum(kept.size for kept in _cache.values()) > _MOST_CACHED:
            _cache.popitem(last=False)
        return stack


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W) or (H, W, 3) uint8 as (H, W, 3)."""
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels)


def _check_bytes(count: int, name: str) -> None:
    if count > MOST_BYTES:
        fault = f"the file is larger than {MOST_BYTES // 1_000_000} MB, the limit"
        fix = "Export it smaller, for example as a compressed PNG, or remove it."
        raise TooLargeError(name, "file too large", fault, fix)


def _undecodable(name: str, error: Exception) -> ImageError:
    return ImageError(name, "cannot be decoded", f"cannot be decoded ({error})", _EXPORT)


def _window(values: np.ndarray, name: str) -> np.ndarray:
    """Scale (H, W) float32 to uint8: the minimum to 0, the maximum to 255, and a constant image to 0."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise not_finite(name)
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
