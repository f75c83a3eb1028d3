"""Retrieve a mask from SAM2's proposals by a text about anatomy: SaLIP, arXiv 2404.06362.

The text names anatomy to look at ("the lungs", "a lesion"), never a class. As in SaLIP, CLIP sees the
bounding box of a proposal, black outside the region. SaLIP prompts SAM again with the boxes; here the
retrieved proposals themselves form the mask, as with the other strategies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from medfocus.images.geometry import BLACK, Frame
from medfocus.masks import candidates
from medfocus.masks.sam2.segmenter import EncodedImages, Rung, Sam2Segmenter, finite
from medfocus.masks.segmenter import Mask, segmenter_key
from medfocus.storage.fingerprint import fingerprint

# IoU above which two proposals count as the same, like box_nms_thresh in SAM2's generator.
SAME = 0.7


class Rank(Protocol):
    """A function that scores crops, highest for the crop that best shows the anatomy."""

    @property
    def key(self) -> str:
        """Return the key of anatomy and weights; equal keys give equal scores."""
        ...

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Score M crops (h, w, 3) uint8 RGB of any sizes: (M,)."""
        ...


class Clip(Protocol):
    """The part of ``medfocus.clip.encoder.ClipEncoder`` that ``TextRank`` needs."""

    @property
    def key(self) -> str:
        """Return the key of the weights."""
        ...

    @property
    def frame(self) -> Frame:
        """Return the frame of the views."""
        ...

    def preprocess(self, views: np.ndarray) -> torch.Tensor:
        """Turn views (B, S, S, 3) uint8 RGB into pixels (B, 3, S, S)."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, S, S) as unit vectors (B, D)."""
        ...

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Encode N texts as unit vectors (N, D)."""
        ...


@dataclass(frozen=True, eq=False)
class TextRank:
    """CLIP's similarity of crops to a text."""

    clip: Clip
    text: torch.Tensor  # (D,) of length one
    key: str

    @classmethod
    def of(cls, clip: Clip, texts: Sequence[str]) -> TextRank:
        """Rank by the mean of several texts, as SaLIP does. Raises ValueError without a text."""
        if not texts:
            raise ValueError("No text to rank proposals by. Give at least one, such as 'a lesion'.")
        text = F.normalize(clip.encode_texts(list(texts)).mean(0), dim=0)  # (D,)
        code = (type(clip), "medfocus.clip.build")
        return cls(clip, text, fingerprint(*code, clip=clip.key, texts=list(texts)))

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return cosines (M,) in [-1, 1] of M crops (h, w, 3) uint8 RGB, padded with black."""
        frame = replace(self.clip.frame, padding=BLACK)
        views = np.stack([frame.image(image) for image in images])
        features = self.clip.encode_images(self.clip.preprocess(views))  # (M, D)
        return (features @ self.text).cpu().numpy()


class RetrievalSegmenter:
    """One mask per image: the best-ranked proposals of a grid of points.

    It runs the fallback ladder of ``Sam2Segmenter``; on the first two rungs the rank chooses. The score of a
    mask is computed from SAM2's quality, so that it means the same as with the other strategies.
    """

    def __init__(self, plain: Sam2Segmenter, rank: Rank) -> None:
        """Rank the proposals of ``plain``. Raises ValueError unless its strategy is "grid"."""
        if plain.settings.strategy != "grid":
            raise ValueError(
                f"Retrieval needs SAM2 with the strategy 'grid', not {plain.settings.strategy!r}. "
                "Build it with 'grid'."
            )
        self.sam2 = plain
        self.rank = rank
        self.settings = plain.settings
        self.key = segmenter_key(RetrievalSegmenter, plain=plain.key, rank=rank.key)

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Segment images (H, W, 3) uint8 RGB of any sizes: one mask per image, in their order."""
        masks: list[Mask] = []
        with torch.inference_mode():
            for batch in self.sam2.batches(images):
                encoded = self.sam2.encode(batch)
                for i, image in enumerate(batch):
                    masks.append(self.sam2.mask(image, self._rung(encoded, i, image)))
        return masks

    def _rung(self, encoded: EncodedImages, index: int, image: np.ndarray) -> Rung:
        """Run the fallback ladder for image ``index`` of the batch."""
        plain, settings = self.sam2, self.settings
        logits, iou = finite(*plain.decode(encoded, index, plain.prompts))  # (M, h, w), (M,)
        regions, steady = logits > 0, candidates.stability(logits)
        for status, limits in (("chosen", settings.limits), ("relaxed", settings.limits.relaxed())):
            indices, quality = distinct(regions, iou, steady, limits)
            if not indices:
                continue
            ranking = self.rank([crop(image, regions[i]) for i in indices])  # (n,)
            if ranking.shape != (len(indices),):
                raise ValueError(
                    f"The rank returned scores of shape {ranking.shape} for {len(indices)} crops. "
                    "Return one score per crop."
                )
            best = retrieve(
                regions[indices],
                ranking,
                max_area=limits.max_area,
                keep=settings.keep,
                max_overlap=settings.max_overlap,
            )
            return Rung(logits[[indices[i] for i in best]], float(quality[best].mean()), status)
        return plain.box_rung(encoded, index)


