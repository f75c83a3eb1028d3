"""The segmenter of large images: the masks of ``Sam2Segmenter``, up to rounding, for less work.

Encoder and decoder do the same in fewer steps (``fast_encoder``, ``fast_decoder``), and a point's masks are
drawn only where its predicted IoU leaves them a chance: a candidate's score is that times three factors in
[0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medfocus.masks import candidates
from medfocus.masks.sam2.fast_decoder import Answer, FastDecoder, Scene
from medfocus.masks.sam2.fast_encoder import FOLDED, FastEncoder
from medfocus.masks.sam2.segmenter import Features, Found, Prompts, Sam2Segmenter
from medfocus.masks.segmenter import segmenter_key

LEAST_SIZE = 512  # pixels a side that the model sees; below it decoding is cheap, and old masks stay valid


def fits(plain: Sam2Segmenter) -> bool:
    """Whether a fast segmenter can stand in: not for SAM2's own generator.

    And for models as all published ones are: the mask decoder reads the encoder's two finest levels, and
    into these no coarser one is mixed.
    """
    model: Any = plain.model
    neck, levels = model.image_encoder.neck, len(model.image_encoder.neck.convs) - model.image_encoder.scalp
    apart = min(neck.fpn_top_down_levels) >= FOLDED and levels == FOLDED + 1
    return plain.settings.strategy != "automatic" and model.use_high_res_features_in_sam and apart


class FastSegmenter(Sam2Segmenter):
    """As a ``Sam2Segmenter`` chooses, from the same candidates; its key differs, for rounding may decide."""

    def __init__(self, plain: Sam2Segmenter) -> None:
        """Take model, strategy and limits of ``plain``. Raises ValueError unless it ``fits``."""
        if not fits(plain):
            raise ValueError(
                f"no fast segmenter for the strategy {plain.settings.strategy!r} and this SAM2: it does "
                "'grid', 'center' and 'box' on models of the published kind. Take the plain one."
            )
        super().__init__(plain.predictor, "", plain.settings, plain.batch_size)
        self.encoder, self.decoder = FastEncoder(self.model), FastDecoder(self.model)
        half = self.predictor.device.type == "cuda"  # the encoder's blocks, see there
        precision = "bfloat16" if half else "float32"
        self.features_key = segmenter_key(type(self), features_of=plain.features_key, precision=precision)
        self.key = segmenter_key(type(self), plain=plain.key, precision=precision)

    def encode(self, images: Sequence[np.ndarray]) -> Features:
        """Images of any sizes, squeezed to (S, S), through the image encoder as one batch of B."""
        pixels = self.predictor._transforms.forward_batch(list(images))
        if self.predictor.device.type == "cuda":
            pixels = pixels.pin_memory()
        with torch.inference_mode():
            return self.encoder(pixels.to(self.predictor.device, non_blocking=True))

    def decode(self, features: Features, index: int, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
        """All prompts of image ``index`` of the batch -> three candidates a prompt, M = 3P.

        Returns their logits (M, S/4, S/4) float32 (> 0 inside) and predicted IoU (M,) float32.
        """
        scene = self._scene(features, index)
        drawn = [
            self._drawn(scene, self._answer(scene, prompts, some))
            for some in self._chunks(range(len(prompts.coords)))
        ]
        logits, iou = zip(*drawn, strict=True)
        return np.concatenate(logits), np.concatenate(iou)

    def _found(self, features: Features, index: int) -> Found:
        """The ladder for one encoded image, up to the box around the whole of it.

        What is not drawn could not have been chosen: see ``_Seen.bar``.
        """
        scene = self._scene(features, index)
        seen = _Seen(self)
        # From the middle outwards, for a central region scores higher.
        away = np.abs(self.prompts.coords - 0.5).mean(1).max(1)  # (P,)
        for some in self._chunks(np.argsort(away, kind="stable").tolist()):
            answer = self._answer(scene, self.prompts, some)
            bound = answer.predicted_iou.float().cpu().numpy().max(1)  # (p,)
            hopeful = np.flatnonzero(~(bound < seen.bar))
            if len(hopeful):
                seen.add([some[i] for i in hopeful], *self._drawn(scene, answer.only(hopeful)))
        return seen.choice() or self._boxed(features, index)

    def _scene(self, features: Features, index: int) -> Scene:
        one = slice(index, index + 1)
        return self.decoder.scene(features.embedding[one], tuple(level[one] for level in features.fine))

    def _chunks(self, prompts: Sequence[int]) -> list[list[int]]:
        size = self.decoder.chunk
        return [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]

    def _answer(self, scene: Scene, prompts: Prompts, some: list[int]) -> Answer:
        device = scene.places.device
        coords = torch.from_numpy(prompts.coords[some]).to(device)
        labels = torch.from_numpy(prompts.labels[some]).to(device)
        return self.decoder.answer(scene, self.predictor._transforms.transform_coords(coords), labels)

    def _drawn(self, scene: Scene, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """The candidates of p prompts: logits (3p, S/4, S/4) and predicted IoU (3p,)."""
        logits = self.decoder.logits(scene, answer).flatten(0, 1).float().cpu().numpy()
        return logits, answer.predicted_iou.flatten().float().cpu().numpy()


class _Seen:
    """Candidates in the order in which they were drawn, and what the best of them leave to the others."""

    def __init__(self, segmenter: FastSegmenter) -> None:
        self.segmenter = segmenter
        # A prompt whose predicted IoU lies below changes nothing any more. ``candidates.pick`` takes
        # candidates by their score, which is at most that, and it has ``keep`` better ones here, or, with
        # fewer, at least one, so that the relaxed limits will not be asked for.
        self.bar = 0.0
        self.best = 0.0  # score of the last of those ``keep``, or 0
        self.prompts: list[int] = []  # of each candidate
        self.logits: list[np.ndarray] = []  # (h, w) each
        self.iou: list[float] = []
        self.steady: list[float] = []

    def add(self, prompts: list[int], logits: np.ndarray, iou: np.ndarray) -> None:
        """Three candidates a prompt, (3p, h, w) and (3p,); those with a number that is none are left out."""
        owner = np.repeat(prompts, 3)
        sound = np.isfinite(logits).all((1, 2)) & np.isfinite(iou)
        owner, logits, iou = owner[sound], logits[sound], iou[sound]
        steady = candidates.stability(logits)
        self.prompts += owner.tolist()
        self.logits += list(logits)
        self.iou += iou.tolist()
        self.steady += steady.tolist()
        limits = self.segmenter.settings.limits
        fit = (iou >= limits.min_iou) & (steady >= limits.min_stability)
        if fit.any() and candidates.scores(logits[fit] > 0, iou[fit], steady[fit]).max() > self.best:
            self._raise_bar()

    def choice(self) -> Found | None:
        """What ``candidates.choose`` makes of all candidates; None where it finds nothing."""
        for status, limits in (
            ("chosen", self.segmenter.settings.limits),
            ("relaxed", self.segmenter.settings.limits.relaxed()),
        ):
            picked = self._picked(limits)
            if picked is not None:
                return Found(np.stack([self.logits[i] for i in picked[0]]), picked[1], status)
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
        """``candidates.pick`` in the order of the prompts, which decides ties: indices, best first; score."""
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
