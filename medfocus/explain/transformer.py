"""Gradient-weighted attention, for vision transformers (Chefer et al., arXiv 2103.15679)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from medfocus.clip.towers.base import Attended, ImageTower
from medfocus.clip.towers.vision_transformers import as_square
from medfocus.explain.maps import to_maps
from medfocus.explain.scores import Score, score_gradients


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Compute the relevance of each input to each token: R ← R + E_h[(∇A ⊙ A)⁺] R, block by block from R = I.

    Args:
        attentions: (B, H, L, L) for each block, the first block first.
        gradients: Gradients of the score with respect to each of ``attentions``.

    Returns:
        (B, L, L). Source: Chefer et al., arXiv 2103.15679, the rule of self-attention.
    """
    joint = torch.eye(attentions[0].shape[-1]).to(attentions[0]).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        joint = joint + relu(gradient * attention).mean(dim=1) @ joint
    return joint


def gradient_attention(tower: ImageTower, pixels: Tensor, score: Score, bias: Tensor | None = None) -> Tensor:
    """Map the attention that raises ``score``: pixels (B, C, S, S) -> (B, S, S).

    Args:
        tower: An image encoder with the verb "attention-maps". The attention takes B * H * L * L numbers a
            block.
        pixels: (B, C, S, S), preprocessed.
        score: Maps image features (B, D) of length one to a number for each image (B,). Each number depends
            only on its own image.
        bias: See ``ImageTower.bias``.

    Raises TowerError for a tower without attention matrices, and ValueError as ``score_gradients`` does.
    """
    with torch.enable_grad():
        # The weights are frozen, so the graph starts at the pixels.
        kept = tower.attended(pixels.detach().requires_grad_(), bias)
        attentions = [*kept.blocks, *([] if kept.pool is None else [kept.pool])]
        gradients = score_gradients(score(kept.features), attentions, len(pixels))
    heat = _patch_relevance(kept, [attention.detach() for attention in attentions], gradients)
    return to_maps(heat, pixels.shape[-1])


def _patch_relevance(kept: Attended, attentions: list[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the relevance of each patch to the features, (B, G, G): the mean over the tokens that pool.

    An attention pool is a last layer whose queries are no tokens: E_h[(∇A ⊙ A)⁺] R, the rule of
    cross-attention.
    """
    depth = len(kept.blocks)
    joint = relevance(attentions[:depth], gradients[:depth])[:, kept.queries]  # (B, Q, L)
    if kept.pool is not None:
        joint = relu(gradients[depth] * attentions[depth]).mean(dim=1) @ joint
    return as_square(joint.mean(dim=1)[:, kept.patches])