def distinct(
    regions: np.ndarray, predicted_iou: np.ndarray, steadiness: np.ndarray, limits: candidates.Limits
) -> tuple[list[int], np.ndarray]:
    """Select the distinct candidates within the limits; return their indices, best first, and scores (n,).

    ``regions`` (M, h, w) bool, ``predicted_iou`` and ``steadiness`` (M,); limits and scores are those of
    ``candidates.pick``. If the IoU of two candidates is above ``SAME``, the better candidate stays.
    """
    scores: dict[int, float] = {}
    for i in range(len(regions)):
        one = slice(i, i + 1)
        fits = candidates.pick(
            regions[one], predicted_iou[one], steadiness[one], limits, keep=1, max_overlap=1.0
        )
        if fits is not None:
            scores[i] = fits[1]
    kept: list[int] = []
    for i in sorted(scores, key=lambda i: -scores[i]):
        both = [(regions[i] & regions[j]).sum() for j in kept]
        either = [(regions[i] | regions[j]).sum() for j in kept]
        if all(b <= SAME * e for b, e in zip(both, either, strict=True)):
            kept.append(i)
    return kept, np.array([scores[i] for i in kept])


def retrieve(
    regions: np.ndarray, ranking: np.ndarray, *, max_area: float, keep: int, max_overlap: float
) -> list[int]:
    """Return the indices of the best ``keep`` proposals (n, h, w) bool by ranking scores (n,), best first.

    As in ``candidates.pick``, the intersection of two proposals is at most ``max_overlap`` of the smaller,
    and the union covers at most ``max_area`` of the image. The best proposal is always taken. Scores of NaN
    come last.
    """
    order = np.argsort(-np.nan_to_num(ranking, nan=-np.inf), kind="stable")
    taken = [int(order[0])]
    tidied = [candidates.tidy(regions[order[0]])]
    for index in order[1:]:
        if len(taken) == keep:
            break
        region = candidates.tidy(regions[index])
        union = np.logical_or.reduce([region, *tidied]).mean()
        if union <= max_area and all(candidates.overlap(region, other) <= max_overlap for other in tidied):
            taken.append(int(index))
            tidied.append(region)
    return taken


def crop(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Crop an image (H, W, 3) uint8 to the box of a region (h, w) bool, black outside the region.

    The region is enlarged to the image by nearest neighbours. An empty region gives the whole image.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * region.shape[0] // height
    columns = np.arange(width) * region.shape[1] // width
    full = region[rows][:, columns]  # (H, W)
    if not full.any():
        return image
    down, across = np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))
    box = slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)
    return image[box] * full[box][:, :, None]
