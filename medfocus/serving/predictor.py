"""A fitted method with its segmenter: raw image bytes in, probabilities and a mask out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from medfocus.evaluation.metrics import softmax
from medfocus.focus.modes import focus as apply_focus
from medfocus.focus.region_views import focused_view
from medfocus.images import decode
from medfocus.masks.segmenter import Segmenter

if TYPE_CHECKING:
    from torch import Tensor

    from medfocus.methods import Method

BATCH = 16  # images at once, so that memory does not grow with the request


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of one image."""

    label: str
    probabilities: dict[str, float]  # by class, in the model's order; they sum to 1
    mask: np.ndarray  # (H, W) bool at the image's own resolution: what the focus saw as the region
    mask_status: str  # the rung of the fallback ladder
    mask_score: float  # in [0, 1]
    overlay: bytes  # PNG at the image's own resolution, the mask tinted; empty where none was asked for


@dataclass(frozen=True)
class Predictor:
    """A fitted method with its segmenter. One thread at a time may use it."""

    method: Method
    segmenter: Segmenter
    classes: tuple[str, ...]
    focus: str
    feather: float
    view_size: int  # pixels a side of what CLIP sees

    def predict(self, images: Sequence[bytes], overlay: bool = True) -> list[Prediction]:
        """Encoded images -> one prediction each, the same that the evaluation makes.

        Without ``overlay`` no image with the mask drawn in is made, which takes time.
        Raises ValueError naming the first bad image's place in the request, the fault and the fix.
        """
        names = [f"image {i + 1} of {len(images)}" for i in range(len(images))]
        predictions: list[Prediction] = []
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            decoded = list(map(decode.decode, images[batch], names[batch]))
            predictions += self.predict_decoded(decoded, overlay)
        return predictions

    def predict_decoded(self, images: Sequence[np.ndarray], overlay: bool = True) -> list[Prediction]:
        """Images (H, W, 3) uint8 RGB, few enough for the memory -> one prediction each."""
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
                overlay=_png(apply_focus(image, mask.region, "overlay", feather=0.0)) if overlay else b"",
            )
            for image, mask, p in zip(images, masks, probabilities, strict=True)
        ]

    def view(self, image: np.ndarray, region: np.ndarray) -> np.ndarray:
        """What CLIP sees of an image (H, W, 3) uint8 with a region (H, W) bool: (S, S, C) uint8."""
        return focused_view(image, region, focus=self.focus, size=self.view_size, feather=self.feather)

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Views (N, S, S, C) uint8 -> (N, K), in the order of ``classes``."""
        import torch

        return probabilities_of(self.method, self.method.embed(torch.from_numpy(views)))


def probabilities_of(method: Method, inputs: Tensor) -> np.ndarray:
    """What a fitted method's main classifier says of embedded images, inputs (N, ...) -> (N, K)."""
    logits = next(iter(method.logits(inputs).values()))  # (N, K)
    return softmax(logits.detach().cpu().double().numpy())


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)  # a third of the usual time, 5 % larger
    return buffer.getvalue()
