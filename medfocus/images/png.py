"""PNG encoding."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def encode_png(image: np.ndarray, compress_level: int = 6) -> bytes:
    """Return an image as PNG bytes.

    Args:
        image: (H, W) bool or uint8, (H, W, 3) or (H, W, 4) uint8.
        compress_level: 0 (fast, large) to 9 (slow, small); every level is lossless.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def data_url(png: bytes) -> str:
    """Return PNG bytes as a URL, so that a page holds its own images."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
