"""DICOM: bytes -> the images in them, as a viewer shows them at first, and what ingestion asks the header.

Grey: the modality LUT or rescale, then the first VOI LUT or else the first window, then MONOCHROME1 inverted.
Without either, 8 bits stay as they are and deeper ones go from their minimum to their maximum. Padding is
black and sets no window. Colour: palettes and YBR become RGB. Overlays are not drawn.

Of the header only the tags below are read, so no other text in it can get into an error; pydicom's warnings,
which show values, are not shown.
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
from medfocus.images.stack import ImageError, TooLargeError

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NAMED = ("SOPClassUID", "Modality", "PatientID", "BodyPartExamined", *_PIXELS)
_DERIVED = ("SEG", "RTDOSE")  # pixels that are regions or doses
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# How pixels are stored and shown.
_TAGS = [tag for tag in range(0x00280000, 0x00290000) if dictionary_has_tag(tag)]
_BLOCK = 1 << 20  # bytes inflated at once to be counted
_MOST_RUNS = 16_000_000  # bytes of an RLE frame, which may unpack to 64 times as many
_FIX = "Export it again, uncompressed for one, or remove it."
_GDCM = gdcm_process.Gdcm()
_ONE = threading.RLock()  # warnings and logs are silenced for the whole process


class Dicom:
    """An opened DICOM file; see ``medfocus.images.stack.Stack``."""

    is_volume = False
    volumes = 1

    def __init__(self, data: bytes, name: str, *, most_pixels: int, most_bytes: int) -> None:
        """Read the header. No pixel is decoded, and none at all of a file that is past a limit.

        Raises ImageError naming ``name`` where there are no pixels, more than ``most_pixels`` an image,
        fewer than promised, none that can be decoded here, or more than ``most_bytes`` once inflated.
        """
        self.name, self.sha256, self.size = name, hashlib.sha256(data).hexdigest(), len(data)
        with _told(name), _quiet():
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
        """Whether its images have colours."""
        return self._data.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2")

    def names(self, axis: int = 2, every: int = 1) -> tuple[str, ...]:
        """Its frames in their order, from 0, all of them; of one frame ("",)."""
        if self.frames == 1:
            return ("",)
        width = len(str(self.frames - 1))
        return tuple(f"{number:0{width}}" for number in range(self.frames))

    @property
    def only(self) -> str | None:
        """ "" where there is one frame."""
        return "" if self.frames == 1 else None

    def find(self, frame: str) -> str:
        """A frame's full name. Raises ImageError where there is no such frame."""
        if not frame.isdecimal() or not frame.isascii() or int(frame) >= self.frames:
            fault = f"has no frame {frame!r}; they go from 0 to {self.frames - 1}"
            raise ImageError(self.name, fault, "Correct the number behind the #.")
        return self.names()[int(frame)]

    def has_window(self, frame: str) -> bool:
        """Whether the header says how to show the frame, or it needs no saying, having 8 bits or colours."""
        with _told(self.name), _quiet():
            header = self._header(int(frame or 0))
            return self.is_colour or self._bits <= 8 or _is_windowed(header)

    def pixels(self, frame: str) -> np.ndarray:
        """(H, W) or (H, W, 3) uint8. Raises ImageError."""
        with _told(self.name), _quiet():
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
        sort = uid.name if uid else "DICOM of an unknown sort"
        pixels = any(tag in data for tag in _PIXELS) and "Rows" in data and "Columns" in data
        if not pixels or data.get("Modality") in _DERIVED:
            fix = "Export the images that belong to it, or remove it."
            raise ImageError(name, f"holds no image ({sort})", fix)
        rows, columns = int(data.Rows), int(data.Columns)
        if rows < 1 or columns < 1:
            raise ImageError(name, f"has {columns} x {rows} pixels", _FIX)
        if rows * columns > most_pixels:
            fault = f"has {columns} x {rows} pixels; {most_pixels // 1_000_000} megapixels are the most that "
            fix = "Scale it down or cut it into tiles, or remove it."
            raise TooLargeError(name, f"{fault}is decoded", fix)
        syntax = data.file_meta.get("TransferSyntaxUID")
        if not syntax:
            raise ImageError(name, "does not say how its pixels are stored (no Transfer Syntax UID)", _FIX)
        try:
            able = get_decoder(syntax).is_available
        except NotImplementedError:
            able = False
        deep = " with 12 bits" if syntax == JPEGExtended12Bit and data.get("BitsStored") != 8 else ""
        if deep or not able:
            fault = f"is stored as {syntax.name}{deep}, which cannot be decoded here"
            raise ImageError(name, fault, _FIX)
        self.frames = get_nr_frames(data, warn=False)
        self._check_frames(syntax.is_encapsulated)

    def _check_frames(self, encapsulated: bool) -> None:
        stored = next(cast(bytes, self._data[tag].value) for tag in _PIXELS if tag in self._data)
        if encapsulated:
            buffer = io.BytesIO(stored)
            parse_basic_offsets(buffer)
            found, _ = parse_fragments(buffer)
            promised, what = self.frames, "pieces of pixel data"
        else:
            found, promised, what = len(stored), get_expected_length(self._data), "bytes of pixel data"
        if found < promised or self.frames < 1:
            fault = f"promises {self.frames} frames and so {promised} {what}, and holds {found}"
            raise ImageError(self.name, fault, "Copy it again, or remove it.")

    def _stored(self, index: int) -> tuple[np.ndarray, str]:
        """A frame as it is stored, YBR made RGB, and its photometric interpretation."""
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
            with contextlib.suppress(Exception):  # it cannot read all that GDCM can
                array, meta = decoder.as_array(self._data, index=index, decoding_plugin="pillow", **options)
                return array, str(meta["photometric_interpretation"])
        plain = {name: value for name, value in options.items() if isinstance(value, str | int | float)}
        return _GDCM.decode(stream, **{**plain, "syntax": str(syntax), "number_of_frames": 1})

    def _check_codestream(self, stream: bytes) -> None:
        """A compressed image has to be as large as its header says, before it is decoded."""
        syntax, rows, columns = self._data.file_meta.TransferSyntaxUID, self._data.Rows, self._data.Columns
        samples = int(self._data.SamplesPerPixel)
        if syntax in JPEG2000TransferSyntaxes:
            found = _size_of_jpeg2000(stream)
        elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
            found = _size_of_jpeg(stream)
        elif syntax == RLELossless and len(stream) > _MOST_RUNS:
            found = (0, 0, 0) if _unpacked_runs(stream) > 2 * get_expected_length(self._data) else None
        else:
            return
        if found is not None and found != (rows, columns, samples):
            fault = "its compressed pixels are not of the size that its header says"
            raise ImageError(self.name, fault, _FIX)

    def _header(self, index: int) -> Dataset:
        """What is said of one frame: the file's header, in enhanced files with that of the frame."""
        shared, own = (self._data.get(tag) for tag in _GROUPS)
        groups = [item for items, place in ((shared, 0), (own, index)) for item in (items or [])[place:][:1]]
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
        fault = f"unpacks to more than {most_bytes // 1_000_000} MB, the most that is read"
        raise TooLargeError(name, fault, "Export it smaller, or remove it.")
    tags = [*_TAGS, *_NAMED, *_GROUPS]
    found = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=cast(Any, tags))
    if not found.file_meta.get("TransferSyntaxUID") and found.original_encoding == (True, True):
        found.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # DICOM's default
    return found


