"""What a fitted method looked at: the attribution that its kind allows, for any of METHODS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medfocus.clip.regions import patch_coverage
from medfocus.explain.attribution import grad_cam, gradient_attention, occlusion, to_maps
from medfocus.focus.modes import FILL, crop
from medfocus.images.decode import letterbox_mask

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder
    from medfocus.methods import Method

_STEP = 1e-2  # of the central differences, against features of length one
_SQUARES = 8  # a side, of an occlusion; each overlaps half of its neighbour


def explain(method: Method, encoder: ClipEncoder, views: Tensor, targets: Tensor) -> tuple[Tensor, str]:
    """Attribution of a fitted method's main classifier for one class per image.

    Args:
        method: Fitted.
        encoder: The one that it was fitted on.
        views: (B, S, S, C) uint8, RGB first.
        targets: (B,) int64, the class that is explained.

    Returns:
        Maps (B, S, S) that sum to one, and the name of the way: "gradient x attention" for methods on the
        features of a ViT, "Grad-CAM" for timm's backbones with a map of features, "occlusion" else.
    """
    body = getattr(method, "model_", None)
    if body is not None and hasattr(body, "forward_features"):
        pixels = method.pixels(views)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            maps = grad_cam(body, pixels, lambda logits: logits[torch.arange(len(targets)), targets])
        except ValueError:  # a ViT: its features are tokens
            return _occluded(method, views, targets), "occlusion"
        return _resized(maps, views.shape[1]), "Grad-CAM"
    if method.embedding == "features" and encoder.region in (None, "attention"):
        from open_clip.transformer import VisionTransformer

        visual = encoder.model.visual
        if isinstance(visual, VisionTransformer):
            pixels = encoder.preprocess(views)
            slopes = _slopes(method, method.embed(views), targets).to(encoder.device)  # (B, D)
            bias = None
            if encoder.region == "attention":
                coverage = patch_coverage(pixels[:, 3:], visual.conv1.kernel_size[0])
                own = coverage.new_zeros(len(coverage), 1)
                bias = torch.cat([own, encoder.attention_bias * coverage], dim=1)  # (B, L)
            maps = gradient_attention(visual, pixels[:, :3], lambda f: (f * slopes).sum(dim=1), bias)
            return maps, "gradient x attention"
    return _occluded(method, views, targets), "occlusion"


def on_image(heat: np.ndarray, mask: np.ndarray, focus: str) -> np.ndarray:
    """An attribution of the whole image's view (S, S) -> of the image itself, (H, W), summing to one.

    Args:
        heat: As ``explain`` gives it.
        mask: (H, W) bool, what the view was made with; an empty one is read as the whole image.
        focus: Of the view; "crop" shows a part of the image, and what it leaves out gets nothing.
    """
    height, width = mask.shape
    rows, columns = slice(0, height), slice(0, width)
    if focus == "crop":
        places = np.moveaxis(np.indices(mask.shape), 0, -1)  # (H, W, 2)
        shown = crop(places, mask if mask.any() else np.ones_like(mask), 0.0)
        (top, left), (bottom, right) = shown[0, 0], shown[-1, -1]
        rows, columns = slice(top, bottom + 1), slice(left, right + 1)
    found = np.zeros(mask.shape, np.float32)
    part = found[rows, columns]
    framed = letterbox_mask(np.ones(part.shape, bool), len(heat)) > 0.5  # (S, S), True on the image
    inside = Image.fromarray(np.ascontiguousarray(heat[np.ix_(framed.any(1), framed.any(0))], np.float32))
    part[:] = np.asarray(inside.resize(part.shape[::-1], Image.Resampling.BILINEAR))
    total = found.sum(dtype=np.float64)
    return found / np.float32(total) if total > 0 else np.full(mask.shape, 1 / mask.size, np.float32)


def _slopes(method: Method, features: Tensor, targets: Tensor) -> Tensor:
    """∂ (logit of the target - mean of the others) / ∂ features (B, D), by central differences.

    Heads need no graph for that. The margin and not the logit, as class texts have most of their direction
    in common, and what all classes look at explains none.
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


def _occluded(method: Method, views: Tensor, targets: Tensor) -> Tensor:
    size = views.shape[1]
    stride = max(1, size // (_SQUARES + 1))

    def predict(shown: Tensor, further: Tensor) -> Tensor:
        whole = torch.cat([shown, further.expand(len(shown), *further.shape)], dim=3)
        return next(iter(method.logits(method.embed(whole)).values())).double().softmax(dim=1)

    maps = []
    for image, target in zip(views, targets.tolist(), strict=True):
        further = image[..., 3:]  # a region stays where it is
        if further.shape[2] == 3:  # the focused twin would show what is hidden
            further = further.clone()
        maps.append(
            occlusion(
                lambda shown, further=further: predict(shown, further),
                image[..., :3].contiguous(),
                target,
                patch=2 * stride,
                stride=stride,
                fill=FILL,
            )
        )
    return torch.cat(maps)


def _resized(maps: Tensor, size: int) -> Tensor:
    """Maps (B, s, s) at the size of the views, summing to one."""
    return maps if maps.shape[-1] == size else to_maps(maps, size)
