"""Images as the estimator accepts them: arrays or paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfocus.images import decode

Images = Iterable[Any]  # of arrays (H, W) or (H, W, 3) uint8, or of paths


@dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image and its identity."""

    sha256: str  # of the file's bytes or, of an array, of its shape and pixels
    pixels: np.ndarray  # (H, W, 3) uint8


def open_images(X: Images) -> list[InputImage]:
    """Every image checked and decoded. Raises ValueError naming the first bad one's place."""
    if isinstance(X, str | os.PathLike):
        raise ValueError(f"MedFocusCLIP: X is one path, {os.fspath(X)!r}; give a list of images.")
    if isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[2] == 3:
        raise ValueError(
            f"MedFocusCLIP: X is one image of {X.shape}, or images that are 3 pixels wide; give a list "
            "of images, [image] for a single one."
        )
    if not hasattr(X, "__iter__"):
        raise ValueError(f"MedFocusCLIP: X is {type(X).__name__}; give a list of images.")
    given = list(X)
    if not given:
        raise ValueError("MedFocusCLIP: X has 0 images (0 samples), and at least 1 is needed.")
    return [_open(image, f"X[{i}]") for i, image in enumerate(given)]


def _open(given: Any, name: str) -> InputImage:
    if isinstance(given, str | os.PathLike):
        return InputImage(*decode.read_named(Path(given)))
    if not isinstance(given, np.ndarray):
        raise ValueError(f"{name} is {type(given).__name__}; give an array of uint8 or a path.")
    grey, colour = given.ndim == 2, given.ndim == 3 and given.shape[2] == 3
    if given.dtype != np.uint8 or not (grey or colour) or given.size == 0:
        raise ValueError(
            f"{name} is {given.dtype} of shape {given.shape}; an image is uint8 of (H, W) or (H, W, 3). "
            "Scale values to 0 to 255 and convert them, and put one image each into X."
        )
    pixels = np.repeat(given[:, :, None], 3, axis=2) if grey else np.ascontiguousarray(given)
    content = f"{pixels.shape}".encode() + pixels.tobytes()
    return InputImage(hashlib.sha256(content).hexdigest(), pixels)
