"""Choose the adapter of an image encoder or a text tower by its class."""

from __future__ import annotations

from torch import nn

from medfocus.clip.towers.base import ImageTower
from medfocus.clip.towers.convolutional import CHAINS, ModifiedResNetTower, TimmConvTower
from medfocus.clip.towers.texts import HuggingFaceText, OpenClipText, TextTower
from medfocus.clip.towers.vision_transformers import OpenClipViT, TimmViT


def image_tower(visual: nn.Module) -> ImageTower:
    """Return the tower of an image encoder of open_clip, or of a tail; an unknown kind only encodes."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    if isinstance(visual, VisionTransformer):
        return OpenClipViT(visual)
    if isinstance(visual, ModifiedResNet):
        return ModifiedResNetTower(visual)
    if isinstance(visual, TimmModel):
        if type(visual.trunk) is TimmVisionTransformer:
            return TimmViT(visual)
        if type(visual.trunk).__name__ in CHAINS:
            return TimmConvTower(visual)
    return ImageTower(visual)


def text_tower(model: nn.Module) -> TextTower:
    """Return the text tower of open_clip's model; an unknown kind only encodes."""
    from open_clip.hf_model import HFTextEncoder

    # CLIP itself holds the parts of its text tower; CustomTextCLIP holds them in ``text``.
    text = getattr(model, "text", model)
    if isinstance(getattr(text, "token_embedding", None), nn.Embedding):
        return OpenClipText(text)
    return HuggingFaceText(text) if isinstance(text, HFTextEncoder) else TextTower(text)
