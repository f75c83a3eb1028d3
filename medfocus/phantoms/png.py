"""Encode PNG files with bytes that depend only on the pixels.

The bytes of a compressed PNG depend on the build of zlib (some Pillow wheels contain zlib-ng), so these files
hold stored deflate blocks without compression. Format: RFC 1950, RFC 1951 section 3.2.4, and the PNG
specification (ISO/IEC 15948) sections 5 and 11.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

STORED_BLOCK = 0xFFFF  # bytes; the capacity of a stored deflate block


def encode(image: np.ndarray) -> bytes:
    """Return an (H, W) uint8 image, or an (H, W) bool mask as 0 and 255, as an 8-bit grey PNG.

    Raises ValueError for any other shape or type.
    """
    if image.ndim != 2 or image.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"png: the image is {image.dtype} {image.shape}; pass (H, W) uint8 or bool.")
    grey = image.astype(np.uint8) * 255 if image.dtype == np.bool_ else image
    height, width = grey.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, 0 for none
    rows[:, 1:] = grey
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, deflate, no interlace
    chunks = ((b"IHDR", header), (b"IDAT", _stored(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    """Return a zlib stream of stored blocks, each of a flag (1 in the last), length, complement and bytes."""
    stream = bytearray(b"\x78\x01")
    for start in range(0, len(data), STORED_BLOCK):
        block = data[start : start + STORED_BLOCK]
        last = start + STORED_BLOCK >= len(data)
        stream += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    return bytes(stream) + struct.pack(">I", zlib.adler32(data))
