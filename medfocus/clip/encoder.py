"""Encode images and texts with open_clip's CLIP, and prepare the end of the image encoder for training."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from medfocus.clip.regions import REGIONS, Region
from medfocus.clip.tokenizer import check_lengths
from medfocus.clip.vit import ActivationCache, Tail, as_vit, pooled
from medfocus.images.geometry import Frame

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

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

    def with_region(self, region: str, attention_bias: float) -> ClipEncoder:
        """Return a copy of this encoder, with another key, that uses a region in the channels after RGB.

        Args:
            region: A key of REGIONS; ``medfocus.focus.view.view`` makes the views.
            attention_bias: β, added in every block to the class token's attention logits for the patches
                inside the region; only "attention" uses it. At 0 the features equal those without a region.

        Raises ValueError for an unknown region, or for one that needs a ViT if the image encoder is not one.
        """
        if region not in REGIONS:
            raise ValueError(f"region {region!r} is not known. Use one of {', '.join(REGIONS)}.")
        kind = REGIONS[region](attention_bias)
        if kind.needs_vit:
            self._cut(1)
        key = hashlib.sha256(f"{self.key} {kind.key}".encode()).hexdigest()
        return replace(self, key=key, model=kind.adapt(self.model), region=kind)

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
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255
        mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
        parts = pixels.split(3, dim=1)
        return torch.cat([(part - mean) / std if part.shape[1] == 3 else part for part in parts], dim=1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, C, S, S) as image features (B, D), each of length one."""
        visual = as_vit(self.model.visual)
        if self.cache and visual is not None:
            deepest = len(visual.transformer.resblocks)
            tokens = self._tokens(visual, pixels, {deepest})[deepest]
            return self.region.merge([pooled(visual, image) for image in tokens])
        return self.image_features(pixels)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Encode like ``encode_images``, but with a gradient, for a copy of the model that trains."""
        pixels = pixels.to(self.device)
        visual = as_vit(self.model.visual)
        images = self.region.images(pixels)
        mask = None if visual is None else self.region.attention_mask(visual, pixels)
        if visual is None or mask is None:
            model: Any = self.model
            return self.region.merge([model.encode_image(image, normalize=True) for image in images])
        tokens = (visual.transformer(visual._embeds(image), attn_mask=mask) for image in images)
        return self.region.merge([pooled(visual, image) for image in tokens])

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
        """Encode pixels (B, C, S, S) as image features followed by patch tokens of ``layers``: (B, D + P).

        Layer 0 is the embedding, and layer n the output of block n. Patch tokens are averaged over
        ``grid`` x ``grid`` cells and, with the region "dual", over both images. Raises ValueError as
        ``trunk`` does, or for a layer or a grid that the image encoder does not have.
        """
        visual, _ = self._cut(1)
        deepest, side = len(visual.transformer.resblocks), visual.grid_size[0]
        if not set(layers) <= set(range(deepest + 1)) or not 1 <= grid <= side:
            raise ValueError(
                f"{self.name}: patch features of layers {list(layers)} on {grid} x {grid} cells; its image "
                f"encoder has layers 0 to {deepest} and {side} x {side} patches."
            )
        tokens = self._tokens(visual, pixels, {*layers, deepest})
        features = self.region.merge([pooled(visual, image) for image in tokens[deepest]])

        def patches(layer: int) -> Tensor:
            """Average the tokens (B, L, W) of each image to (B, W * grid * grid)."""
            maps = [image[:, 1:].mT.unflatten(2, visual.grid_size) for image in tokens[layer]]
            cells = [adaptive_avg_pool2d(map_, grid).flatten(1) for map_ in maps]
            return torch.stack(cells).mean(dim=0)

        return torch.cat([features, *(patches(layer) for layer in sorted(set(layers)))], dim=1)

    @torch.no_grad()
    def trunk(self, pixels: Tensor, blocks: int) -> Tensor:
        """Compute the input of the last ``blocks`` blocks, for ``tail``, from pixels (B, C, S, S).

        The result is tokens (B, L, W). With the region "dual" it has the tokens of both images, (B, 2 L, W);
        with "attention" it has one more token with the coverage of the patches, (B, L + 1, W).
        Raises ValueError if the image encoder is not open_clip's VisionTransformer or has fewer blocks.
        """
        visual, cut = self._cut(blocks)
        tokens = self._tokens(visual, pixels, {cut})[cut]
        return self.region.pack(tokens, visual, pixels.to(self.device))

    def _tokens(self, visual: VisionTransformer, pixels: Tensor, depths: set[int]) -> dict[int, list[Tensor]]:
        """Return depth -> tokens (B, L, W) of each image for ``depths``, or more; see ``ActivationCache``."""
        cache = self.cache or ActivationCache()
        cache.depths |= depths
        if cache.pixels is not pixels or not depths <= cache.tokens.keys():
            cache.pixels, on_device = pixels, pixels.to(self.device)
            mask = self.region.attention_mask(visual, on_device)
            tokens = [visual._embeds(image) for image in self.region.images(on_device)]
            cache.tokens = {0: tokens} if 0 in cache.depths else {}
            for depth, block in enumerate(visual.transformer.resblocks[: max(cache.depths)], 1):
                tokens = [block(image, attn_mask=mask) for image in tokens]  # batch first
                if depth in cache.depths:
                    cache.tokens[depth] = tokens
        return cache.tokens

    def tail(self, blocks: int) -> nn.Module:
        """Return a trainable copy of the last ``blocks`` blocks and the projection, (B, L, W) -> (B, D).

        ``tail(n)(trunk(x, n))`` equals ``encode_images(x)`` until the copy trains. Raises as ``trunk`` does.
        """
        visual, cut = self._cut(blocks)
        embedding = ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")
        unused = [*(getattr(visual, name) for name in embedding), *visual.transformer.resblocks[:cut]]
        tower = copy.deepcopy(visual, {id(part): part for part in unused})  # does not copy the unused parts
        for name in embedding:
            setattr(tower, name, None)
        tower.transformer.resblocks = tower.transformer.resblocks[cut:]
        return Tail(tower, self.region).requires_grad_(True)

    def _cut(self, blocks: int) -> tuple[VisionTransformer, int]:
        """Return the image encoder and the index of its first block to fine-tune."""
        visual = as_vit(self.model.visual)
        if visual is None:
            raise ValueError(
                f"{self.name}: its image encoder is {type(self.model.visual).__name__}, not open_clip's "
                "VisionTransformer, so its last blocks cannot be fine-tuned. Take a ViT such as ViT-B-32, or "
                "a method that leaves the image encoder frozen."
            )
        layers = len(visual.transformer.resblocks)
        if not 1 <= blocks <= layers:
            raise ValueError(
                f"{self.name}: {blocks} blocks to fine-tune; its image encoder has 1 to {layers}."
            )
        return visual, layers - blocks
