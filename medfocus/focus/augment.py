"""Augment an image and its mask together: one random change of geometry and tone for each further view."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from medfocus.images.geometry import CLIP_MEAN, Colour

ANGLE = 15.0  # degrees: the tilt of a patient, a slice or a probe
SIDE = (0.75, 1.1)  # visible share of the width and height: between a closer view and some padding
STRETCH = 1.15  # largest factor between the scales of width and height
SHIFT = 0.08  # of the width and height
GAMMA = 1.4  # largest exponent of the tone curve, and 1 / GAMMA the smallest
_KEPT = 0.5  # share of the mask that a view has to keep at least


class Augmentation(NamedTuple):
    """A change of an image; the default changes nothing."""

    angle: float = 0.0  # of a rotation, in degrees
    width: float = 1.0  # of the visible window, in shares of the image's
    height: float = 1.0
    right: float = 0.0  # shift of the window's centre, in shares of the image's width and height
    down: float = 0.0
    gamma: float = 1.0  # exponent of the tone curve on [0, 1]
    mirrored: bool = False  # left to right, after all else

    def image(self, image: np.ndarray, padding: Colour = CLIP_MEAN) -> np.ndarray:
        """Change an image (H, W, 3) uint8; ``padding`` is the colour of what lies outside of it."""
        if self.gamma != 1:
            tone = np.rint(255 * (np.arange(256) / 255) ** self.gamma).astype(np.uint8)
            image = tone[image]
        return self._warp(image, Image.Resampling.BILINEAR, padding)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Change a mask (H, W) bool as ``image`` changes its image."""
        return self._warp(mask.view(np.uint8), Image.Resampling.NEAREST, 0).view(bool)

    def keeping(self, mask: np.ndarray) -> Augmentation:
        """Return this change, or only its tone and mirroring if less than half of ``mask`` would stay."""
        seen = self.mask(mask).sum() * self.width * self.height
        return self if seen >= _KEPT * mask.sum() else Augmentation(gamma=self.gamma, mirrored=self.mirrored)

    def _warp(self, plane: np.ndarray, resampling: Image.Resampling, outside: Colour | int) -> np.ndarray:
        height, width = plane.shape[:2]
        if self[:5] != WHOLE[:5]:
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
            # A pixel (x, y) of the result shows the pixel (a x + b y + c, d x + e y + f) of the image.
            a, b, d, e = self.width * cos, -self.height * sin, self.width * sin, self.height * cos
            c = width * (0.5 + self.right) - (a * width + b * height) / 2
            f = height * (0.5 + self.down) - (d * width + e * height) / 2
            warped = Image.fromarray(plane).transform(
                (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), resampling, fillcolor=outside
            )
            plane = np.asarray(warped)
        return np.ascontiguousarray(plane[:, :: -1 if self.mirrored else 1])


WHOLE = Augmentation()  # the whole image


def augmentation(sha256: str, view: int, *, mirror: bool = False) -> Augmentation:
    """Return the change of a view: view 0 is the whole image, the others are random and reproducible.

    The draw depends on the image's ``sha256`` (hex) and ``view`` alone, so a view can be cached. With
    ``mirror``, half of the random views are mirrored left to right; do not use it for chest X-rays, where the
    heart's side is a finding.
    """
    if view == 0:
        return WHOLE
    rng = np.random.default_rng([int(sha256, 16), view])
    side, stretch = rng.uniform(*SIDE), math.sqrt(STRETCH) ** rng.uniform(-1, 1)
    angle, right, down = rng.uniform(-1, 1, size=3) * (ANGLE, SHIFT, SHIFT)
    gamma = GAMMA ** rng.uniform(-1, 1)
    mirrored = mirror and bool(rng.random() < 0.5)
    return Augmentation(
        float(angle), side * stretch, side / stretch, float(right), float(down), gamma, mirrored
    )
