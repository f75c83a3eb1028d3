"""Explain the predictions of any fitted method, by the attribution that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from medfocus.explain.grad_cam import grad_cam, layers_cam, tower_grad_cam
from medfocus.explain.maps import inside_share, to_maps
from medfocus.explain.occlusion import occlusion
from medfocus.explain.transformer import gradient_attention
from medfocus.focus.modes import crop_window
from medfocus.images.geometry import Frame
from medfocus.methods.backbone import Backbone
from medfocus.methods.medfocusclip import MedFocusClip

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder
    from medfocus.learning.method import Method

_STEP = 1e-2  # of the central differences; features have length one
_SQUARES = 8  # per side in an occlusion; each overlaps half of the next


def explain(method: Method, encoder: ClipEncoder, views: Tensor, targets: Tensor) -> tuple[Tensor, str]:
    """Map the parts of each image that the method's main classifier uses for its target class.

    Args:
        method: A fitted method.
        encoder: The encoder that it was fitted on.
        views: (B, S, S, C) uint8, RGB first.
        targets: (B,) int64, the class to explain.

    Returns:
        Maps (B, S, S), and their kind: "gradient x attention" for methods on the features of a ViT,
        "Grad-CAM" for those of a convolutional CLIP and for timm's backbones with feature maps, "HiResCAM"
        for MedFocusCLIP with ``layers`` of a frozen convolutional CLIP, and "occlusion" for all others.
    """
    if isinstance(method, Backbone):
        rows = torch.arange(len(targets))
        try:
            maps = grad_cam(method.model_, method.pixels(views), lambda logits: logits[rows, targets])
        except ValueError:  # the features of timm's ViT are tokens
            return _occluded(method, encoder, views, targets), "occlusion"
        return _resized(maps, views.shape[1]), "Grad-CAM"
    tower = encoder.tower
    if isinstance(method, MedFocusClip) and _has_cam(method, encoder):
        slopes = method.slopes(method.embed(views), targets).to(encoder.device)  # (B, D + P)
        maps = layers_cam(
            encoder,
            encoder.preprocess(views),
            method.layers,
            method.grid,
            lambda features: (features * slopes).sum(dim=1),
        )
        return maps, "HiResCAM"
    ways = tower.verbs & {"attention-maps", "activation-maps"}
    if not ways or method.embedding != "features" or not encoder.region.sees_one_rgb:
        return _occluded(method, encoder, views, targets), "occlusion"
    pixels = encoder.preprocess(views)
    slopes = _slopes(method, method.embed(views), targets).to(encoder.device)  # (B, D)

    def score(features: Tensor) -> Tensor:
        return (features * slopes).sum(dim=1)

    if "attention-maps" in ways:
        bias = encoder.region.bias(tower, pixels)
        return gradient_attention(tower, pixels[:, :3], score, bias), "gradient x attention"
    return tower_grad_cam(tower, pixels[:, :3], score), "Grad-CAM"


def _has_cam(method: MedFocusClip, encoder: ClipEncoder) -> bool:
    """Return whether the inputs are features of layers, of which one has maps and something after it."""
    is_frozen = method.tuning == "adapter" and not method.blocks and not method.segmenter_grid
    has_maps = "activation-maps" in encoder.tower.verbs
    return is_frozen and has_maps and bool(method.layers) and 0 < min(method.layers) < encoder.tower.depth


def explain_one(method: Method, view: np.ndarray, target: int) -> tuple[np.ndarray, str]:
    """Map one view (S, S, C) as ``explain`` does; return the map (S, S) and its kind."""
    maps, way = explain(method, method.encoder, torch.from_numpy(view)[None], torch.tensor([target]))
    return maps[0].numpy(), way


def share_in_mask(heat: np.ndarray, mask: np.ndarray, focus: str, frame: Frame) -> float | None:
    """Return the share of a view's map (S, S) inside its image's mask (H, W) bool.

    The share has no meaning, and is None, for a view that shows a crop or a mask that is empty in the view.
    """
    framed = frame.mask(mask) > 0.5
    return inside_share(heat, framed) if focus != "crop" and framed.any() else None


def on_image(heat: np.ndarray, mask: np.ndarray, focus: str, frame: Frame) -> np.ndarray:
    """Return the map of an image (H, W), with sum one, from the map of its view (S, S).

    Args:
        heat: A map (S, S) from ``explain`` for view 0.
        mask: (H, W) bool, the mask of the view; an empty mask stands for the whole image.
        focus: The focus of the view. "crop" shows a part of the image; the rest of the map is 0.
        frame: The frame of the view. If it cuts off a part of the image, the map is 0 there.
    """
    whole = np.zeros(mask.shape, np.float32)
    shown = crop_window(mask if mask.any() else np.ones_like(mask)) if focus == "crop" else np.s_[:, :]
    part = whole[shown]
    part[:] = frame.unframe(heat, *part.shape)
    total = whole.sum(dtype=np.float64)
    return whole / np.float32(total) if total > 0 else np.full(mask.shape, 1 / mask.size, np.float32)


def _slopes(method: Method, features: Tensor, targets: Tensor) -> Tensor:
    """Compute ∂ (logit of the target - mean of the others) / ∂ features, (B, D), by central differences.

    Central differences need no graph. The function differentiates the margin, not the logit: the texts of
    all classes share most of their direction, and a part that raises all logits explains no class.
    """
    count, dim = features.shape
    steps = _STEP * torch.eye(dim)
    slopes = torch.empty(count, dim)
    for i, target in enumerate(targets.tolist()):
        ahead, behind = (
            next(iter(method.logits(features[i] + sign * steps).values())).double() for sign in (1, -1)
        )  # (D, K)
        change = ahead - behind
        others = (change.sum(dim=1) - change[:, target]) / (change.shape[1] - 1)
        slopes[i] = ((change[:, target] - others) / (2 * _STEP)).float()
    return slopes


def _occluded(method: Method, encoder: ClipEncoder, views: Tensor, targets: Tensor) -> Tensor:
    stride = max(1, views.shape[1] // (_SQUARES + 1))
    maps = []
    for view, target in zip(views, targets.tolist(), strict=True):
        image, further = view[..., :3].contiguous(), view[..., 3:]

        def predict(occluded: Tensor, image: Tensor = image, further: Tensor = further) -> Tensor:
            """Images (N, S, S, 3) uint8 -> probabilities (N, K), with the view's further channels."""
            channels = further.expand(len(occluded), *further.shape)
            if encoder.region.focused == "multiply":  # shows the same place, so hide the square there too
                channels = torch.where((occluded != image).any(dim=3, keepdim=True), occluded, channels)
            inputs = method.embed(torch.cat([occluded, channels], dim=3))
            return next(iter(method.logits(inputs).values())).double().softmax(dim=1)

        maps.append(
            occlusion(predict, image, target, patch=2 * stride, stride=stride, fill=encoder.frame.mean)
        )
    return torch.cat(maps)


def _resized(maps: Tensor, size: int) -> Tensor:
    """Maps (B, s, s) -> maps (B, size, size)."""
    return maps if maps.shape[-1] == size else to_maps(maps, size)
