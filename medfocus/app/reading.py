"""What the model says of one image, and what a page shows of it: layers of one size, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import ndimage

from medfocus.app import clicks
from medfocus.app.clicks import Point
from medfocus.explain.explain import explain, on_image
from medfocus.explain.maps import inside_share
from medfocus.images import decode
from medfocus.images.geometry import letterbox_mask
from medfocus.images.png import encode_png
from medfocus.masks.sam2.segmenter import Features
from medfocus.masks.segmenter import Mask
from medfocus.serving.predictor import Predictor

MOST_SHOWN = 1024  # pixels of the longest side of what a page gets
MASK_COLOUR = (0, 174, 219)  # cyan: on no grey image, and not among the attribution's colours
_PNG_LEVEL = 1  # fast: the page and the model run on the same machine
_FILL, _LINE = 96, 255  # opacity of the mask, inside and along its outline


@dataclass(frozen=True, eq=False)
class Attribution:
    """Where an answer came from."""

    layer: bytes  # PNG with alpha, of the size that is shown
    way: str  # see medfocus.explain.explain
    inside: float | None  # share inside of the mask; None where that says nothing


@dataclass(eq=False)
class Reading:
    """What the model says of an image with one mask."""

    mask: Mask
    shown_region: np.ndarray  # the mask's region at the size that is shown
    view: np.ndarray  # (S, S, C) uint8, what CLIP sees
    probabilities: dict[str, float]  # by class, in the model's order
    layers: dict[str, bytes]  # "mask", with alpha, and "view"; PNG
    attribution: Attribution | None = None  # once it was asked for

    @property
    def label(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


@dataclass(eq=False)
class Opened:
    """An image at hand: its first reading, and the one with the mask that was edited last."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    shown: bytes  # PNG
    shown_size: tuple[int, int]  # width, height
    first: Reading
    features: Features | None  # SAM2's, once they were needed
    edited: Reading | None = None
    points: list[Point] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Roughly the memory that it holds."""
        held = self.pixels.nbytes + len(self.shown)
        for reading in (self.first, self.edited):
            if reading is not None:
                held += reading.mask.region.nbytes + reading.shown_region.nbytes + reading.view.nbytes
        if self.features is not None:
            held += sum(t.numel() * t.element_size() for t in (self.features.embedding, *self.features.fine))
        return held


class Reader:
    """A model at work on one image at a time. For one thread at a time."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._sam2 = clicks.pointed(predictor.segmenter)

    @property
    def is_pointed(self) -> bool:
        """Whether masks can be edited by points."""
        return self._sam2 is not None

    def open(self, data: bytes, name: str) -> Opened:
        """An encoded image, read for the first time. Raises ImageError naming ``name``."""
        pixels = decode.decode(data, name)
        mask, features = clicks.first_mask(self.predictor.segmenter, pixels)
        shown = _smaller(pixels)
        reading = self._read(pixels, mask, shown.shape[:2])
        return Opened(
            pixels, encode_png(shown, _PNG_LEVEL), (shown.shape[1], shown.shape[0]), reading, features
        )

    def edit(self, opened: Opened, points: Sequence[Point]) -> Reading | None:
        """The reading with the mask that SAM2 finds at all of ``points``; without points there is none.

        Where every point is outside, the deepest point of the first mask stands for the region. Where the
        points find nothing, the image stays as it was.

        Raises NothingThereError where SAM2 finds nothing, ValueError where the masks are not SAM2's.
        """
        if self._sam2 is None:
            raise ValueError("this model's masks are not SAM2's: they cannot be edited by points.")
        if not points:
            opened.edited, opened.points = None, []
            return None
        if opened.features is None:
            opened.features = clicks.encode(self._sam2, opened.pixels)
        meant = list(points)
        if not any(point.inside for point in points):
            meant.insert(0, clicks.deepest(opened.first.shown_region))
        mask = clicks.mask_at(self._sam2, opened.pixels, opened.features, meant)
        width, height = opened.shown_size
        opened.edited, opened.points = self._read(opened.pixels, mask, (height, width)), list(points)
        return opened.edited

    def attribute(self, reading: Reading) -> Attribution:
        """Where the answer of a reading came from; computed once."""
        import torch

        if reading.attribution is None:
            predictor, view = self.predictor, reading.view
            target = torch.tensor([predictor.classes.index(reading.label)])
            method = predictor.method
            maps, way = explain(method, method.encoder, torch.from_numpy(view)[None], target)
            heat = maps[0].numpy()  # (S, S)
            framed = letterbox_mask(reading.mask.region, len(view)) > 0.5
            tells = predictor.focus != "crop" and framed.any()
            inside = inside_share(heat, framed) if tells else None
            placed = on_image(heat, reading.shown_region, predictor.focus)
            reading.attribution = Attribution(encode_png(_heat_layer(placed), _PNG_LEVEL), way, inside)
        return reading.attribution

    def _read(self, pixels: np.ndarray, mask: Mask, shown: tuple[int, int]) -> Reading:
        view = self.predictor.view(pixels, mask.region)
        chances = self.predictor.probabilities(view[None])[0].tolist()
        region = _resized(mask.region, shown)
        return Reading(
            mask=mask,
            shown_region=region,
            view=view,
            probabilities=dict(zip(self.predictor.classes, chances, strict=True)),
            layers={
                "mask": encode_png(_mask_layer(region), _PNG_LEVEL),
                "view": encode_png(_seen(view), _PNG_LEVEL),
            },
        )


def _seen(view: np.ndarray) -> np.ndarray:
    """Of a view (S, S, C) what can be looked at: of two images the focused one."""
    return view[..., -3:] if view.shape[2] == 6 else view[..., :3]


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """An image as it is shown: its longest side is ``MOST_SHOWN`` at most."""
    height, width = pixels.shape[:2]
    scale = MOST_SHOWN / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _resized(region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A region (H, W) bool -> (h, w) bool."""
    if region.shape == size:
        return region
    plane = Image.fromarray(region.astype(np.uint8) * 255)
    return np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BOX)) > 127


def _mask_layer(region: np.ndarray) -> np.ndarray:
    """A region (h, w) bool -> (h, w, 4) uint8: tinted, its outline opaque."""
    width = max(1, round(max(region.shape) / 300))
    inner = ndimage.binary_erosion(region, iterations=width, border_value=0)
    layer = np.zeros((*region.shape, 4), np.uint8)
    layer[..., :3] = MASK_COLOUR
    layer[..., 3] = np.where(inner, _FILL, np.where(region, _LINE, 0))
    return layer


def _heat_layer(heat: np.ndarray) -> np.ndarray:
    """An attribution (h, w) -> (h, w, 4) uint8, scaled by its own maximum; faint heat is seen as well."""
    from matplotlib import colormaps

    scaled = heat / max(float(heat.max()), 1e-12)
    layer = np.empty((*heat.shape, 4), np.uint8)
    layer[..., :3] = np.rint(255 * colormaps["inferno"](scaled)[..., :3])
    layer[..., 3] = np.rint(255 * np.sqrt(scaled))
    return layer
