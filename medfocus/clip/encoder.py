"""Encode images and texts with open_clip's CLIP, and prepare the end of the image encoder for training.

The towers (``medfocus.clip.towers``) know the kinds of image encoder and text tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from medfocus.clip.regions import REGIONS, Region, load_alpha
from medfocus.clip.tail import ActivationCache, Tail, cells
from medfocus.clip.tokenizer import check_lengths
from medfocus.clip.towers.base import VERBS, ImageTower
from medfocus.clip.towers.choose import image_tower, text_tower
from medfocus.clip.towers.texts import TextTower
from medfocus.images.geometry import Frame
from medfocus.storage import weights

_TEXT_BATCH = 256  # texts per forward pass; bounds the memory of a thousand classes


class Describer(Protocol):
    """A segmenter that also computes image features."""

    features_key: str  # sha256 hex of its weights and code, which names the features in caches

    def describe(self, images: Sequence[np.ndarray], grid: int) -> Tensor:
        """Encode images (H, W, 3) uint8 RGB as features (B, P) on ``grid`` x ``grid`` cells."""
        ...


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A frozen CLIP on one device: image encoder, text tower, tokenizer and preprocessing."""

    name: str  # as the user gave it
    key: str  # sha256 of weights and configuration; names the features in caches
    config: dict[str, Any]  # the content of an open_clip_config.json that builds this model again
    model: nn.Module  # open_clip's, frozen, in eval mode
    tokenizer: Any  # list of texts -> (N, context) int64
    dim: int  # D, of the space that images and texts share
    frame: Frame  # how images fill the encoder's input
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    logit_scale: float  # s, after the exponential: logits = s * I @ T.T
    device: torch.device
    segmenter: Describer | None = None  # adds its image features to CLIP's
    region: Region = field(default_factory=Region)  # how the image encoder uses the channels after RGB
    skipped: int = 0  # first blocks that ``model.visual`` lacks, if it is a tail
    cache: ActivationCache | None = None  # activations of the last batch; None caches nothing

    @property
    def image_size(self) -> int:
        """S, pixels per side."""
        return self.frame.size

    def with_activation_cache(self) -> ClipEncoder:
        """Return a copy of this encoder that caches activations, so that a batch passes each block once.

        The cache works for consecutive calls with the same views object.
        """
        return replace(self, cache=ActivationCache())

    def with_segmenter(self, segmenter: Describer) -> ClipEncoder:
        """Return a copy of this encoder with a segmenter's image features, and a key of both."""
        key = hashlib.sha256(f"{self.key} {segmenter.features_key}".encode()).hexdigest()
        return replace(self, key=key, segmenter=segmenter)

    @cached_property
    def tower(self) -> ImageTower:
        """The image encoder's tower."""
        return image_tower(self.model.visual)  # pyright: ignore[reportArgumentType]

    @cached_property
    def text_tower(self) -> TextTower:
        """The text tower."""
        return text_tower(self.model)

    def require(self, verbs: Iterable[str], caller: str) -> None:
        """Raise TowerError, beginning with ``caller``, if a tower lacks one of ``verbs``."""
        for verb in verbs:
            for tower in (self.tower, self.text_tower):
                if tower.part in VERBS[verb].parts:
                    tower.require(verb, caller, self.name)

    def with_region(self, region: str, attention_bias: float, alpha: str | Path = "") -> ClipEncoder:
        """Return a copy of this encoder, with another key, that uses a region in the channels after RGB.

        Args:
            region: A key of REGIONS; ``medfocus.focus.view.view`` makes the views.
            attention_bias: β, added in every block to the attention logits of the patches inside the region,
                see ``ImageTower.bias``; only "attention" uses it. At 0 the features equal those without a
                region.
            alpha: A checkpoint of Alpha-CLIP's image encoder, which "alpha" uses instead of this encoder's,
                or of its channel alone. Empty: this encoder's weights, and a channel of zeros.

        Raises ValueError for an unknown region, or for weights of another architecture; TowerError if the
        image encoder cannot use the region; FileNotFoundError if the checkpoint does not exist.
        """
        if region not in REGIONS:
            raise ValueError(f"region {region!r} is not known. Use one of {', '.join(REGIONS)}.")
        kind = REGIONS[region](attention_bias)
        self.require(kind.needs, f"the focus {region!r}")
        model, identity = kind.adapt(self.model, self.tower), f"{self.key} {kind.key}"
        if alpha and region == "alpha":
            state = weights.load(weights.resolve(str(alpha), hub_id=None, filename=None, what="clip.alpha"))
            load_alpha(model, state)
            identity += f" {weights.digest(state)}"
        return replace(self, key=hashlib.sha256(identity.encode()).hexdigest(), model=model, region=kind)

    def describe(self, views: np.ndarray | Tensor, grid: int) -> Tensor:
        """Encode views (B, S, S, C) uint8 as the segmenter's features (B, P) on ``grid`` x ``grid`` cells.

        Raises ValueError for an encoder without a segmenter.
        """
        if self.segmenter is None:
            raise ValueError(
                f"{self.name}: segmenter_grid is {grid}, but the encoder has no segmenter with image "
                "features. Set masks.segmenter to sam2, or segmenter_grid to 0."
            )
        cache = self.cache or ActivationCache()
        cache.turn_to(views)
        if grid not in cache.described:
            images = list(np.ascontiguousarray(np.asarray(views)[..., :3]))
            cache.described[grid] = self.segmenter.describe(images, grid).to(self.device)
        return cache.described[grid]

    def preprocess(self, views: np.ndarray | Tensor) -> Tensor:
        """Turn views (B, S, S, C) uint8 into pixels (B, C, S, S) float32 on the device.

        Groups of three channels are normalised as RGB. A fourth channel, the region, is scaled to [0, 1].
        """
        cache = self.cache or ActivationCache()
        cache.turn_to(views)
        if cache.pixels is None:
            cache.pixels = self._normalised(views)
        return cache.pixels

    def _normalised(self, views: np.ndarray | Tensor) -> Tensor:
        pixels = torch.as_tensor(views).to(self.device).permute(0, 3, 1, 2)  # (B, C, S, S)
        pixels = pixels.to(torch.float32, memory_format=self.tower.memory_format) / 255
        mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
        parts = pixels.split(3, dim=1)
        return torch.cat([(part - mean) / std if part.shape[1] == 3 else part for part in parts], dim=1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, C, S, S) as image features (B, D), each of length one."""
        if self.cache and "stages" in self.tower.verbs:
            return self._pooled(self._passed(pixels, {self.tower.depth}))
        return self.image_features(pixels)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Encode like ``encode_images``, but with a gradient, for a copy of the model that trains."""
        pixels = pixels.to(self.device)
        form = self.tower.memory_format
        images = [image.contiguous(memory_format=form) for image in self.region.images(pixels)]
        bias = self.region.bias(self.tower, pixels)
        if bias is None:
            model: Any = self.model
            return self.region.merge([model.encode_image(image, normalize=True) for image in images])
        return self.region.merge([self.tower.run(self.tower.embed(image), bias) for image in images])

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D), each of length one.

        Raises ValueError for a text longer than the context, because two truncated texts could be equal.
        """
        check_lengths(self.tokenizer, texts, self.name)
        tokens = self.tokenizer(texts).to(self.device)  # (N, context)
        model: Any = self.model
        return torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(_TEXT_BATCH)])

    @torch.no_grad()
    def encode_layers(self, pixels: Tensor, layers: tuple[int, ...], grid: int) -> Tensor:
        """Encode pixels (B, C, S, S) as image features followed by feature maps of ``layers``: (B, D + P).

        Layer 0 is the embedding, and layer n the output of block n: the patch tokens of a ViT, or the maps
        of a convolutional net's stage. Maps are averaged over ``grid`` x ``grid`` cells; with two images, the
        maps of the second follow those of the first. Raises as ``check_layers`` does.
        """
        self.check_layers(layers, grid, "layers")
        passed = self._passed(pixels, {*layers, self.tower.depth})
        parts = [cells(self.tower, passed.states[layer], grid) for layer in sorted(set(layers))]
        return torch.cat([self._pooled(passed), *parts], dim=1)

    def check_layers(self, layers: tuple[int, ...], grid: int, caller: str) -> None:
        """Raise ValueError, beginning with ``caller``, unless the image encoder has these layers."""
        self.require(("stages",), caller)
        sides = self.tower.sides(self.image_size)
        known = all(0 <= layer < len(sides) for layer in layers)
        if not known or not 1 <= grid <= min((sides[layer] for layer in layers), default=grid):
            cells = ", ".join(f"{side} x {side}" for side in dict.fromkeys(sides))
            raise ValueError(
                f"{caller}: feature maps of layers {list(layers)} on {grid} x {grid} cells, but the image "
                f"encoder of {self.name} has layers 0 to {len(sides) - 1} of {cells} cells. Change "
                "layers or grid."
            )

    @torch.no_grad()
    def trunk(self, pixels: Tensor, blocks: int) -> Tensor:
        """Compute the input of the last ``blocks`` blocks, for ``tail``, from pixels (B, C, S, S).

        The result is tokens (B, L, W), or maps (B, W, G, G) of a convolutional net. With the region "dual"
        it has those of both images along dimension 1; with "attention" it has the coverage of each token's
        patch in one more channel, (B, L, W + 1). Raises as ``check_blocks`` does.
        """
        self.check_blocks(blocks, "trunk")
        cut = self.tower.depth - blocks
        states = self._passed(pixels, {cut}).states[cut]
        return self.region.pack(states, self.tower, pixels.to(self.device)).contiguous()

    def tail(self, blocks: int) -> Tail:
        """Return a trainable copy of the last ``blocks`` blocks, pooling and projection: (B, ...) -> (B, D).

        ``tail(n)(trunk(x, n))`` equals ``encode_images(x)`` until the copy trains. Raises as ``check_blocks``
        does.
        """
        self.check_blocks(blocks, "tail")
        visual = self.tower.tail(blocks)
        skipped = self.skipped + self.tower.depth - image_tower(visual).depth
        return Tail(visual, self.region, skipped).requires_grad_(True)

    def check_blocks(self, blocks: int, caller: str) -> None:
        """Raise ValueError, beginning with ``caller``, unless the image encoder has ``blocks`` to train."""
        self.require(("tail",), caller)
        if not 1 <= blocks <= self.tower.depth:
            raise ValueError(
                f"{caller}: {blocks} blocks to train, but the image encoder of {self.name} has 1 to "
                f"{self.tower.depth}. Change blocks."
            )

    def _pooled(self, passed: ActivationCache) -> Tensor:
        """Return the image features (B, D) of a batch that has passed all blocks."""
        states = passed.states[self.tower.depth]
        return self.region.merge([self.tower.pool(state, passed.bias) for state in states])

    def _passed(self, pixels: Tensor, depths: set[int]) -> ActivationCache:
        """Return the states of a batch at ``depths``, or more; see ``ActivationCache``."""
        cache = self.cache or ActivationCache()
        cache.depths |= depths
        if cache.pixels is not pixels or not depths <= cache.states.keys():
            cache.pixels, on_device = pixels, pixels.to(self.device)
            cache.bias = self.region.bias(self.tower, on_device)
            states = [self.tower.embed(image) for image in self.region.images(on_device)]
            cache.states = {0: states} if 0 in cache.depths else {}
            for depth in range(1, max(cache.depths) + 1):
                states = [self.tower.block(depth, state, cache.bias) for state in states]
                if depth in cache.depths:
                    cache.states[depth] = states
        return cache
