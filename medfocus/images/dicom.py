"""Read DICOM files as images, displayed as a viewer first displays them.

Grey images: apply the modality LUT or rescale, then the first VOI LUT or else the first window, then invert
MONOCHROME1. Without a LUT or window, 8-bit values stay unchanged, and deeper values are scaled from their
minimum to their maximum. Padding is black and does not influence the window. Colour images: palettes and YBR
become RGB. Overlays are not drawn.

Only the tags below are read, so that no other text of the header can appear in an error. pydicom's warnings
are suppressed, because they show values.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pydicom
from pydicom.datadict import dictionary_has_tag
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame, parse_basic_offsets, parse_fragments
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
    convert_color_space,
)
from pydicom.pixels.utils import as_pixel_options, get_expected_length, get_nr_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from medfocus.images import gdcm_process
from medfocus.images.errors import ImageError, not_finite, too_many_pixels, unpacks_too_large

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NAMED = ("SOPClassUID", "Modality", "PatientID", "BodyPartExamined", *_PIXELS)
_DERIVED = ("SEG", "RTDOSE")  # modalities with regions or doses as pixels, not images
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# The tags that define how pixels are stored and displayed.
_TAGS = [tag for tag in range(0x00280000, 0x00290000) if dictionary_has_tag(tag)]
_BLOCK = 1 << 20  # bytes inflated at once
_MOST_RUNS = 16_000_000  # bytes of an RLE frame; it may unpack to 64 times as many
_FIX = "Export it without compression, or remove it."
_GDCM = gdcm_process.Gdcm()
_lock = threading.RLock()  # warnings and logs belong to the process


class Dicom:
    """An open DICOM file; see ``medfocus.images.stack.Stack``."""

    is_volume = False
    volumes = 1

    def __init__(self, data: bytes, name: str, *, most_pixels: int, most_bytes: int) -> None:
        """Read and check the header, without decoding pixels.

        Raises ImageError with ``name`` if the file has no pixels, more than ``most_pixels`` per image, fewer
        than the header declares, an unsupported encoding, or more than ``most_bytes`` when inflated.
        """
        self.name, self.sha256, self.size = name, hashlib.sha256(data).hexdigest(), len(data)
        with _as_image_error(name), _quiet():
            self._data = _read(data, name, most_bytes)
            self._check_header(most_pixels)
            self.patient_id = str(self._data.get("PatientID") or "").strip("\0 ")
            self._data.pop("PatientID", None)
            self.modality, self.body_part, burnt_in = (
                str(self._data.get(tag) or "").strip().upper()
                for tag in ("Modality", "BodyPartExamined", "BurnedInAnnotation")
            )
            self.is_burnt_in = burnt_in == "YES"
            self._bits = int(self._data.get("BitsStored") or self._data.get("BitsAllocated") or 64)
            self.mode = "RGB" if self.is_colour else "L" if self._bits <= 8 else "I;16"

    @property
    def is_colour(self) -> bool:
        """Whether the images are in colour."""
        return self._data.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2")

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Return the names of all frames in order, from 0; ("",) for a single frame."""
        if self.frames == 1:
            return ("",)
        width = len(str(self.frames - 1))
        return tuple(f"{number:0{width}}" for number in range(self.frames))

    @property
    def only(self) -> str | None:
        """The name of a single frame, which is ""; None if there are several frames."""
        return "" if self.frames == 1 else None

    def find(self, frame: str) -> str:
        """Return the full name of a frame. Raises ImageError if it does not exist."""
        if not frame.isdecimal() or not frame.isascii() or int(frame) >= self.frames:
            fault = f"has no frame {frame!r}; its frames are 0 to {self.frames - 1}"
            raise ImageError(self.name, "no such frame", fault, "Correct the number after the #.")
        return self.names()[int(frame)]

    def has_window(self, frame: str) -> bool:
        """Return whether the header has a window, or the frame needs none (8 bits or colour)."""
        with _as_image_error(self.name), _quiet():
            header = self._header(int(frame or 0))
            return self.is_colour or self._bits <= 8 or _is_windowed(header)

    def pixels(self, frame: str) -> np.ndarray:
        """Return a frame, (H, W) or (H, W, 3) uint8. Raises ImageError."""
        with _as_image_error(self.name), _quiet():
            index = int(frame or 0)
            stored, interpretation = self._stored(index)
            header = self._header(index)
            if not self.is_colour:
                return _shown(stored, header, self.name)
            if interpretation == "PALETTE COLOR":
                stored = apply_color_lut(stored, header)
                return _eight_bits(stored, 8 * stored.dtype.itemsize)
            if interpretation != "RGB":
                stored = convert_color_space(stored, interpretation, "RGB")
            return _eight_bits(stored, self._bits)

    def _check_header(self, most_pixels: int) -> None:
        data, name = self._data, self.name
        uid = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
        kind = uid.name if uid else "DICOM of unknown kind"
        pixels = any(tag in data for tag in _PIXELS) and "Rows" in data and "Columns" in data
        if not pixels or data.get("Modality") in _DERIVED:
            fix = "Export the images it was made from, or remove it."
            raise ImageError(name, "no image in the file", f"holds no image ({kind})", fix)
        rows, columns = int(data.Rows), int(data.Columns)
        if rows < 1 or columns < 1:
            raise ImageError(name, "no image in the file", f"has {columns} x {rows} pixels", _FIX)
        if rows * columns > most_pixels:
            raise too_many_pixels(name, f"{columns} x {rows} pixels", most_pixels)
        syntax = data.file_meta.get("TransferSyntaxUID")
        if not syntax:
            fault = "does not state the encoding of its pixels (no Transfer Syntax UID)"
            raise ImageError(name, "unsupported encoding", fault, _FIX)
        try:
            is_supported = get_decoder(syntax).is_available
        except NotImplementedError:
            is_supported = False
        deep = " with 12 bits" if syntax == JPEGExtended12Bit and data.get("BitsStored") != 8 else ""
        if deep or not is_supported:
            fault = f"is stored as {syntax.name}{deep}, which cannot be decoded here"
            raise ImageError(name, "unsupported encoding", fault, _FIX)
        self.frames = get_nr_frames(data, warn=False)
        self._check_frames(syntax.is_encapsulated)

    def _check_frames(self, encapsulated: bool) -> None:
        stored = next(cast(bytes, self._data[tag].value) for tag in _PIXELS if tag in self._data)
        if encapsulated:
            buffer = io.BytesIO(stored)
            parse_basic_offsets(buffer)
            held, _ = parse_fragments(buffer)
            declared, unit = self.frames, "fragments of pixel data"
        else:
            held, declared, unit = len(stored), get_expected_length(self._data), "bytes of pixel data"
        if held < declared or self.frames < 1:
            fault = f"declares {declared} {unit}, but holds {held}"
            raise ImageError(self.name, "truncated file", fault, "Copy it again, or remove it.")

    def _stored(self, index: int) -> tuple[np.ndarray, str]:
        """Decode a frame; return its values and their photometric interpretation (YBR may become RGB)."""
        syntax = self._data.file_meta.TransferSyntaxUID
        decoder, stream = get_decoder(syntax), b""
        if syntax.is_encapsulated:
            stream = get_frame(self._data.PixelData, index, number_of_frames=self.frames)
            self._check_codestream(stream)
        options = as_pixel_options(self._data)
        plugins = decoder.available_plugins if stream else ()
        if "gdcm" not in plugins:
            array, meta = decoder.as_array(self._data, index=index, **options)
            return array, str(meta["photometric_interpretation"])
        if "pillow" in plugins:
            with contextlib.suppress(Exception):  # if Pillow fails, GDCM may read the frame
                array, meta = decoder.as_array(self._data, index=index, decoding_plugin="pillow", **options)
                return array, str(meta["photometric_interpretation"])
        plain = {name: value for name, value in options.items() if isinstance(value, str | int | float)}
        return _GDCM.decode(stream, **{**plain, "syntax": str(syntax), "number_of_frames": 1})

    def _check_codestream(self, stream: bytes) -> None:
        """Check, before decoding, that a compressed frame has the size that the DICOM header declares."""
        syntax, rows, columns = self._data.file_meta.TransferSyntaxUID, self._data.Rows, self._data.Columns
        samples = int(self._data.SamplesPerPixel)
        if syntax in JPEG2000TransferSyntaxes:
            size = _size_of_jpeg2000(stream)
        elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
            size = _size_of_jpeg(stream)
        elif syntax == RLELossless and len(stream) > _MOST_RUNS:
            size = (0, 0, 0) if _unpacked_runs(stream) > 2 * get_expected_length(self._data) else None
        else:
            return
        if size is not None and size != (rows, columns, samples):
            fault = "its compressed pixels do not have the size in its header"
            raise ImageError(self.name, "cannot be decoded", fault, _FIX)

    def _header(self, index: int) -> Dataset:
        """Return the header of a frame. In enhanced files, functional groups update the file's header."""
        shared, per_frame = (self._data.get(tag) or [] for tag in _GROUPS)
        groups = [*shared[:1], *per_frame[index:][:1]]
        if not groups:
            return self._data
        header = self._data.copy()
        for group in groups:
            for tag in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(tag) or []:
                    header.update(item)
        return header


