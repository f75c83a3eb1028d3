"""Grad-CAM and HiResCAM, for timm's nets with feature maps and CLIP's convolutional encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from medfocus.clip.towers.base import ImageTower
from medfocus.explain.maps import to_maps
from medfocus.explain.scores import Score, score_gradients

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def grad_cam(model: nn.Module, pixels: Tensor, score: Score) -> Tensor:
    """Compute Grad-CAM of the feature maps A before a network's head; see ``activation_maps``.

    Args:
        model: A model of timm in eval mode. Its ``forward_features`` returns the feature maps A, and its
            ``forward_head`` the output.
        pixels: (B, C, S, S), preprocessed.
        score: Maps the output of ``model``, such as logits (B, K), to a number for each image (B,). Each
            number depends only on its own image.

    Returns:
        (B, S, S).

    Raises ValueError if the model lacks these two methods, is in training mode or has no feature maps, and as
    ``score_gradients`` does.
    """
    net: Any = model
    if model.training:
        raise ValueError(
            "grad_cam: the model is in training mode, where the images of a batch mix. Call eval() first."
        )
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(
            f"grad_cam: {type(model).__name__} has no forward_features and forward_head. Use occlusion."
        )
    with torch.enable_grad():
        features: Tensor = net.forward_features(pixels.detach().requires_grad_())
        if features.ndim != 4:
            raise ValueError(
                f"grad_cam: the features are {tuple(features.shape)}, not maps of channels. Use occlusion."
            )
        (slope,) = score_gradients(score(net.forward_head(features)), [features], len(pixels))
    if str(getattr(model, "output_fmt", "NCHW")) == "NHWC":  # timm's Swin
        features, slope = features.permute(0, 3, 1, 2), slope.permute(0, 3, 1, 2)
    return activation_maps(features, slope, pixels.shape[-1])


def tower_grad_cam(tower: ImageTower, pixels: Tensor, score: Score) -> Tensor:
    """Compute Grad-CAM of the last layer's maps of a CLIP's image encoder: pixels (B, C, S, S) -> (B, S, S).

    Args:
        tower: An image encoder with the verb "activation-maps".
        pixels: (B, C, S, S), preprocessed.
        score: Maps image features (B, D) of length one to a number for each image (B,).

    Raises TowerError for a tower without maps, and ValueError as ``score_gradients`` does.
    """
    tower.require("activation-maps", "Grad-CAM")
    with torch.enable_grad():
        maps = tower.embed(pixels.detach().requires_grad_())
        for number in range(1, tower.depth + 1):
            maps = tower.block(number, maps)
        (slope,) = score_gradients(score(tower.pool(maps)), [maps], len(pixels))
    return activation_maps(maps, slope, pixels.shape[-1])


def layers_cam(
    encoder: ClipEncoder, pixels: Tensor, layers: tuple[int, ...], grid: int, score: Score
) -> Tensor:
    """Compute HiResCAM of the first of ``layers``, through all that follows: (B, C, S, S) -> (B, S, S).

    The heat of a place is Σ_k ∂score/∂A_k · A_k over its feature maps A_k. Of a region with two images, the
    first is explained.

    Args:
        encoder: A CLIP with a convolutional image encoder.
        pixels: (B, C, S, S), preprocessed.
        layers: The layers whose maps join the features; the last layer alone is not enough.
        grid: Cells a side to which the maps are averaged.
        score: Maps the result of ``encoder.encode_layers`` (B, D + P) to a number for each image (B,).

    Source: Draelos and Carin, arXiv 2011.08891. Raises as ``score_gradients`` and ``encoder.trunk`` do.
    """
    blocks = encoder.tower.depth - min(layers)
    packed = encoder.trunk(pixels, blocks)
    with torch.enable_grad():
        packed = packed.detach().requires_grad_()
        features = encoder.tail(blocks).eval().encode_layers(packed, layers, grid)
        (slope,) = score_gradients(score(features), [packed], len(pixels))
    states, _ = encoder.region.unpack(slope * packed.detach(), encoder.tower)
    return to_maps(states[0].sum(dim=1), pixels.shape[-1])


def activation_maps(features: Tensor, slope: Tensor, size: int) -> Tensor:
    """Compute ReLU(Σ_k α_k A_k), where α_k is the mean of ∂score/∂A_k over the feature map A_k.

    Args:
        features: A, (B, W, G, G).
        slope: ∂score/∂A, (B, W, G, G).
        size: S.

    Returns:
        (B, S, S). Source: Selvaraju et al., arXiv 1610.02391.
    """
    alpha = slope.mean(dim=(2, 3), keepdim=True)  # (B, W, 1, 1)
    return to_maps(relu((alpha * features.detach()).sum(dim=1)), size)
