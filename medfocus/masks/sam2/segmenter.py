"""SAM2 as a zero-shot segmenter: point and box prompts that need no label -> one mask per image.

An image is encoded once (in batches), all its prompts are decoded together, candidates are scored on
the low-resolution logits, and the winners alone are brought to the image's resolution, where their
outlines may follow its edges (``medfocus.masks.sam2.edges``). Everything goes through the sam2 package
(arXiv 2408.00714): its ``SAM2ImagePredictor`` for encoding, its decoder, and for the
strategy ``automatic`` its ``SAM2AutomaticMaskGenerator``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from medfocus.images.geometry import grey
from medfocus.masks import candidates
from medfocus.masks.sam2 import edges
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.segmenter import Mask, check_image, identity, segmenter_key
from medfocus.masks.settings import Sam2Settings

if TYPE_CHECKING:
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor

# Fewer point prompts at once cost overhead, more fall out of the processor's cache: at 1024 px four at
# once took 40 ms a point and sixteen 80 ms. This bounds the decoder's largest tensor.
_DECODE_BYTES = 32 * 2**20
# The generator brings every candidate to full resolution as float32 before it filters.
_GENERATE_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Features:
    """A batch of B encoded images, as the mask decoder takes them; S is the model's image size."""

    embedding: torch.Tensor  # (B, d, S/16, S/16)
    fine: tuple[torch.Tensor, ...]  # (B, d/8, S/4, S/4), (B, d/4, S/8, S/8)


@dataclass(frozen=True, eq=False)
class Prompts:
    """P prompts of N points each, in sides of the image, so that (0.5, 0.5) is its centre."""

    coords: np.ndarray  # (P, N, 2) float32, (x, y)
    labels: np.ndarray  # (P, N) int32: 1 inside, 0 outside, 2 and 3 a box's top left and bottom right


@dataclass(frozen=True, eq=False)
class Found:
    """What an image's ladder ended with: candidates whose union is its mask, none for the whole image."""

    logits: np.ndarray  # (n, S/4, S/4) float32, > 0 inside
    score: float
    status: str


