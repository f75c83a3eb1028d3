"""Segment large images as ``Sam2Segmenter`` does, up to rounding, with less work.

Encoder and decoder take fewer steps (``fast_encoder``, ``fast_decoder``). The masks of a point are decoded
only if their predicted IoU is high enough to win, because a candidate's score is at most its predicted IoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medfocus.masks import candidates
from medfocus.masks.sam2.fast_decoder import Answer, FastDecoder, Scene
from medfocus.masks.sam2.fast_encoder import FOLDED, FastEncoder
from medfocus.masks.sam2.segmenter import EncodedImages, PointPrompts, Rung, Sam2Segmenter
from medfocus.masks.segmenter import segmenter_key

LEAST_SIZE = 512  # pixels per side that the model sees; decoding smaller images is cheap


def fits(plain: Sam2Segmenter) -> bool:
    """Return whether ``FastSegmenter`` supports a segmenter: its strategy and its model.

    The strategies "automatic" and "interest" have no prompts to skip. The trunk has to be a Hiera, the mask
    decoder has to use the encoder's two finest levels, and the neck must not add coarser levels to
    these two. This holds for all published models.
    """
    from sam2.modeling.backbones.hieradet import Hiera

    model: Any = plain.model
    if plain.settings.strategy in ("automatic", "interest") or not isinstance(
        model.image_encoder.trunk, Hiera
    ):
        return False
    neck, levels = model.image_encoder.neck, len(model.image_encoder.neck.convs) - model.image_encoder.scalp
    are_separate = min(neck.fpn_top_down_levels) >= FOLDED and levels == FOLDED + 1
    return model.use_high_res_features_in_sam and are_separate


class FastSegmenter(Sam2Segmenter):
    """A faster ``Sam2Segmenter`` with the same choices. Its key differs, as rounding may change a mask."""

    def __init__(self, plain: Sam2Segmenter) -> None:
        """Take the model and settings of ``plain``. Raises ValueError unless ``fits(plain)``."""
        if not fits(plain):
            raise ValueError(
                "FastSegmenter supports neither the strategies 'automatic' and 'interest' nor SAM2 models "
                "that differ from the published ones. Use Sam2Segmenter."
            )
        super().__init__(plain.predictor, "", plain.settings, plain.batch_size)
        self.encoder, self.decoder = FastEncoder(self.model), FastDecoder(self.model)
        precision = "bfloat16" if self.predictor.device.type == "cuda" else "float32"  # of the encoder
        self.features_key = segmenter_key(type(self), features_of=plain.features_key, precision=precision)
        self.key = segmenter_key(type(self), plain=plain.key, precision=precision)

    def encode(self, images: Sequence[np.ndarray]) -> EncodedImages:
        """Resize images of any sizes to (S, S) and encode them as one batch of B."""
        with torch.inference_mode():
            return self.encoder(self.pixels(images))

    def decode(
        self, encoded: EncodedImages, index: int, prompts: PointPrompts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode all prompts of image ``index``; see ``Sam2Segmenter.decode``."""
        scene = self._scene(encoded, index)
        chunks = [
            self._candidates(scene, self._answer(scene, prompts, chunk))
            for chunk in self._chunks(range(len(prompts.coords)))
        ]
        logits, iou = zip(*chunks, strict=True)
        return np.concatenate(logits), np.concatenate(iou)

    def ladder(self, encoded: EncodedImages, index: int) -> Rung:
        """Run the ladder for image ``index`` without masks that cannot win; see ``_Decoded.bar``."""
        scene = self._scene(encoded, index)
        decoded = _Decoded(self)
        # Central points first, because central regions score higher.
        distance = np.abs(self.prompts.coords - 0.5).mean(1).max(1)  # (P,)
        for chunk in self._chunks(np.argsort(distance, kind="stable").tolist()):
            answer = self._answer(scene, self.prompts, chunk)
            bound = answer.predicted_iou.float().cpu().numpy().max(1)  # (p,)
            hopeful = np.flatnonzero(~(bound < decoded.bar))
            if len(hopeful):
                decoded.add([chunk[i] for i in hopeful], *self._candidates(scene, answer.only(hopeful)))
        return decoded.rung() or self.box_rung(encoded, index)

    def _scene(self, encoded: EncodedImages, index: int) -> Scene:
        one = slice(index, index + 1)
        return self.decoder.scene(encoded.embedding[one], tuple(level[one] for level in encoded.fine))

    def _chunks(self, prompts: Sequence[int]) -> list[list[int]]:
        size = self.decoder.chunk
        return [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]

    def _answer(self, scene: Scene, prompts: PointPrompts, indices: list[int]) -> Answer:
        device = scene.positions.device
        coords = torch.from_numpy(prompts.coords[indices]).to(device)
        labels = torch.from_numpy(prompts.labels[indices]).to(device)
        return self.decoder.answer(scene, self.predictor._transforms.transform_coords(coords), labels)

    def _candidates(self, scene: Scene, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """Return the candidates of p prompts: logits (3p, S/4, S/4) and predicted IoU (3p,)."""
        logits = self.decoder.logits(scene, answer).flatten(0, 1).float().cpu().numpy()
        return logits, answer.predicted_iou.flatten().float().cpu().numpy()


class _Decoded:
    """The candidates decoded so far, and the lowest predicted IoU with which a prompt can change the mask."""

    def __init__(self, segmenter: FastSegmenter) -> None:
        self.segmenter = segmenter
        # A prompt with a predicted IoU below the bar cannot change the mask. After the first pick the bar is
        # at least the limit of the predicted IoU, because the relaxed limits no longer apply. After ``keep``
        # picks it is also at least their lowest score, because a score is at most the predicted IoU.
        self.bar = 0.0
        self.best = 0.0  # lowest score of ``keep`` picked candidates; 0 if fewer are picked
        self.prompts: list[int] = []  # the prompt of each candidate
        self.logits: list[np.ndarray] = []  # (h, w) each
        self.iou: list[float] = []
        self.steady: list[float] = []

    def add(self, prompts: list[int], logits: np.ndarray, iou: np.ndarray) -> None:
        """Add the finite candidates, from three per prompt: logits (3p, h, w) and predicted IoU (3p,)."""
        owner = np.repeat(prompts, 3)
        is_finite = np.isfinite(logits).all((1, 2)) & np.isfinite(iou)
        owner, logits, iou = owner[is_finite], logits[is_finite], iou[is_finite]
        steady = candidates.stability(logits)
        self.prompts += owner.tolist()
        self.logits += list(logits)
        self.iou += iou.tolist()
        self.steady += steady.tolist()
        limits = self.segmenter.settings.limits
        fit = (iou >= limits.min_iou) & (steady >= limits.min_stability)
        if fit.any() and candidates.scores(logits[fit] > 0, iou[fit], steady[fit]).max() > self.best:
            self._raise_bar()

    def rung(self) -> Rung | None:
        """Return the rung that ``candidates.choose`` would find among all candidates, or None."""
        for status, limits in (
            ("chosen", self.segmenter.settings.limits),
            ("relaxed", self.segmenter.settings.limits.relaxed()),
        ):
            picked = self._picked(limits)
            if picked is not None:
                return Rung(np.stack([self.logits[i] for i in picked[0]]), picked[1], status)
        return None

    def _raise_bar(self) -> None:
        limits, picked = self.segmenter.settings.limits, self._picked(self.segmenter.settings.limits)
        if picked is None:
            return
        if len(picked[0]) == self.segmenter.settings.keep:
            regions = np.stack([self.logits[i] > 0 for i in picked[0]])
            iou, steady = (np.array([of[i] for i in picked[0]]) for of in (self.iou, self.steady))
            self.best = float(candidates.scores(regions, iou, steady).min())
        else:
            self.best = 0.0
        self.bar = max(limits.min_iou, self.best)

    def _picked(self, limits: candidates.Limits) -> tuple[list[int], float] | None:
        """Pick indices, best first, and a score. Among equal scores the earlier prompt wins."""
        if not self.logits:
            return None
        order = np.argsort(self.prompts, kind="stable")
        best = candidates.pick(
            np.stack([self.logits[i] > 0 for i in order]),
            np.array(self.iou)[order],
            np.array(self.steady)[order],
            limits,
            keep=self.segmenter.settings.keep,
            max_overlap=self.segmenter.settings.max_overlap,
        )
        return None if best is None else ([int(order[i]) for i in best[0]], best[1])
