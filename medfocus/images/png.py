"""PNG encoding."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_LEVEL = 3  # of zlib; on phantoms a twelfth of the time of level 9, and 9 % more bytes


def encode_png(image: np.ndarray) -> bytes:
    """Return an image as PNG bytes: (H, W) bool or uint8, (H, W, 3) or (H, W, 4) uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=_LEVEL)
    return file.getvalue()


def data_url(png: bytes) -> str:
    """Return PNG bytes as a URL, so that a page holds its own images."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