class Sam2Segmenter:
    """One mask per image from SAM2 by one of ``STRATEGIES``, with the fallback ladder.

    Candidates within the limits (status "chosen"), else within relaxed limits ("relaxed"), else what the
    box around the whole image gives ("box"), else the whole image ("identity"). For one thread at a time.
    """

    def __init__(
        self, predictor: SAM2ImagePredictor, model_key: str, settings: Sam2Settings, batch_size: int = 4
    ) -> None:
        """Wrap a predictor and key of ``load_predictor``; several segmenters may share one predictor."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more.")
        self.predictor = predictor
        self.settings = settings
        self.batch_size = batch_size
        if settings.strategy == "box":
            self.prompts = box_prompt(settings.box_side)
        else:
            self.prompts = grid_prompts(1 if settings.strategy == "center" else settings.points_per_side)
        # The model's key names config, checkpoint and image size by their content.
        network = ("config", "checkpoint", "image_size")
        choice = {name: value for name, value in asdict(settings).items() if name not in network}
        self.features_key = segmenter_key(Sam2Segmenter, features_of=model_key)
        self.key = segmenter_key(Sam2Segmenter, model=model_key, **choice)

    @property
    def sam2(self) -> Sam2Segmenter:
        """Return this segmenter; see ``Segmenter.sam2``."""
        return self

    @property
    def model(self) -> SAM2Base:
        """The network."""
        return self.predictor.model

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Images, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        masks: list[Mask] = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = [check_image(image) for image in images[start : start + self.batch_size]]
                if self.settings.strategy == "automatic":
                    masks += [self._generated(image) for image in batch]
                    continue
                features = self.encode(batch)
                masks += [self._mask(image, self._found(features, i)) for i, image in enumerate(batch)]
        return masks

    def at_points(self, image: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """What one point prompt each, (x, y) in sides of an image (H, W, 3) uint8, finds: (P, 3, H, W) bool.

        The three candidates of a point stand in the order of their predicted IoU, the best first.
        """
        prompts = Prompts(
            np.array(points, np.float32)[:, None], np.ones((len(points), 1), np.int32)
        )  # (P, 1, 2)
        with torch.inference_mode():
            logits, iou = self.decode(self.encode([check_image(image)]), 0, prompts)  # (3P, h, w), (3P,)
        order = (-iou.reshape(-1, 3)).argsort(1, kind="stable") + 3 * np.arange(len(points))[:, None]
        regions = np.stack([self._region(image, logits[i]) for i in order.ravel()])
        return regions.reshape(len(points), 3, *image.shape[:2])

    @torch.no_grad()
    def describe(self, images: Sequence[np.ndarray], grid: int) -> torch.Tensor:
        """What the image encoder knows of images (H, W, 3) uint8, on ``grid`` x ``grid`` cells: (B, P).

        Of its levels at a sixteenth and an eighth of S. No prompt, label or text enters.
        """
        found = []
        for start in range(0, len(images), self.batch_size):
            features = self.encode([check_image(p) for p in images[start : start + self.batch_size]])
            levels = (features.embedding, features.fine[1])  # (b, d, S/16, S/16), (b, d/4, S/8, S/8)
            found.append(torch.cat([F.adaptive_avg_pool2d(level, grid).flatten(1) for level in levels], 1))
        return torch.cat(found)

    def encode(self, images: Sequence[np.ndarray]) -> Features:
        """Images of any sizes, squeezed to (S, S), through the image encoder as one batch of B."""
        self.predictor.set_image_batch(list(images))
        kept: Any = self.predictor._features  # what predict() itself reads; there is no public door
        self.predictor.reset_predictor()
        return Features(kept["image_embed"], tuple(kept["high_res_feats"]))

    def decode(self, features: Features, index: int, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
        """All prompts of image ``index`` of the batch -> three candidates a prompt, M = 3P.

        Returns their logits (M, S/4, S/4) float32 (> 0 inside) and predicted IoU (M,) float32. They are
        decoded in chunks that bound the memory.
        """
        device = features.embedding.device
        coords = self.predictor._transforms.transform_coords(torch.from_numpy(prompts.coords).to(device))
        labels = torch.from_numpy(prompts.labels).to(device)
        embedding = features.embedding[index : index + 1]  # (1, d, S/16, S/16)
        fine = [level[index : index + 1] for level in features.fine]
        position = self.model.sam_prompt_encoder.get_dense_pe()  # (1, d, S/16, S/16)
        chunk = max(1, _DECODE_BYTES // (4 * fine[0].numel()))
        logits, predicted_iou = [], []
        for start in range(0, len(coords), chunk):
            points = (coords[start : start + chunk], labels[start : start + chunk])
            sparse, dense = self.model.sam_prompt_encoder(points=points, boxes=None, masks=None)
            low, iou, _, _ = self.model.sam_mask_decoder(
                image_embeddings=embedding,
                image_pe=position,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                repeat_image=True,
                high_res_features=fine,
            )  # (p, 3, S/4, S/4), (p, 3)
            logits.append(low.flatten(0, 1).float().cpu())
            predicted_iou.append(iou.flatten().float().cpu())
        return torch.cat(logits).numpy(), torch.cat(predicted_iou).numpy()

    def _found(self, features: Features, index: int) -> Found:
        """The ladder for one encoded image, up to the box around the whole of it."""
        logits, iou = _finite(*self.decode(features, index, self.prompts))
        choice = candidates.choose(
            logits > 0,
            iou,
            candidates.stability(logits),
            self.settings.limits,
            keep=self.settings.keep,
            max_overlap=self.settings.max_overlap,
        )
        if choice is None:
            return self._boxed(features, index)
        return Found(logits[list(choice.indices)], choice.score, choice.status)

    def _boxed(self, features: Features, index: int) -> Found:
        """The rung before the last: what the box around the whole image gives, or nothing."""
        logits, iou = _finite(*self.decode(features, index, box_prompt(1.0)))
        steady = candidates.stability(logits)
        best = candidates.pick(
            logits > 0,
            iou,
            steady,
            self.settings.limits.relaxed(),
            keep=1,
            max_overlap=self.settings.max_overlap,
        )
        if best is None:
            return Found(logits[:0], 0.0, "identity")
        return Found(logits[list(best[0])], best[1], "box")

    def _mask(self, image: np.ndarray, found: Found) -> Mask:
        """What was found, at the image's resolution; the whole image where nothing is left of it."""
        parts = [self._region(image, logits) for logits in found.logits]
        union = np.logical_or.reduce([np.zeros(image.shape[:2], bool), *parts])
        return Mask(union, found.score, found.status) if union.any() else identity(*union.shape)

    def _region(self, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """A candidate's logits (h, w) -> its tidied region (H, W) bool at the resolution of its image.

        The edges are looked for at the resolution that the model saw, four times that of the logits.
        """
        size = image.shape[:2]
        if not self.settings.follow_edges:
            return candidates.tidy(_resized(logits, size) > 0)
        seen = (4 * logits.shape[0], 4 * logits.shape[1])
        inside = torch.from_numpy(_resized(logits, seen)).sigmoid().numpy()
        followed = edges.along_edges(inside, _resized(grey(image), seen)) - 0.5
        return candidates.tidy(_resized(followed.astype(np.float32), size) > 0)

    def _generated(self, image: np.ndarray) -> Mask:
        """The whole ladder for one image, its candidates from SAM2's own generator.

        The generator filters by its thresholds before it removes duplicates, so relaxed thresholds need
        a second run of it.
        """
        for status, limits in (("chosen", self.settings.limits), ("relaxed", self.settings.limits.relaxed())):
            regions, iou, steady = self._proposals(image, limits)
            best = candidates.pick(
                regions, iou, steady, limits, keep=self.settings.keep, max_overlap=self.settings.max_overlap
            )
            if best is not None:
                return Mask(candidates.unite(regions[list(best[0])]), best[1], status)
        return self._mask(image, self._boxed(self.encode([image]), 0))

    def _proposals(
        self, image: np.ndarray, limits: candidates.Limits
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the generator finds: regions (M, H, W) bool, predicted IoU (M,), stability (M,)."""
        height, width = image.shape[:2]
        generator = self._generator
        generator.pred_iou_thresh = limits.min_iou
        generator.stability_score_thresh = limits.min_stability
        generator.points_per_batch = max(1, min(64, _GENERATE_BYTES // (3 * 4 * height * width)))
        found = generator.generate(image)
        regions = [one["segmentation"] for one in found]
        return (
            np.stack(regions) if regions else np.zeros((0, height, width), dtype=bool),
            np.array([one["predicted_iou"] for one in found]),
            np.array([one["stability_score"] for one in found]),
        )

    @cached_property
    def _generator(self) -> SAM2AutomaticMaskGenerator:
        """SAM2's own generator around this predictor; its own would believe in 1024 px."""
        from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see load_predictor
            generator = SAM2AutomaticMaskGenerator(self.model, points_per_side=self.settings.points_per_side)
        generator.predictor = self.predictor
        return generator


def load_sam2(settings: Sam2Settings, *, batch_size: int = 4, device: str = "cpu") -> Sam2Segmenter:
    """Load SAM2 and wrap it as a segmenter; see ``load_predictor`` for the errors."""
    predictor, model_key = load_predictor(
        settings.config, settings.checkpoint, settings.image_size, device=device
    )
    return Sam2Segmenter(predictor, model_key, settings, batch_size)


def grid_prompts(points_per_side: int) -> Prompts:
    """One point a prompt, on a regular grid in the cells' centres: P = points_per_side², N = 1."""
    ticks = (np.arange(points_per_side, dtype=np.float32) + 0.5) / points_per_side
    x, y = np.meshgrid(ticks, ticks)
    coords = np.stack([x, y], axis=-1).reshape(-1, 1, 2)  # (P, 1, 2)
    return Prompts(coords, np.ones((len(coords), 1), dtype=np.int32))


def box_prompt(side: float) -> Prompts:
    """One box in the centre whose sides are ``side`` of the image's: P = 1, N = 2 (its corners)."""
    low, high = (1 - side) / 2, (1 + side) / 2
    coords = np.array([[[low, low], [high, high]]], dtype=np.float32)  # (1, 2, 2)
    return Prompts(coords, np.array([[2, 3]], dtype=np.int32))


def _finite(logits: np.ndarray, predicted_iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only the candidates (M, h, w) and (M,) whose every number is finite: a broken one must not win."""
    sound = np.isfinite(logits).all((1, 2)) & np.isfinite(predicted_iou)
    return (logits, predicted_iou) if sound.all() else (logits[sound], predicted_iou[sound])


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A plane (h, w) float32 -> (H, W), bilinear."""
    whole = torch.from_numpy(plane)[None, None]
    return F.interpolate(whole, size, mode="bilinear", align_corners=False)[0, 0].numpy()
