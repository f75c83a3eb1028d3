"""Gradient-weighted attention, for open_clip's ViT (Chefer et al., arXiv 2103.15679)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from medfocus.clip.vit import pooled
from medfocus.explain.maps import to_maps
from medfocus.explain.scores import Score, score_gradients

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


def attended(
    visual: VisionTransformer, pixels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Compute the image features as ``visual`` does, and keep the attention matrices of its blocks.

    open_clip's blocks never return their attention, so this function computes it from the weights of the
    projections, as part of the graph. It supports ``medfocus.clip.lora.LoraAttention``. The matrices take
    B * H * L * L numbers a block.

    Args:
        visual: An image encoder that pools the class token.
        pixels: (B, C, S, S), preprocessed.
        mask: (B * H, L, L), added to the attention logits of each block.

    Returns:
        Image features (B, D) of length one, and attention (B, H, L, L) of each block with rows of sum one.

    Raises ValueError for an image encoder of another kind.
    """
    _check_encoder(visual)
    tokens = visual._embeds(pixels)  # (B, L, W)
    kept: list[Tensor] = []
    blocks: Any = visual.transformer.resblocks
    for block in blocks:
        attention, output = _attention(block.attn, block.ln_1(tokens), mask)
        kept.append(attention)
        tokens = tokens + block.ls_1(output)
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    return pooled(visual, tokens), kept


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


def gradient_attention(
    visual: VisionTransformer, pixels: Tensor, score: Score, mask: Tensor | None = None
) -> Tensor:
    """Map the attention that raises ``score``: pixels (B, C, S, S) -> (B, S, S).

    Args:
        visual: See ``attended``.
        pixels: See ``attended``.
        score: Maps image features (B, D) of length one to a number for each image (B,). Each number depends
            only on its own image.
        mask: See ``attended``.

    Raises ValueError as ``attended`` and ``score_gradients`` do.
    """
    with torch.enable_grad():
        # The weights are frozen, so the graph starts at the pixels.
        features, attentions = attended(visual, pixels.detach().requires_grad_(), mask)
        gradients = score_gradients(score(features), attentions, len(pixels))
    detached = [attention.detach() for attention in attentions]
    return _class_token_map(relevance(detached, gradients), visual, pixels)


def _attention(attn: Any, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalised tokens (B, L, W) -> attention (B, H, L, L) and its output (B, L, W)."""
    frozen = getattr(attn, "frozen", attn)  # the layer inside a LoraAttention
    qkv = linear(tokens, frozen.in_proj_weight, frozen.in_proj_bias)
    if frozen is not attn:
        qkv = qkv + attn.low_rank(tokens)
    q, k, v = qkv.unflatten(-1, (3, frozen.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, L, L)
    if mask is not None:
        logits = logits + mask.unflatten(0, (-1, frozen.num_heads))
    attention = logits.softmax(dim=-1)
    return attention, frozen.out_proj((attention @ v).transpose(1, 2).flatten(2))


def _check_encoder(visual: nn.Module) -> None:
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            "attention maps need open_clip's VisionTransformer, but this image encoder is "
            f"{type(visual).__name__}. Use grad_cam for a convolutional net, or occlusion."
        )
    attentions = [getattr(block, "attn", None) for block in visual.transformer.resblocks]
    supported = all(isinstance(getattr(attn, "frozen", attn), nn.MultiheadAttention) for attn in attentions)
    pooling = visual.pool_type if visual.attn_pool is None else "attention"
    if pooling != "tok" or not supported:
        raise ValueError(
            "attention maps need nn.MultiheadAttention and the pool_type 'tok', but this image encoder has "
            f"{type(attentions[0]).__name__} and '{pooling}'. Use occlusion."
        )


def _class_token_map(joint: Tensor, visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """Map the relevance of each patch to the class token: (B, L, L) -> (B, S, S)."""
    return to_maps(joint[:, 0, 1:].unflatten(1, visual.grid_size), pixels.shape[-1])
