"""Scores: a differentiable number for each image, such as the logit of the predicted class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]  # output of the model (B, D) -> (B,), differentiable


def score_gradients(scores: Tensor, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the gradients of the scores (B,) of ``count`` images with respect to each of ``inputs``.

    Raises ValueError for scores of another shape or without a gradient.
    """
    if scores.shape != (count,):
        raise ValueError(
            f"score: its result has shape {tuple(scores.shape)} for {count} images. Return one number for "
            f"each image, ({count},)."
        )
    results = torch.autograd.grad(scores.sum(), inputs, allow_unused=True) if scores.requires_grad else []
    gradients = [gradient for gradient in results if gradient is not None]
    if len(gradients) != len(inputs):
        raise ValueError(
            "score: its result has no gradient with respect to the model. Compute it in torch without "
            "no_grad and detach, or use occlusion."
        )
    return gradients
