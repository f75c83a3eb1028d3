"""SAM2 proposes regions and a text about anatomy retrieves the mask among them: SaLIP, arXiv 2404.06362.

The text says what to look at ("the lungs", "a lesion"), never what an image is. As in SaLIP a proposal is
shown to CLIP as its box, black outside of the region. Unlike SaLIP, which asks SAM again with the boxes, the
retrieved proposals themselves are the mask, as with the other strategies [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from medfocus.images.geometry import letterbox
from medfocus.masks import candidates
from medfocus.masks.sam2.segmenter import Features, Found, Sam2Segmenter
from medfocus.masks.segmenter import Mask, check_image, segmenter_key
from medfocus.storage.fingerprint import fingerprint

# Proposals of a larger IoU are one and the same: SAM2's generator removes boxes above it (box_nms_thresh).
SAME = 0.7


class Rank(Protocol):
    """What says which crop shows what is looked for."""

    @property
    def key(self) -> str:
        """Names what it looks for and by which weights: equal keys score equally."""
        ...

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """M crops (h, w, 3) uint8 RGB, of any sizes -> scores (M,), the best the highest."""
        ...


class Towers(Protocol):
    """What ``TextRank`` needs of CLIP; see ``medfocus.clip.encoder.ClipEncoder``."""

    @property
    def key(self) -> str:
        """Names the weights."""
        ...

    @property
    def image_size(self) -> int:
        """S, pixels a side."""
        ...

    def preprocess(self, views: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) uint8 RGB -> pixels (B, 3, S, S)."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, D), each of length one."""
        ...

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Texts (N) -> (N, D), each of length one."""
        ...


@dataclass(frozen=True, eq=False)
class TextRank:
    """CLIP's similarity of a crop to a text."""

    towers: Towers
    text: torch.Tensor  # (D,) of length one
    key: str

    @classmethod
    def of(cls, towers: Towers, texts: Sequence[str]) -> TextRank:
        """Rank by the mean of several texts, as SaLIP does. Raises ValueError for no text."""
        if not texts:
            raise ValueError("no text to rank proposals by; give at least one, such as 'a lesion'.")
        text = F.normalize(towers.encode_texts(list(texts)).mean(0), dim=0)  # (D,)
        code = (type(towers), "medfocus.clip.build")
        return cls(towers, text, fingerprint(*code, towers=towers.key, texts=list(texts)))

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """M crops (h, w, 3) uint8 RGB -> cosines (M,) in [-1, 1]; a crop keeps its aspect, on black."""
        views = np.stack([letterbox(p, self.towers.image_size, (0, 0, 0)) for p in images])
        features = self.towers.encode_images(self.towers.preprocess(views))  # (M, D)
        return (features @ self.text).cpu().numpy()


class RetrievalSegmenter:
    """One mask per image: of the proposals of a grid of points, those that a rank likes best.

    The ladder is that of ``Sam2Segmenter``: proposals within the limits (status "chosen"), else within
    relaxed ones, else the box around the image, else the whole of it. The rank chooses on the first two
    rungs; a mask's score stays SAM2's, so that it means the same as with the other strategies.
    """

    def __init__(self, plain: Sam2Segmenter, rank: Rank) -> None:
        """Take the proposals, limits and ``keep`` of ``plain``; ValueError unless its strategy is "grid"."""
        if plain.settings.strategy != "grid":
            raise ValueError(
                f"proposals come from the strategy {plain.settings.strategy!r}; "
                "build that segmenter with 'grid'."
            )
        self.sam2 = plain
        self.rank = rank
        self.settings = plain.settings
        self.key = segmenter_key(RetrievalSegmenter, plain=plain.key, rank=rank.key)

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Images, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        masks: list[Mask] = []
        size = self.sam2.batch_size
        with torch.inference_mode():
            for start in range(0, len(images), size):
                batch = [check_image(image) for image in images[start : start + size]]
                features = self.sam2.encode(batch)
                for i, image in enumerate(batch):
                    masks.append(self.sam2._mask(image, self._found(features, i, image)))
        return masks

    def _found(self, features: Features, index: int, image: np.ndarray) -> Found:
        """The ladder for one encoded image, up to the box around the whole of it."""
        plain, settings = self.sam2, self.settings
        logits, iou = plain.decode(features, index, plain.prompts)  # (M, h, w), (M,)
        sound = np.isfinite(logits).all((1, 2)) & np.isfinite(iou)
        logits, iou = logits[sound], iou[sound]
        regions, steady = logits > 0, candidates.stability(logits)
        for status, limits in (("chosen", settings.limits), ("relaxed", settings.limits.relaxed())):
            indices, quality = distinct(regions, iou, steady, limits)
            if not indices:
                continue
            liking = self.rank([crop(image, regions[i]) for i in indices])  # (n,)
            if liking.shape != (len(indices),):
                raise ValueError(
                    f"the rank gave scores {liking.shape} for {len(indices)} crops; it owes one a crop."
                )
            best = retrieve(
                regions[indices],
                liking,
                max_area=limits.max_area,
                keep=settings.keep,
                max_overlap=settings.max_overlap,
            )
            return Found(logits[[indices[i] for i in best]], float(quality[best].mean()), status)
        return plain._boxed(features, index)


def distinct(
    regions: np.ndarray, predicted_iou: np.ndarray, steadiness: np.ndarray, limits: candidates.Limits
) -> tuple[list[int], np.ndarray]:
    """The candidates within the limits, without doubles: their indices, best first, and scores (n,).

    ``regions`` (M, h, w) bool, ``predicted_iou`` and ``steadiness`` (M,); ``candidates.pick`` says what fits
    and how good it is. Of two whose IoU is above ``SAME`` the better one stays.
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
    regions: np.ndarray, liking: np.ndarray, *, max_area: float, keep: int, max_overlap: float
) -> list[int]:
    """The best ``keep`` of proposals (n, h, w) bool by a rank's scores (n,), as indices, best first.

    As with ``candidates.pick`` two of them share at most ``max_overlap`` of the smaller one, and the union
    covers at most ``max_area`` of the image; the best one is always taken. A score that is no number comes
    last.
    """
    order = np.argsort(-np.nan_to_num(liking, nan=-np.inf), kind="stable")
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
    """A region (h, w) bool of an image (H, W, 3) uint8, in its box and black outside of it: (a, b, 3) uint8.

    The region, seldom as fine as the image, is enlarged as it is; an empty one gives the whole image.
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