def _is_deflated(data: bytes) -> bool:
    return DeflatedExplicitVRLittleEndian.encode() in data[: 1 << 16]


def _inflated(data: bytes, most: int) -> int:
    """Bytes that a deflated file unpacks to, counted to a little above ``most``."""
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    unpack, rest, count = zlib.decompressobj(-zlib.MAX_WBITS), data[file.tell() :], 0
    while rest and count <= most:
        count += len(unpack.decompress(rest, _BLOCK))
        rest = unpack.unconsumed_tail
    return count


def _size_of_jpeg(stream: bytes) -> tuple[int, int, int]:
    """Rows, columns and samples by the frame header of a JPEG or JPEG-LS; zeros where it has none."""
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
    """Rows, columns and samples by the header of a JPEG 2000 codestream; zeros where it has none."""
    place = stream.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(stream) < place + 42:
        return 0, 0, 0
    right, bottom, left, top = struct.unpack_from(">IIII", stream, place + 8)
    return bottom - top, right - left, struct.unpack_from(">H", stream, place + 40)[0]


def _unpacked_runs(stream: bytes) -> int:
    """At most how many bytes an RLE frame unpacks to."""
    count, place = 0, 64
    while place < len(stream):
        run = stream[place]
        count += run + 1 if run < 128 else 257 - run if run > 128 else 0
        place += run + 2 if run < 128 else 2 if run > 128 else 1
    return count


