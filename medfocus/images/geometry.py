"""Fit images and their masks into the square that CLIP sees, and convert images to grey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]  # RGB in 8 bits
CLIP_MEAN: Colour = (123, 117, 104)  # of CLIP's training images: 255 * (0.48145466, 0.4578275, 0.40821073)
BLACK: Colour = (0, 0, 0)

Resize = Literal["longest", "shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Frame:
    """A square of ``size`` x ``size`` pixels, and how an image fills it.

    "longest" scales the longest side to the square and pads the other side (letterbox), "shortest" scales the
    shortest side and cuts off both ends of the other, and "squash" scales each side. All of them round as
    open_clip's transforms do.
    """

    size: int  # S
    resize: Resize = "longest"
    interpolation: Interpolation = "bicubic"
    mean: Colour = CLIP_MEAN  # the checkpoint's mean colour, which is 0 after normalisation
    padding: Colour = CLIP_MEAN

    def image(self, image: np.ndarray) -> np.ndarray:
        """Fit an image into the frame: (H, W, 3) uint8 -> (S, S, 3) uint8."""
        box = np.empty((self.size, self.size, 3), dtype=np.uint8)
        box[:] = self.padding
        return self._fill(box, image, Image.Resampling[self.interpolation.upper()])

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Fit a mask into the frame, 0 in the padding: (H, W) bool or float -> (S, S) float32 in [0, 1]."""
        box = np.zeros((self.size, self.size), dtype=np.float32)
        return self._fill(box, mask.astype(np.float32), Image.Resampling.BILINEAR).clip(0, 1)

    def unframe(self, framed: np.ndarray, height: int, width: int) -> np.ndarray:
        """Invert ``mask``: (S, S) float32 -> (H, W) float32, 0 where the frame cuts the image off."""
        new_height, new_width, top, left = self._place(height, width)
        resized = np.zeros((new_height, new_width), np.float32)
        (rows, to_rows), (columns, to_columns) = self._window(new_height, top), self._window(new_width, left)
        resized[to_rows, to_columns] = framed[rows, columns]
        image = Image.fromarray(resized).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def _fill(self, box: np.ndarray, plane: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
        height, width, top, left = self._place(plane.shape[0], plane.shape[1])
        resized = np.asarray(Image.fromarray(plane).resize((width, height), resampling))
        (rows, from_rows), (columns, from_columns) = self._window(height, top), self._window(width, left)
        box[rows, columns] = resized[from_rows, from_columns]
        return box

    def _place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the height and width to scale an image to, and the top and left of it in the frame."""
        size = self.size
        if self.resize == "squash":
            return size, size, 0, 0
        if self.resize == "shortest":
            shortest = min(height, width)
            new_height, new_width = int(size * height / shortest), int(size * width / shortest)
            return new_height, new_width, -round((new_height - size) / 2), -round((new_width - size) / 2)
        ratio = max(height / size, width / size)
        new_height, new_width = max(1, round(height / ratio)), max(1, round(width / ratio))
        return new_height, new_width, (size - new_height) // 2, (size - new_width) // 2

    def _window(self, length: int, start: int) -> tuple[slice, slice]:
        """Return the part of the frame that an image covers along one axis, and the image's visible part."""
        first, last = max(0, start), min(self.size, start + length)
        return slice(first, last), slice(first - start, last - start)


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma of ITU-R BT.601: (H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1]."""
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W, 3) @ (3,)
    return np.minimum(luma / np.float32(255), np.float32(1))
