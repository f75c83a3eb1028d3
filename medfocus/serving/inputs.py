"""The images that the estimator accepts, arrays or paths, and their masks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfocus.images import decode
from medfocus.masks.segmenter import Mask, Segmenter
from medfocus.masks.store import MaskStore

Images = Iterable[Any]  # of arrays (H, W) or (H, W, 3) uint8, or of paths


@dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image and its identity."""

    sha256: str  # of the file's bytes, or of an array's shape and pixels
    pixels: np.ndarray  # (H, W, 3) uint8


def open_images(X: Images) -> list[InputImage]:
    """Check and decode images. Raises ValueError with the place of the first faulty image."""
    if isinstance(X, str | os.PathLike):
        raise ValueError(f"MedFocusCLIP: X is one path, {os.fspath(X)!r}. Give a list of images.")
    if isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[2] == 3:
        raise ValueError(
            f"MedFocusCLIP: X is one image of shape {X.shape}, or a stack of images 3 pixels wide. "
            "Give a list of images; for a single image, [image]."
        )
    if not hasattr(X, "__iter__"):
        raise ValueError(f"MedFocusCLIP: X is of type {type(X).__name__}. Give a list of images.")
    images = list(X)
    if not images:
        raise ValueError("MedFocusCLIP: X has 0 images (0 samples). Give at least 1.")
    return [_open(image, f"X[{i}]") for i, image in enumerate(images)]


def _open(image: Any, name: str) -> InputImage:
    if isinstance(image, str | os.PathLike):
        return InputImage(*decode.read_named(Path(image)))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} is of type {type(image).__name__}. Give an array of uint8 or a path.")
    grey, colour = image.ndim == 2, image.ndim == 3 and image.shape[2] == 3
    if image.dtype != np.uint8 or not (grey or colour) or image.size == 0:
        raise ValueError(
            f"{name} is {image.dtype} of shape {image.shape}, but an image is uint8 of (H, W) or (H, W, 3). "
            "Scale the values to 0 to 255 and convert them to uint8."
        )
    pixels = np.repeat(image[:, :, None], 3, axis=2) if grey else np.ascontiguousarray(image)
    content = f"{pixels.shape}".encode() + pixels.tobytes()
    return InputImage(hashlib.sha256(content).hexdigest(), pixels)


def segment(
    images: Sequence[InputImage], segmenter: Segmenter, cache: str | os.PathLike[str] | None
) -> list[Mask]:
    """Return a mask for each image. ``cache`` is a folder that keeps the masks, or None."""
    store = None if cache is None else MaskStore(os.fspath(cache))
    shas = list(dict.fromkeys(image.sha256 for image in images))
    stored = {sha: store.get(sha, segmenter.key) for sha in shas} if store else {}
    known = {sha: mask for sha, mask in stored.items() if mask is not None}
    missing = {image.sha256: image.pixels for image in images if image.sha256 not in known}
    if missing:
        new = dict(zip(missing, segmenter.segment(list(missing.values())), strict=True))
        known |= new
        if store:
            store.put(new, segmenter.key)
            store.close()
    return [known[image.sha256] for image in images]
