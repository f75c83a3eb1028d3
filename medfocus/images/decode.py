"""The image edge: bytes to RGB arrays, and the few geometric steps that images and masks share.

An image comes from anywhere, so it meets three limits before any pixel is decoded: its format, its file's
bytes, and the pixels that its header promises. Pillow's own guard against bombs lies behind them, higher up.
DICOM and NIfTI, known by their bytes and not by their names, meet the same limits.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from medfocus.images import stack as frames
from medfocus.images.stack import ImageError, Stack, TooLargeError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # Pillow's names; it opens no file with another decoder
MOST_PIXELS = 64_000_000  # of one image
MOST_BYTES = 256_000_000  # of one file
MOST_KEPT = 1_000_000_000  # of the opened files of several images that are kept for the next of theirs
_CAPTION_HEIGHT = 14  # pixels under each tile of a contact sheet
_GAP = 4  # pixels between tiles


def read_bytes(path: Path, name: str | None = None) -> bytes:
    """An image's file, of which no more is read than an image may have.

    Raises FileNotFoundError and other OSErrors, and ImageError naming ``name`` (default: the path) where it
    is no ordinary file, such as a pipe that would never end, or is too large.
    """
    name = str(path) if name is None else name
    if path.exists() and not path.is_file():
        raise ImageError(name, "is no ordinary file", "Put the image itself there, or remove it.")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    _check_bytes(len(data), name)
    return data


def read_header(data: bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An encoded image whose pixels are still to be decoded, within the limits of this module.

    Raises ImageError, a ValueError, naming ``name``.
    """
    if not data:
        raise ImageError(name, "the file is empty (0 bytes)", "Copy it again or remove it.")
    _check_bytes(len(data), name)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        known = (*formats, "DICOM", "NIFTI") if formats == FORMATS else formats
        fault = f"is no image in a format that is read ({', '.join(known)})"
        raise ImageError(name, fault, "Export it again as PNG, or remove it.") from error
    # Pillow's own guard speaks first where the bounds are passed by far; the sentence is one.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(name, "more") from error
    except Exception as error:
        raise _undecodable(name, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise _too_many_pixels(name, f"{image.width} x {image.height}")
    return image


def open_image(data: bytes, name: str) -> Image.Image:
    """The first frame of an encoded image, fully decoded, in its own mode, EXIF orientation applied.

    Raises ImageError, a ValueError, naming ``name`` when the bytes are empty, broken or cut short, or past
    one of the limits of this module; then no pixel was decoded.
    """
    image = read_header(data, name)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a large image is not copied if it is upright
        return image
    # Broken bytes make Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise _undecodable(name, error) from error


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """An image of any mode -> (H, W, 3) uint8 RGB; see ``decode``. Raises ImageError."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_window(np.asarray(image, dtype=np.float32), name))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)  # a copy, so that it may be written to


def decode(data: bytes, name: str) -> np.ndarray:
    """Encoded image -> (H, W, 3) uint8 RGB.

    Grey beyond 8 bits (and float) is windowed to 8 bits by its own minimum and maximum; alpha is
    composited over black; the EXIF orientation is applied; of several frames of a TIFF the first is taken.
    DICOM and NIfTI are known by their bytes and shown as ``dicom`` and ``nifti`` say; of several frames or
    slices nobody has chosen one, so they are refused.
    Raises ImageError, a ValueError, naming ``name``, the fault and the fix.
    """
    stack = open_stack(data, name)
    if stack is None:
        return to_rgb(open_image(data, name), name)
    if stack.only is None:
        fix = "Name the one that is meant behind a #, or export it as a file of its own."
        raise ImageError(name, "holds several images", fix)
    return _rgb(stack.pixels(stack.only))


def open_stack(data: bytes, name: str) -> Stack | None:
    """A DICOM or NIfTI file, within the limits of this module; None for what is neither by its bytes.

    Raises ImageError, a ValueError, naming ``name``.
    """
    kind = frames.kind(data)
    if not kind:
        return None
    _check_bytes(len(data), name)
    if kind == "dicom":
        from medfocus.images.dicom import Dicom

        return Dicom(data, name, most_pixels=MOST_PIXELS, most_bytes=MOST_BYTES)
    from medfocus.images.nifti import Volume

    return Volume(data, name, most_pixels=MOST_PIXELS)


def read(path: Path) -> np.ndarray:
    """Image file -> (H, W, 3) uint8 RGB; see ``decode``. ``x.dcm#07`` is a frame, see ``stack``.

    Raises FileNotFoundError or ValueError.
    """
    return read_named(path)[1]


def read_named(path: Path) -> tuple[str, np.ndarray]:
    """An image's sha256 hex, as its record has it, and its pixels; see ``read``."""
    file, frame = frames.split(path)
    if frame:
        stack = _lately_opened(file)
        frame = stack.find(frame)
        return frames.digest(stack.sha256, frame), _rgb(stack.pixels(frame))
    data = read_bytes(path)
    return hashlib.sha256(data).hexdigest(), decode(data, str(path))


def frames_of(path: Path) -> list[Path]:
    """The images of a file: its frames or axial slices by their names, or the path itself for its only one.

    Raises FileNotFoundError or ValueError.
    """
    file, frame = frames.split(path)
    if frame or not frames.kind(_head(file)):
        return [path]
    stack = _lately_opened(file)
    if stack.only is not None:
        return [path]
    return [path.with_name(f"{path.name}{frames.MARK}{name}") for name in stack.names()]


def told_by_header(path: Path) -> tuple[str, str]:
    """How and of what a DICOM file was taken, in DICOM's words ("CR", "CHEST"); empty where it is not told.

    Raises FileNotFoundError or ValueError.
    """
    file, _ = frames.split(path)
    if frames.kind(_head(file)) != "dicom":
        return "", ""
    stack = _lately_opened(file)
    return stack.modality, stack.body_part


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


_lately: OrderedDict[tuple[object, ...], Stack] = OrderedDict()
_lately_lock = threading.Lock()


def _lately_opened(file: Path) -> Stack:
    """An opened file of several images, for they are asked for one after the other.

    The last one is kept, and those before it up to MOST_KEPT bytes. Raises as ``read`` does.
    """
    status = file.stat()
    key = (os.path.realpath(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _lately_lock:  # or each of several threads would open it
        stack = _lately.pop(key, None) or open_stack(read_bytes(file), str(file))
        if stack is None:
            raise ImageError(str(file), "holds one image", "Leave out the # and what follows.")
        _lately[key] = stack
        while len(_lately) > 1 and sum(kept.size for kept in _lately.values()) > MOST_KEPT:
            _lately.popitem(last=False)
        return stack


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (H, W, 3)."""
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels)


def grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) float32 luma in [0, 1], with the weights of ITU-R BT.601."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W, 3) @ (3,)
    return np.minimum(luma / np.float32(255), np.float32(1))


def letterbox(image: np.ndarray, size: int, fill: Sequence[int] | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: longest side to ``size``, centred, padded with ``fill``."""
    height, width, top, left = _placement(image.shape[0], image.shape[1], size)
    box = np.empty((size, size, 3), dtype=np.uint8)
    box[:] = np.asarray(fill, dtype=np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    box[top : top + height, left : left + width] = np.asarray(resized)
    return box


def letterbox_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) bool or float in [0, 1] -> (size, size) float32 in [0, 1], 0 in ``letterbox``'s padding."""
    height, width, top, left = _placement(mask.shape[0], mask.shape[1], size)
    box = np.zeros((size, size), dtype=np.float32)
    resized = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    box[top : top + height, left : left + width] = np.clip(np.asarray(resized), 0, 1)
    return box


def montage(tiles: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """Tiles (h, w, 3) uint8, of any sizes -> one contact sheet (H, W, 3) uint8, row by row, on dark grey.

    A caption that is wider than its tile is cut. Raises ValueError for no tiles, or for a number of
    captions that differs from the number of tiles.
    """
    if not tiles or columns < 1:
        raise ValueError(f"montage: {len(tiles)} tiles in {columns} columns; give at least one of each.")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(
            f"montage: {len(captions)} captions for {len(tiles)} tiles; give one a tile or None."
        )
    tile_height = max(tile.shape[0] for tile in tiles)
    tile_width = max(tile.shape[1] for tile in tiles)
    columns = min(columns, len(tiles))
    row_height = tile_height + _GAP + (_CAPTION_HEIGHT if captions is not None else 0)
    size = (columns * (tile_width + _GAP) + _GAP, math.ceil(len(tiles) / columns) * row_height + _GAP)
    sheet = Image.new("RGB", size, (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x, y = _GAP + column * (tile_width + _GAP), _GAP + row * row_height
        sheet.paste(Image.fromarray(tile), (x, y))
        if captions is not None:
            caption = _shortened(captions[i], tile_width, font)
            draw.text((x, y + tile_height + 1), caption, fill=(230, 230, 230), font=font)
    return np.asarray(sheet)


def _check_bytes(count: int, name: str) -> None:
    if count > MOST_BYTES:
        fault = f"the file is larger than {MOST_BYTES // 1_000_000} MB, the most that is read"
        raise TooLargeError(name, fault, "Export it smaller, as a compressed PNG for one, or remove it.")


def _too_many_pixels(name: str, found: str) -> ImageError:
    fault = f"has {found} pixels; {MOST_PIXELS // 1_000_000} megapixels are the most that is decoded"
    return TooLargeError(name, fault, "Scale it down or cut it into tiles, or remove it.")


def _undecodable(name: str, error: Exception) -> ImageError:
    return ImageError(name, f"cannot be decoded ({error})", "Export it again as PNG, or remove it.")


def _window(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) float32 -> (H, W) uint8, the minimum to 0 and the maximum to 255; a constant image to 0."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(name, "holds values that are not finite", "Replace them and export it again.")
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def _placement(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Height and width after resizing the longest side to ``size``, and the top left corner, centred."""
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return new_height, new_width, (size - new_height) // 2, (size - new_width) // 2


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
