"""A fitted method with its segmenter: they turn encoded images into probabilities and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from medfocus.focus.modes import focus as apply_focus
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.images.geometry import Frame
from medfocus.images.png import encode_png
from medfocus.learning.calibration import Calibration
from medfocus.masks.segmenter import Segmenter

if TYPE_CHECKING:
    from torch import Tensor

    from medfocus.learning.method import Method

BATCH = 16  # images in a batch, so that memory does not grow with the request


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image."""

    label: str
    probabilities: dict[str, float]  # by class, in the model's order, calibrated; they sum to 1
    mask: np.ndarray  # (H, W) bool at the image's resolution: the region of the focus
    mask_status: str  # the rung of the fallback ladder that made the mask
    mask_score: float  # in [0, 1]
    overlay: bytes = b""  # PNG at the image's resolution with a tinted mask; empty if not requested
    set: tuple[str, ...] = ()  # classes among which the true one is, by the promise; () without a promise


@dataclass(frozen=True)
class Predictor:
    """A fitted method with its segmenter. One thread at a time may use it."""

    method: Method
    segmenter: Segmenter
    classes: tuple[str, ...]
    focus: str
    feather: float
    fill: str  # of ``medfocus.focus.view.view``
    frame: Frame  # of the views
    calibration: Calibration

    def predict(self, images: Sequence[bytes], overlay: bool = True) -> list[Prediction]:
        """Predict encoded images, as the evaluation does.

        Without ``overlay``, the predictions have no overlay, which saves time.
        Raises ValueError with the place of the first faulty image in the request, its fault and the fix.
        """
        names = [f"image {i + 1} of {len(images)}" for i in range(len(images))]
        predictions: list[Prediction] = []
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            decoded = list(map(decode.decode, images[batch], names[batch]))
            some = self.predict_decoded(decoded)
            if overlay:
                pairs = zip(some, decoded, strict=True)
                some = [replace(one, overlay=_overlay(image, one.mask)) for one, image in pairs]
            predictions += some
        return predictions

    def predict_decoded(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict images (H, W, 3) uint8 RGB in one batch, without overlays."""
        masks = self.segmenter.segment(images)
        views = [self.view(image, mask.region) for image, mask in zip(images, masks, strict=True)]
        probabilities = self.probabilities(np.stack(views))
        return [
            Prediction(
                label=self.classes[int(p.argmax())],
                probabilities=dict(zip(self.classes, p.tolist(), strict=True)),
                mask=mask.region,
                mask_status=mask.status,
                mask_score=mask.score,
                set=names,
            )
            for mask, p, names in zip(masks, probabilities, self.sets(probabilities), strict=True)
        ]

    def sets(self, probabilities: np.ndarray) -> list[tuple[str, ...]]:
        """Return each image's set of classes from (N, K); each set is () if the model promises none."""
        sets = self.calibration.sets(probabilities)
        if sets is None:
            return [()] * len(probabilities)
        return [tuple(np.array(self.classes)[row].tolist()) for row in sets]

    def view(self, image: np.ndarray, region: np.ndarray) -> np.ndarray:
        """Return CLIP's view (S, S, C) uint8 of an image (H, W, 3) uint8 with a region (H, W) bool."""
        return view(image, region, focus=self.focus, frame=self.frame, feather=self.feather, fill=self.fill)

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, K) of views (N, S, S, C) uint8, in the order of ``classes``."""
        import torch

        return probabilities_of(self.method, self.method.embed(torch.from_numpy(views)), self.calibration)


def _overlay(image: np.ndarray, region: np.ndarray) -> bytes:
    tinted = apply_focus(image, region, "overlay", feather=0.0)
    return encode_png(tinted)


def probabilities_of(method: Method, inputs: Tensor, calibration: Calibration) -> np.ndarray:
    """Return the probabilities (N, K) of a fitted method's main classifier for embedded images (N, ...)."""
    logits = next(iter(method.logits(inputs).values()))  # (N, K)
    return calibration.probabilities(logits.detach().cpu().double().numpy())
