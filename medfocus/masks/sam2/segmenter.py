"""Segment images with SAM2 without labels: point and box prompts, or no prompt, give one mask per image.

SAM2 encodes an image once (in batches) and decodes all its prompts together. Candidates are scored on their
low-resolution logits, and only the winners are resized to the image, where their outlines may follow its
edges (``medfocus.masks.sam2.edges``). The network is the sam2 package's (arXiv 2408.00714): its
``SAM2ImagePredictor`` encodes, and its ``SAM2AutomaticMaskGenerator`` runs the strategy "automatic".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from medfocus.images.geometry import grey
from medfocus.masks import candidates
from medfocus.masks.sam2 import edges
from medfocus.masks.sam2.model import check_interest, load_predictor
from medfocus.masks.segmenter import Mask, check_image, identity, segmenter_key
from medfocus.masks.settings import Sam2Settings

if TYPE_CHECKING:
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor

# Size of the decoder's largest tensor. Few prompts at once cost overhead, and many overflow the processor's
# cache: at 1024 px a point took 40 ms in chunks of four and 80 ms in chunks of sixteen.
_DECODE_BYTES = 32 * 2**20
# Limit for the generator, which resizes every candidate to the image as float32 before it filters.
_GENERATE_BYTES = 256 * 2**20
NO_PROMPT = -1  # the label of SAM2's "not a point"


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """A batch of B images as encoded for the mask decoder; S is the model's image size."""

    embedding: torch.Tensor  # (B, d, S/16, S/16)
    fine: tuple[torch.Tensor, ...]  # (B, d/8, S/4, S/4), (B, d/4, S/8, S/8)


@dataclass(frozen=True, eq=False)
class PointPrompts:
    """P prompts of N points each, as shares of the image's sides: (0.5, 0.5) is its centre."""

    coords: np.ndarray  # (P, N, 2) float32, (x, y)
    labels: np.ndarray  # (P, N) int32: 1 inside, 0 outside, -1 no point; 2 and 3 the corners of a box


@dataclass(frozen=True, eq=False)
class Rung:
    """The rung of the fallback ladder that an image ends on, with the candidates that form its mask."""

    logits: np.ndarray  # (n, S/4, S/4) float32, > 0 inside; n is 0 for the whole image
    score: float
    status: str


