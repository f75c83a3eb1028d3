"""The base of trained copies of both towers, which share their frozen weights with the encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medfocus.clip.regions import alpha_layer
from medfocus.clip.towers.base import Tower
from medfocus.clip.towers.choose import image_tower, text_tower

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


class TrainedTowers(nn.Module):
    """Copies of a CLIP's towers for a subclass to change.

    Its parameters and state are those that the subclass adds and, with the region "alpha", the fourth channel
    of the first convolution. The frozen weights are the encoder's own.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        """Copy the towers of ``encoder``; the subclass then changes ``towers``."""
        super().__init__()
        added = alpha_layer(encoder.model)
        trained = set() if added is None else set(map(id, added.parameters()))
        shared = {id(weight): weight for weight in encoder.model.parameters() if id(weight) not in trained}
        model = copy.deepcopy(encoder.model, shared)
        if (layer := alpha_layer(model)) is not None:
            self.alpha = layer.requires_grad_(True)
        self.encoder = replace(encoder, model=model)  # not an nn.Module, so the state excludes the towers

    def towers(self) -> Iterator[Tower]:
        """Yield the copies of the image encoder and of the text tower."""
        yield image_tower(self.encoder.model.visual)  # pyright: ignore[reportArgumentType]
        yield text_tower(self.encoder.model)

    def forward(self, images: Tensor) -> Tensor:
        """Encode views (B, S, S, C) uint8 as image features (B, D) on the CPU, each of length one."""
        return self.encoder.image_features(self.encoder.preprocess(images)).cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D) on the CPU, each of length one, with a gradient."""
        tokens = self.encoder.tokenizer(texts).to(self.encoder.device)  # (N, context)
        return self.encoder.model.encode_text(tokens, normalize=True).cpu()  # pyright: ignore[reportCallIssue]