def _read(data: bytes, name: str, most_bytes: int) -> Any:
    if _is_deflated(data) and _inflated(data, most_bytes) > most_bytes:
        raise unpacks_too_large(name, most_bytes)
    tags = [*_TAGS, *_NAMED, *_GROUPS]
    dataset = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=cast(Any, tags))
    if not dataset.file_meta.get("TransferSyntaxUID") and dataset.original_encoding == (True, True):
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # DICOM's default
    return dataset


def _is_deflated(data: bytes) -> bool:
    return DeflatedExplicitVRLittleEndian.encode() in data[: 1 << 16]


def _inflated(data: bytes, most: int) -> int:
    """Return the inflated size of a deflated file; counting stops a little above ``most``."""
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    unpack, rest, count = zlib.decompressobj(-zlib.MAX_WBITS), data[file.tell() :], 0
    while rest and count <= most:
        count += len(unpack.decompress(rest, _BLOCK))
        rest = unpack.unconsumed_tail
    return count


def _size_of_jpeg(stream: bytes) -> tuple[int, int, int]:
    """Return rows, columns and samples from the frame header of a JPEG or JPEG-LS; zeros if it has none."""
    place = 2
    while place + 10 <= len(stream) and stream[place] == 0xFF:
        marker, length = stream[place + 1], struct.unpack_from(">H", stream, place + 2)[0]
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return *struct.unpack_from(">HH", stream, place + 5), stream[place + 9]
        place += 2 + length
    return 0, 0, 0


