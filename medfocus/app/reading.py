"""Predictions for one image, and the layers that the page shows, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from medfocus.app import clicks
from medfocus.app.clicks import Point
from medfocus.explain.explain import explain_one, on_image, share_in_mask
from medfocus.focus.view import visible
from medfocus.images import decode
from medfocus.images.png import encode_png
from medfocus.masks.sam2.segmenter import EncodedImages
from medfocus.masks.segmenter import Mask
from medfocus.serving.predictor import Predictor

MOST_SHOWN = 1024  # pixels of the longest side of an image on the page
MASK_COLOUR = (0, 174, 219)  # cyan, which neither grey images nor the attribution contain
_FILL, _LINE = 96, 255  # opacity of the mask and of its outline


@dataclass(frozen=True, eq=False)
class Attribution:
    """The attribution of a prediction."""

    layer: bytes  # PNG with alpha, of the shown size
    way: str  # see medfocus.explain.explain
    inside: float | None  # share inside the mask; None if it has no meaning


@dataclass(eq=False)
class Reading:
    """The prediction for an image with one mask."""

    mask: Mask
    shown_region: np.ndarray  # the mask's region at the shown size
    view: np.ndarray  # (S, S, C) uint8, the input of CLIP
    probabilities: dict[str, float]  # by class, in the model's order
    set: tuple[str, ...]  # see ``Prediction.set``
    layers: dict[str, bytes]  # "mask", with alpha, and "view"; PNG
    attribution: Attribution | None = None  # computed on first use

    @property
    def label(self) -> str:
        """Return the most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


@dataclass(eq=False)
class Opened:
    """An open image with its first reading and the reading of its edited mask."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    shown: bytes  # PNG
    shown_size: tuple[int, int]  # width, height
    first: Reading
    encoded: EncodedImages | None  # by SAM2; None until the first mask or an edit needs it
    edited: Reading | None = None

    @property
    def nbytes(self) -> int:
        """Return the approximate size of the object in memory, in bytes."""
        total = self.pixels.nbytes + len(self.shown)
        for reading in (self.first, self.edited):
            if reading is not None:
                total += reading.mask.region.nbytes + reading.shown_region.nbytes + reading.view.nbytes
        if self.encoded is not None:
            total += sum(t.numel() * t.element_size() for t in (self.encoded.embedding, *self.encoded.fine))
        return total


class Reader:
    """Reads images with a model. For one thread at a time."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._sam2 = predictor.segmenter.sam2

    @property
    def takes_points(self) -> bool:
        """Return whether points can edit the masks."""
        return self._sam2 is not None

    def open(self, data: bytes, name: str) -> Opened:
        """Decode and read an image. Raises ImageError with ``name``."""
        pixels = decode.decode(data, name)
        mask, encoded = clicks.first_mask(self.predictor.segmenter, pixels)
        shown = _smaller(pixels)
        reading = self._read(pixels, mask, shown.shape[:2])
        return Opened(pixels, encode_png(shown), (shown.shape[1], shown.shape[0]), reading, encoded)

    def edit(self, opened: Opened, points: Sequence[Point]) -> Reading | None:
        """Read the image with SAM2's mask for all ``points``; without points, drop the edited mask.

        If every point is outside, the deepest point of the first mask is added as a point inside. An edit
        does not use the segmenter's adapter or text.

        Raises NoRegionError if SAM2 finds no region, and ValueError if the masks are not SAM2's. After an
        error, the image keeps its last edit.
        """
        if self._sam2 is None:
            raise ValueError("This model's masks are not SAM2's. Edit masks with a model that uses SAM2.")
        if not points:
            opened.edited = None
            return None
        if opened.encoded is None:
            opened.encoded = clicks.encode(self._sam2, opened.pixels)
        prompt = list(points)
        if not any(point.inside for point in points):
            prompt.insert(0, clicks.deepest(opened.first.shown_region))
        mask = clicks.mask_at(self._sam2, opened.pixels, opened.encoded, prompt)
        width, height = opened.shown_size
        opened.edited = self._read(opened.pixels, mask, (height, width))
        return opened.edited

    def attribute(self, reading: Reading) -> Attribution:
        """Compute the attribution of a reading, once."""
        if reading.attribution is None:
            predictor, view = self.predictor, reading.view
            heat, way = explain_one(predictor.method, view, predictor.classes.index(reading.label))
            inside = share_in_mask(heat, reading.mask.region, predictor.focus, predictor.frame)
            layer = on_image(heat, reading.shown_region, predictor.focus, predictor.frame)
            reading.attribution = Attribution(encode_png(_heat_layer(layer)), way, inside)
        return reading.attribution

    def _read(self, pixels: np.ndarray, mask: Mask, shown: tuple[int, int]) -> Reading:
        view = self.predictor.view(pixels, mask.region)
        probabilities = self.predictor.probabilities(view[None])  # (1, K)
        region = _resized(mask.region, shown)
        return Reading(
            mask=mask,
            shown_region=region,
            view=view,
            probabilities=dict(zip(self.predictor.classes, probabilities[0].tolist(), strict=True)),
            set=self.predictor.sets(probabilities)[0],
            layers={
                "mask": encode_png(_mask_layer(region)),
                "view": encode_png(visible(view)),
            },
        )


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """Shrink an image to at most ``MOST_SHOWN`` pixels on its longest side."""
    height, width = pixels.shape[:2]
    scale = MOST_SHOWN / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _resized(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a region (H, W) bool to (h, w) bool."""
    if region.shape == size:
        return region
    plane = Image.fromarray(region.astype(np.uint8) * 255)
    return np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BOX)) > 127


def _mask_layer(region: np.ndarray) -> np.ndarray:
    """Tint a region (h, w) bool with an opaque outline: (h, w, 4) uint8."""
    width = max(1, round(max(region.shape) / 300))
    inner = ndimage.binary_erosion(region, iterations=width, border_value=0)
    layer = np.zeros((*region.shape, 4), np.uint8)
    layer[..., :3] = MASK_COLOUR
    layer[..., 3] = np.where(inner, _FILL, np.where(region, _LINE, 0))
    return layer


def _heat_layer(heat: np.ndarray) -> np.ndarray:
    """Colour an attribution (h, w), scaled by its maximum and with weak values visible: (h, w, 4) uint8."""
    from matplotlib import colormaps

    scaled = heat / max(float(heat.max()), 1e-12)
    layer = np.empty((*heat.shape, 4), np.uint8)
    layer[..., :3] = np.rint(255 * colormaps["inferno"](scaled)[..., :3])
    layer[..., 3] = np.rint(255 * np.sqrt(scaled))
    return layer