class Sam2Segmenter:
    """One mask per image from SAM2's proposals. For one thread at a time.

    The mask comes from the first rung of the fallback ladder that has candidates: candidates within the
    limits (status "chosen"), candidates within relaxed limits ("relaxed"), SAM2's mask for a box around the
    whole image ("box"), or the whole image ("identity").
    """

    def __init__(
        self, predictor: SAM2ImagePredictor, model_key: str, settings: Sam2Settings, batch_size: int = 4
    ) -> None:
        """Wrap a predictor and its key from ``load_predictor``; several segmenters may share a predictor."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more.")
        self.predictor = predictor
        self.settings = settings
        self.batch_size = batch_size
        if settings.strategy == "interest":
            self.prompts = no_prompt()
        elif settings.strategy == "box":
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
        """Return the network."""
        return self.predictor.model

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Segment images (H, W, 3) uint8 RGB of any sizes: one mask per image, in their order."""
        masks: list[Mask] = []
        with torch.inference_mode():
            for batch in self.batches(images):
                if self.settings.strategy == "automatic":
                    masks += [self._generated(image) for image in batch]
                    continue
                encoded = self.encode(batch)
                masks += [self.mask(image, self.ladder(encoded, i)) for i, image in enumerate(batch)]
        return masks

    def batches(self, images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Yield checked images in batches of ``batch_size``."""
        for start in range(0, len(images), self.batch_size):
            yield [check_image(image) for image in images[start : start + self.batch_size]]

    def at_points(self, image: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """Segment an image (H, W, 3) uint8 at points (x, y), in shares of its sides: (P, 3, H, W) bool.

        The three candidates of a point are sorted by predicted IoU, the best first.
        """
        coords = np.array(points, np.float32)[:, None]  # (P, 1, 2)
        prompts = PointPrompts(coords, np.ones((len(points), 1), np.int32))
        with torch.inference_mode():
            logits, iou = self.decode(self.encode([check_image(image)]), 0, prompts)  # (3P, h, w), (3P,)
        order = (-iou.reshape(-1, 3)).argsort(1, kind="stable") + 3 * np.arange(len(points))[:, None]
        regions = np.stack([self.region(image, logits[i]) for i in order.ravel()])
        return regions.reshape(len(points), 3, *image.shape[:2])

    def best(
        self, encoded: EncodedImages, index: int, prompt: PointPrompts
    ) -> tuple[np.ndarray, float] | None:
        """Decode one prompt (P = 1) of image ``index``; return the best candidate's logits (h, w) and IoU.

        Several points or a box are clear, and SAM2 has one mask for them (``multimask_output=False``). Of a
        point's three candidates, the one that agrees with it wins, and predicted IoU breaks ties. Returns
        None if no candidate is finite.
        """
        is_ambiguous = prompt.coords.shape[1] == 1
        with torch.inference_mode():
            logits, iou = finite(*self._decoded(encoded, index, prompt, is_ambiguous=is_ambiguous))
        coords, labels = prompt.coords[0], prompt.labels[0]
        agreeing = [candidates.agreeing(each > 0, coords, labels) for each in logits]
        first = max(range(len(iou)), key=lambda i: (agreeing[i], iou[i]), default=None)
        return None if first is None else (logits[first], float(iou[first]))

    @torch.no_grad()
    def describe(self, images: Sequence[np.ndarray], grid: int) -> torch.Tensor:
        """Encode images (H, W, 3) uint8 as features (B, P), averaged over ``grid`` x ``grid`` cells.

        The features are the encoder's levels at S/16 and S/8, without prompt, label or text.
        """
        features = []
        for batch in self.batches(images):
            encoded = self.encode(batch)
            levels = (encoded.embedding, encoded.fine[1])  # (b, d, S/16, S/16), (b, d/4, S/8, S/8)
            features.append(torch.cat([F.adaptive_avg_pool2d(level, grid).flatten(1) for level in levels], 1))
        return torch.cat(features)

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Apply SAM2's own transforms to images of any sizes: (B, 3, S, S) on the model's device."""
        pixels = self.predictor._transforms.forward_batch(list(images))
        if self.predictor.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.predictor.device, non_blocking=True)

    def encode(self, images: Sequence[np.ndarray]) -> EncodedImages:
        """Resize images of any sizes to (S, S) and encode them as one batch of B."""
        self.predictor.set_image_batch(list(images))
        kept: Any = self.predictor._features  # predict() reads this attribute; there is no public one
        self.predictor.reset_predictor()
        return EncodedImages(kept["image_embed"], tuple(kept["high_res_feats"]))

    def decode(
        self, encoded: EncodedImages, index: int, prompts: PointPrompts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode all prompts of image ``index`` of the batch, in chunks that bound the memory.

        Returns three candidates per prompt, M = 3P: logits (M, S/4, S/4) float32, > 0 inside, and predicted
        IoU (M,) float32.
        """
        return self._decoded(encoded, index, prompts, is_ambiguous=True)

    def _decoded(
        self, encoded: EncodedImages, index: int, prompts: PointPrompts, *, is_ambiguous: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode three candidates per prompt, or the one that SAM2 has for prompts that are clear."""
        device = encoded.embedding.device
        coords = self.predictor._transforms.transform_coords(torch.from_numpy(prompts.coords).to(device))
        labels = torch.from_numpy(prompts.labels).to(device)
        embedding = encoded.embedding[index : index + 1]  # (1, d, S/16, S/16)
        fine = [level[index : index + 1] for level in encoded.fine]
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
                multimask_output=is_ambiguous,
                repeat_image=True,
                high_res_features=fine,
            )  # (p, 3 or 1, S/4, S/4), (p, 3 or 1)
            logits.append(low.flatten(0, 1).float().cpu())
            predicted_iou.append(iou.flatten().float().cpu())
        return torch.cat(logits).numpy(), torch.cat(predicted_iou).numpy()

    def ladder(self, encoded: EncodedImages, index: int) -> Rung:
        """Run the fallback ladder for image ``index`` of the batch."""
        logits, iou = finite(*self.decode(encoded, index, self.prompts))
        # Without a prompt, the candidates are three answers to one question, each the whole region.
        is_whole = self.settings.strategy == "interest"
        choice = candidates.choose(
            logits > 0,
            iou,
            candidates.stability(logits),
            self.settings.limits,
            keep=1 if is_whole else self.settings.keep,
            max_overlap=self.settings.max_overlap,
            by_place=not is_whole,
        )
        if choice is None:
            return self.box_rung(encoded, index)
        return Rung(logits[list(choice.indices)], choice.score, choice.status)

    def box_rung(self, encoded: EncodedImages, index: int) -> Rung:
        """Run the last two rungs for image ``index``: SAM2's mask for a box around it, or the whole image."""
        logits, iou = finite(*self.decode(encoded, index, box_prompt(1.0)))
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
            return Rung(logits[:0], 0.0, "identity")
        return Rung(logits[list(best[0])], best[1], "box")

    def mask(self, image: np.ndarray, rung: Rung) -> Mask:
        """Resize a rung's candidates to the image and unite them; if this is empty, take the whole image."""
        parts = [self.region(image, logits) for logits in rung.logits]
        union = np.logical_or.reduce([np.zeros(image.shape[:2], bool), *parts])
        return Mask(union, rung.score, rung.status) if union.any() else identity(*union.shape)

    def region(self, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return a candidate's tidied region (H, W) bool at the image's resolution from its logits (h, w).

        Edges are found at the resolution that the model sees, four times the resolution of the logits.
        """
        size = image.shape[:2]
        if not self.settings.follow_edges:
            return candidates.tidy(_resized(logits, size) > 0)
        seen = (4 * logits.shape[0], 4 * logits.shape[1])
        inside = torch.from_numpy(_resized(logits, seen)).sigmoid().numpy()
        followed = edges.along_edges(inside, _resized(grey(image), seen)) - 0.5
        return candidates.tidy(_resized(followed.astype(np.float32), size) > 0)

    def _generated(self, image: np.ndarray) -> Mask:
        """Run the ladder on the candidates of SAM2's own generator.

        The generator filters by its thresholds before it removes duplicates, so relaxed thresholds need a
        second run.
        """
        for status, limits in (("chosen", self.settings.limits), ("relaxed", self.settings.limits.relaxed())):
            regions, iou, steady = self._proposals(image, limits)
            best = candidates.pick(
                regions, iou, steady, limits, keep=self.settings.keep, max_overlap=self.settings.max_overlap
            )
            if best is not None:
                return Mask(candidates.unite(regions[list(best[0])]), best[1], status)
        return self.mask(image, self.box_rung(self.encode([image]), 0))

    def _proposals(
        self, image: np.ndarray, limits: candidates.Limits
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the generator: regions (M, H, W) bool, predicted IoU (M,) and stability (M,)."""
        height, width = image.shape[:2]
        generator = self._generator
        generator.pred_iou_thresh = limits.min_iou
        generator.stability_score_thresh = limits.min_stability
        generator.points_per_batch = max(1, min(64, _GENERATE_BYTES // (3 * 4 * height * width)))
        proposals = generator.generate(image)
        regions = [proposal["segmentation"] for proposal in proposals]
        return (
            np.stack(regions) if regions else np.zeros((0, height, width), dtype=bool),
            np.array([proposal["predicted_iou"] for proposal in proposals]),
            np.array([proposal["stability_score"] for proposal in proposals]),
        )

    @cached_property
    def _generator(self) -> SAM2AutomaticMaskGenerator:
        """Return SAM2's own generator, with this predictor instead of its default, which assumes 1024 px."""
        from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see load_predictor
            generator = SAM2AutomaticMaskGenerator(self.model, points_per_side=self.settings.points_per_side)
        generator.predictor = self.predictor
        return generator


def load_sam2(settings: Sam2Settings, *, batch_size: int = 4, device: str = "cpu") -> Sam2Segmenter:
    """Load SAM2 and wrap it as a segmenter. Raises as ``load_predictor`` and ``check_interest`` do."""
    if settings.strategy == "interest":
        check_interest(settings.config)
    predictor, model_key = load_predictor(
        settings.config, settings.checkpoint, settings.image_size, device=device
    )
    return Sam2Segmenter(predictor, model_key, settings, batch_size)


def grid_prompts(points_per_side: int) -> PointPrompts:
    """Return one point per prompt, at the centres of a regular grid: P = points_per_side², N = 1."""
    ticks = (np.arange(points_per_side, dtype=np.float32) + 0.5) / points_per_side
    x, y = np.meshgrid(ticks, ticks)
    coords = np.stack([x, y], axis=-1).reshape(-1, 1, 2)  # (P, 1, 2)
    return PointPrompts(coords, np.ones((len(coords), 1), dtype=np.int32))


def no_prompt() -> PointPrompts:
    """Return the prompt "not a point", which a pocket SAM2 takes for the region of interest: P = 1, N = 1."""
    return PointPrompts(np.zeros((1, 1, 2), np.float32), np.full((1, 1), NO_PROMPT, np.int32))


def box_prompt(side: float) -> PointPrompts:
    """Return one centred box with ``side`` of the image's sides: P = 1, N = 2 (its corners)."""
    low, high = (1 - side) / 2, (1 + side) / 2
    coords = np.array([[[low, low], [high, high]]], dtype=np.float32)  # (1, 2, 2)
    return PointPrompts(coords, np.array([[2, 3]], dtype=np.int32))


def finite(logits: np.ndarray, predicted_iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the candidates, logits (M, h, w) and IoU (M,), with a number that is not finite."""
    is_finite = np.isfinite(logits).all((1, 2)) & np.isfinite(predicted_iou)
    return logits[is_finite], predicted_iou[is_finite]


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a plane (h, w) float32 to (H, W), bilinear."""
    batch = torch.from_numpy(plane)[None, None]
    return F.interpolate(batch, size, mode="bilinear", align_corners=False)[0, 0].numpy()