def _size_of_jpeg2000(stream: bytes) -> tuple[int, int, int]:
    """Return rows, columns and samples from the header of a JPEG 2000 codestream; zeros if it has none."""
    place = stream.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(stream) < place + 42:
        return 0, 0, 0
    right, bottom, left, top = struct.unpack_from(">IIII", stream, place + 8)
    return bottom - top, right - left, struct.unpack_from(">H", stream, place + 40)[0]


def _unpacked_runs(stream: bytes) -> int:
    """Return an upper bound on the unpacked bytes of an RLE frame."""
    count, place = 0, 64
    while place < len(stream):
        run = stream[place]
        count += run + 1 if run < 128 else 257 - run if run > 128 else 0
        place += run + 2 if run < 128 else 2 if run > 128 else 1
    return count


def _shown(stored: np.ndarray, header: Dataset, name: str) -> np.ndarray:
    """Turn stored grey values into displayed values, (H, W) uint8."""
    padding = _padding(stored, header)
    values = apply_modality_lut(stored, header)
    share = _windowed(values, header)  # (H, W) float in [0, 1]
    if share is None and _is_plain(stored, header):
        share = values / np.float32(2 ** int(header.BitsStored) - 1)
    if share is None:
        inside = values if padding is None or padding.all() else values[~padding]
        low, high = float(inside.min()), float(inside.max())
        if not np.isfinite([low, high]).all():
            raise not_finite(name)
        share = np.clip((values.astype(np.float64) - low) * (1 / (high - low) if high > low else 0), 0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    image = np.rint(share * 255).astype(np.uint8)
    if padding is not None:
        image[padding] = 0
    return image


def _is_plain(stored: np.ndarray, header: Dataset) -> bool:
    """Return whether the values have at most 8 bits and are displayed unchanged, as in a PNG."""
    changed = "ModalityLUTSequence" in header or "RescaleSlope" in header
    return stored.dtype.kind in "ub" and int(header.get("BitsStored") or 64) <= 8 and not changed


def _is_windowed(header: Dataset) -> bool:
    """Return whether there is a VOI LUT or a valid window (width at least 1 if linear, otherwise above 0)."""
    if header.get("VOILUTSequence"):
        return True
    centre, width = (_first(header.get(tag)) for tag in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return False
    linear = str(header.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR"
    return width >= 1 if linear else width > 0


def _windowed(values: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Apply the first VOI LUT or window to values: (H, W) in [0, 1]; None if the header has neither."""
    if not _is_windowed(header):
        return None
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        entries, first, bits = item.LUTDescriptor
        item.LUTDescriptor = [entries, first, 16]  # otherwise pydicom cuts the entries to ``bits`` bits
        try:
            looked = apply_voi(np.rint(values).astype(np.int64), header)
        finally:
            item.LUTDescriptor = [entries, first, bits]
        return np.clip(looked / np.float32(2 ** int(bits) - 1), 0, 1)
    shown = apply_windowing(values, header)
    # The output range depends on bits, sign and rescale, so measure it far outside of the window.
    centre, reach = _first(header.WindowCenter), 10 * _first(header.WindowWidth)
    dark, bright = apply_windowing(np.array([centre - reach, centre + reach]), header)
    return np.clip((shown - dark) / (bright - dark), 0, 1) if bright != dark else np.zeros(values.shape)


def _first(values: Any) -> Any:
    """Return the first value of an element; None if the element is missing or empty."""
    return values if values is None or np.isscalar(values) else next(iter(values), None)


def _padding(stored: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Return the padding around an image that is not rectangular, (H, W) bool; None if there is none."""
    if header.get("PixelPaddingValue") is None or stored.dtype.kind == "f":
        return None
    value = int(header.PixelPaddingValue)
    limit = int(header.get("PixelPaddingRangeLimit", value))
    padding = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return padding if padding.any() else None


def _eight_bits(stored: np.ndarray, bits: int) -> np.ndarray:
    """Scale unsigned values of ``bits`` bits to uint8."""
    if bits == 8:
        return stored.astype(np.uint8)
    return np.rint(np.clip(stored * (255 / (2**bits - 1)), 0, 255)).astype(np.uint8)


@contextlib.contextmanager
def _as_image_error(name: str) -> Iterator[None]:
    """Raise any error of pydicom or GDCM as an ImageError; broken bytes cause many types of error."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ImageError(name, "cannot be decoded", f"cannot be decoded ({reason})", _FIX) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress pydicom's warnings and logs, in one thread at a time."""
    log = logging.getLogger("pydicom")
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before
