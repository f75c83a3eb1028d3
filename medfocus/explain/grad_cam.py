"""Grad-CAM, for timm's convolutional nets and Swin (Selvaraju et al., arXiv 1610.02391)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from medfocus.explain.maps import to_maps
from medfocus.explain.scores import Score, score_gradients


def grad_cam(model: nn.Module, pixels: Tensor, score: Score) -> Tensor:
    """Compute Grad-CAM: ReLU(Σ_k α_k A_k), where α_k is the mean of ∂score/∂A_k over the feature map A_k.

    Args:
        model: A model of timm in eval mode. Its ``forward_features`` returns the feature maps A, and its
            ``forward_head`` the output.
        pixels: (B, C, S, S), preprocessed.
        score: Maps the output of ``model``, such as logits (B, K), to a number for each image (B,). Each
            number depends only on its own image.

    Returns:
        (B, S, S). Source: Selvaraju et al., arXiv 1610.02391.

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
    alpha = slope.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    return to_maps(relu((alpha * features.detach()).sum(dim=1)), pixels.shape[-1])
