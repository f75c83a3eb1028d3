"""Resize images and their masks alike, and convert images to grey."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma of ITU-R BT.601: (H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1]."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W, 3) @ (3,)
    return np.minimum(luma / np.float32(255), np.float32(1))


def letterbox(image: np.ndarray, size: int, fill: Sequence[int] | np.ndarray) -> np.ndarray:
    """Scale the longest side to ``size``, centre, pad with ``fill``: (H, W, 3) -> (size, size, 3) uint8."""
    height, width, top, left = _placement(image.shape[0], image.shape[1], size)
    box = np.empty((size, size, 3), dtype=np.uint8)
    box[:] = np.asarray(fill, dtype=np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    box[top : top + height, left : left + width] = np.asarray(resized)
    return box


def letterbox_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Letterbox a mask, 0 in the padding: (H, W) bool or float -> (size, size) float32 in [0, 1]."""
    height, width, top, left = _placement(mask.shape[0], mask.shape[1], size)
    box = np.zeros((size, size), dtype=np.float32)
    resized = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    box[top : top + height, left : left + width] = np.clip(np.asarray(resized), 0, 1)
    return box


def _placement(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return height and width scaled to a longest side of ``size``, and the top and left that centre them."""
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return new_height, new_width, (size - new_height) // 2, (size - new_width) // 2