def _shown(stored: np.ndarray, header: Dataset, name: str) -> np.ndarray:
    """Grey as it is stored -> (H, W) uint8 as it is shown."""
    padding = _padding(stored, header)
    values = apply_modality_lut(stored, header)
    share = _windowed(values, header)  # (H, W) float in [0, 1]
    if share is None and _is_plain(stored, header):
        share = values / np.float32(2 ** int(header.BitsStored) - 1)
    if share is None:
        inside = values if padding is None or padding.all() else values[~padding]
        low, high = float(inside.min()), float(inside.max())
        if not np.isfinite([low, high]).all():
            raise ImageError(name, "holds values that are not finite", "Replace them and export it again.")
        share = np.clip((values.astype(np.float64) - low) * (1 / (high - low) if high > low else 0), 0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    image = np.rint(share * 255).astype(np.uint8)
    if padding is not None:
        image[padding] = 0
    return image


def _is_plain(stored: np.ndarray, header: Dataset) -> bool:
    """Whether values of 8 bits or fewer mean what they are, as those of a PNG do."""
    changed = "ModalityLUTSequence" in header or "RescaleSlope" in header
    return stored.dtype.kind in "ub" and int(header.get("BitsStored") or 64) <= 8 and not changed


def _is_windowed(header: Dataset) -> bool:
    """Whether the header has a VOI LUT or a window that can be: a linear one is 1 wide, others above 0."""
    if header.get("VOILUTSequence"):
        return True
    centre, width = (_first(header.get(tag)) for tag in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return False
    linear = str(header.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR"
    return width >= 1 if linear else width > 0


def _windowed(values: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Values -> (H, W) in [0, 1] by the first VOI LUT or window; None where there is none that can be."""
    if not _is_windowed(header):
        return None
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        entries, first, bits = item.LUTDescriptor
        item.LUTDescriptor = [entries, first, 16]  # pydicom looks entries up in as many bits as they have
        try:
            looked = apply_voi(np.rint(values).astype(np.int64), header)
        finally:
            item.LUTDescriptor = [entries, first, bits]
        return np.clip(looked / np.float32(2 ** int(bits) - 1), 0, 1)
    shown = apply_windowing(values, header)
    # What its darkest and its brightest become depends on the bits, the sign and the rescale.
    centre, reach = _first(header.WindowCenter), 10 * _first(header.WindowWidth)
    dark, bright = apply_windowing(np.array([centre - reach, centre + reach]), header)
    return np.clip((shown - dark) / (bright - dark), 0, 1) if bright != dark else np.zeros(values.shape)


def _first(values: Any) -> Any:
    """Of an element of one value or several the first; None where there is none."""
    return values if values is None or np.isscalar(values) else next(iter(values), None)


def _padding(stored: np.ndarray, header: Dataset) -> np.ndarray | None:
    """(H, W) bool: the pixels around an image that is not rectangular; None where there are none."""
    if header.get("PixelPaddingValue") is None or stored.dtype.kind == "f":
        return None
    value = int(header.PixelPaddingValue)
    limit = int(header.get("PixelPaddingRangeLimit", value))
    padding = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return padding if padding.any() else None


def _eight_bits(stored: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values of so many bits -> uint8."""
    if bits == 8:
        return stored.astype(np.uint8)
    return np.rint(np.clip(stored * (255 / (2**bits - 1)), 0, 255)).astype(np.uint8)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever pydicom and GDCM raise of broken bytes, which is nearly anything, as a ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ImageError(name, f"cannot be decoded ({said or type(error).__name__})", _FIX) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings and logs; one thread at a time, for both belong to the process."""
    log = logging.getLogger("pydicom")
    with _ONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before
