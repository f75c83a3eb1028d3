"""Explanations: where in an image a prediction comes from, as a map and as two numbers.

A map is (S, S) at the size of the view that the model saw: float32 on the CPU, nowhere negative, its sum one;
where a method finds nothing it is the same everywhere. A score, whose gradient some methods take, is any
differentiable function of what the model gives, such as the predicted class's logit of a fitted head.

- ``attention_rollout``: open_clip's ViT; knows no class (Abnar and Zuidema, arXiv 2005.00928)
- ``gradient_attention``: open_clip's ViT and a score of its features (Chefer et al., arXiv 2103.15679)
- ``grad_cam``: convolutional nets and Swin (Selvaraju et al., arXiv 1610.02391)
- ``occlusion``: whatever predicts from images (Zeiler and Fergus, arXiv 1311.2901)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, normalize, relu

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

Score = Callable[[Tensor], Tensor]  # what the model gives (B, D) -> (B,), differentiable

# The pointing game's 15 pixels as a share of the longest side: most of PASCAL VOC's images have 500.
TOLERANCE = 15 / 500

_WINDOWS = 64  # occluded images per pass; bounds the memory


# --- transformers -------------------------------------------------------------------------------


def attended(
    visual: VisionTransformer, pixels: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The image encoder's own forward, but with its attention matrices kept.

    open_clip's blocks never return them, so they are computed here from the projections' weights, and are
    part of the graph: a gradient by them is that of the features. A block with
    ``medfocus.clip.lora.LoraAttention`` is followed too. Kept are B * H * L * L numbers a block.

    Args:
        visual: A tower whose features are the class token's.
        pixels: (B, C, S, S), preprocessed.
        bias: (B, L), added to the logits of the class token's row of attention in each block and head;
            its first column is the class token itself.

    Returns:
        Image features (B, D) of length one, and (B, H, L, L) for each block, rows summing to one.

    Raises ValueError for another tower or a bias of another shape.
    """
    _check_tower(visual)
    tokens = visual._embeds(pixels)  # (B, L, W)
    if bias is not None and bias.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention bias: its shape is {tuple(bias.shape)}, not {tuple(tokens.shape[:2])}: one number an "
            "image and token, the class token first."
        )
    kept = []
    blocks: Any = visual.transformer.resblocks
    for block in blocks:
        attention, output = _attention(block.attn, block.ln_1(tokens), bias)
        kept.append(attention)
        tokens = tokens + block.ls_1(output)
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    pooled, _ = visual._pool(tokens)
    assert visual.proj is not None  # only open_clip's pruned towers have none
    return normalize(pooled @ visual.proj, dim=-1), kept


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Π_l (E_h[A_l] + I) / 2, last block leftmost: what each token has of each input, rows summing to one.

    Args:
        attentions: (B, H, L, L) for each block, the first block first.

    Returns:
        (B, L, L). Source: Abnar and Zuidema, arXiv 2005.00928, the residual connection counted as half.
    """
    identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    joint = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        joint = (attention.mean(dim=1) + identity) / 2 @ joint
    return joint


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """R ← R + E_h[(∇A ⊙ A)⁺] R from R = I, block by block: the relevance of each input to each token.

    Args:
        attentions: (B, H, L, L) for each block, the first block first.
        gradients: Of the score by each of them.

    Returns:
        (B, L, L). Source: Chefer et al., arXiv 2103.15679, the rule of self-attention.
    """
    joint = torch.eye(attentions[0].shape[-1]).to(attentions[0]).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        joint = joint + relu(gradient * attention).mean(dim=1) @ joint
    return joint


@torch.no_grad()
def attention_rollout(visual: VisionTransformer, pixels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Where the class token's attention goes, whatever is predicted: pixels (B, C, S, S) -> (B, S, S).

    Arguments and errors are those of ``attended``.
    """
    _, attentions = attended(visual, pixels, bias)
    return _class_token_map(rollout(attentions), visual, pixels)


def gradient_attention(
    visual: VisionTransformer, pixels: Tensor, score: Score, bias: Tensor | None = None
) -> Tensor:
    """Where the attention that raises ``score`` goes: pixels (B, C, S, S) -> (B, S, S).

    Args:
        visual: See ``attended``.
        pixels: See ``attended``.
        score: Image features (B, D) of length one -> (B,), each of its own image alone.
        bias: See ``attended``.

    Raises ValueError as ``attended`` does, or for a score without a gradient or of another shape.
    """
    with torch.enable_grad():
        # Frozen weights have no graph, so it has to begin at the pixels.
        features, attentions = attended(visual, pixels.detach().requires_grad_(), bias)
        gradients = _slopes(score(features), attentions, len(pixels))
    detached = [attention.detach() for attention in attentions]
    return _class_token_map(relevance(detached, gradients), visual, pixels)


def _attention(attn: Any, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalised tokens (B, L, W) -> attention (B, H, L, L) and what it gives (B, L, W)."""
    frozen = getattr(attn, "frozen", attn)  # of a LoraAttention
    qkv = linear(tokens, frozen.in_proj_weight, frozen.in_proj_bias)
    if frozen is not attn:
        qkv = qkv + attn.low_rank(tokens)
    q, k, v = qkv.unflatten(-1, (3, frozen.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, L, L)
    if bias is not None:
        row = logits.new_zeros(len(bias), 1, *logits.shape[2:])
        row[:, 0, 0] = bias
        logits = logits + row
    attention = logits.softmax(dim=-1)
    return attention, frozen.out_proj((attention @ v).transpose(1, 2).flatten(2))


def _check_tower(visual: nn.Module) -> None:
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            "attention maps need open_clip's VisionTransformer, and this image encoder is "
            f"{type(visual).__name__}. Use grad_cam for a convolutional net, or occlusion."
        )
    attentions = [getattr(block, "attn", None) for block in visual.transformer.resblocks]
    usual = all(isinstance(getattr(attn, "frozen", attn), nn.MultiheadAttention) for attn in attentions)
    pooling = visual.pool_type if visual.attn_pool is None else "attention"
    if pooling != "tok" or not usual:
        raise ValueError(
            "attention maps need blocks of nn.MultiheadAttention and the class token's features (pool_type "
            f"'tok'); this image encoder has {type(attentions[0]).__name__} and '{pooling}'. Use occlusion."
        )


def _class_token_map(joint: Tensor, visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """The class token's row of (B, L, L), without the class token itself, as maps (B, S, S)."""
    return to_maps(joint[:, 0, 1:].unflatten(1, visual.grid_size), pixels.shape[-1])


# --- convolutional nets -------------------------------------------------------------------------


def grad_cam(
    model: nn.Module,
    pixels: Tensor,
    score: Score,
    *,
    layer: nn.Module | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Grad-CAM: ReLU(Σ_k α_k A_k) with α_k the mean over places of ∂score/∂A_k.

    Args:
        model: In eval mode; frozen weights will do.
        pixels: (B, C, S, S), preprocessed.
        score: What ``model`` gives, such as logits (B, K) -> (B,), each of its own image alone.
        layer: The module of ``model`` whose output is the map A; None: A is ``model.forward_features`` and
            the rest ``model.forward_head``, as timm's models have them.
        channels_last: A is (B, G, G, C) and not (B, C, G, G); None: as ``model.output_fmt`` says, which
            timm's Swin has.

    Returns:
        (B, S, S). Source: Selvaraju et al., arXiv 1610.02391.

    Raises ValueError for a model in training mode, a layer that is not run or gives no such map, or a score
    without a gradient or of another shape.
    """
    if model.training:
        raise ValueError(
            "grad_cam: the model is in training mode, where images of a batch mix. Call eval() first."
        )
    with torch.enable_grad():
        seen = pixels.detach().requires_grad_()
        if layer is not None:
            features, output = _watch(model, layer, seen)
        elif hasattr(model, "forward_features") and hasattr(model, "forward_head"):
            features: Tensor = model.forward_features(seen)  # pyright: ignore[reportCallIssue]
            output: Tensor = model.forward_head(features)  # pyright: ignore[reportCallIssue]
        else:
            raise ValueError(
                f"grad_cam: {type(model).__name__} has no forward_features and forward_head. Name the layer."
            )
        if features.ndim != 4:
            raise ValueError(
                f"grad_cam: the features are {tuple(features.shape)}, no map of places with channels. "
                "Name another layer, or use occlusion."
            )
        (slope,) = _slopes(score(output), [features], len(pixels))
    if channels_last is None:
        channels_last = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    if channels_last:
        features, slope = features.permute(0, 3, 1, 2), slope.permute(0, 3, 1, 2)
    alpha = slope.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    return to_maps(relu((alpha * features.detach()).sum(dim=1)), pixels.shape[-1])


def _watch(model: nn.Module, layer: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What ``layer`` and ``model`` give."""
    caught: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"grad_cam: the layer gives {type(output).__name__}, no tensor. Name another.")
        caught.append(output)
        return output.clone()  # an activation behind it may write in place

    handle = layer.register_forward_hook(keep)
    try:
        output: Tensor = model(pixels)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(
            f"grad_cam: the layer is run {len(caught)} times in the model's forward. Name one that runs once."
        )
    return caught[0], output


def _slopes(value: Tensor, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """The gradients of each image's score (B,) by ``inputs``."""
    if value.shape != (count,):
        raise ValueError(
            f"score: gives {tuple(value.shape)} for {count} images; it has to give one number each, "
            f"({count},)."
        )
    found = torch.autograd.grad(value.sum(), inputs, allow_unused=True) if value.requires_grad else [None]
    gradients = [gradient for gradient in found if gradient is not None]
    if len(gradients) != len(inputs):
        raise ValueError(
            "score: has no gradient by what the model gives. Compute it in torch without no_grad or detach, "
            "or use occlusion, which needs no gradient."
        )
    return gradients


# --- anything that predicts ---------------------------------------------------------------------


@torch.no_grad()
def occlusion(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    target: int,
    *,
    patch: int,
    stride: int,
    fill: int | tuple[int, int, int],
) -> Tensor:
    """How much the target's prediction falls where a square hides the image.

    The heat of a pixel is the mean fall over the squares that hide it; a rise counts as none.

    Args:
        predict: Images (N, S, S, 3) uint8 -> (N, K), best probabilities, as the source has them.
        image: (S, S, 3) uint8.
        target: The column of ``predict`` that is explained.
        patch: Pixels a side of the square.
        stride: Pixels from one square to the next; the last ones end at the image's edge.
        fill: The grey value or RGB of the square, such as ``medfocus.focus.modes.FILL``.

    Returns:
        (1, S, S). Source: Zeiler and Fergus, arXiv 1311.2901.

    Raises ValueError for an image of another kind, squares that do not fit or leave gaps, or a target that
    ``predict`` does not have.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"occlusion: the image is {tuple(image.shape)} {image.dtype}; give one, (S, S, 3) uint8."
        )
    height, width = image.shape[:2]
    if height != width or not 1 <= patch <= width or not 1 <= stride <= patch:
        raise ValueError(
            f"occlusion: squares of {patch} px, {stride} px apart, on {height} x {width} px. Use a square "
            "view, a patch that fits into it and a stride from 1 to the patch."
        )
    whole = predict(image[None])  # (1, K)
    if whole.ndim != 2 or not 0 <= target < whole.shape[1]:
        raise ValueError(
            f"occlusion: target {target} is no column of the prediction {tuple(whole.shape)}; predict has to "
            "give (N, K)."
        )
    starts = sorted({*range(0, width - patch + 1, stride), width - patch})
    corners = [(top, left) for top in starts for left in starts]
    heat, hidden = torch.zeros(2, height, width, dtype=torch.float64)
    for first in range(0, len(corners), _WINDOWS):
        batch = corners[first : first + _WINDOWS]
        occluded = image.repeat(len(batch), 1, 1, 1)
        for covered, (top, left) in zip(occluded, batch, strict=True):
            covered[top : top + patch, left : left + patch] = torch.tensor(fill, dtype=torch.uint8)
        falls = relu(whole[0, target] - predict(occluded)[:, target]).tolist()
        for fall, (top, left) in zip(falls, batch, strict=True):
            heat[top : top + patch, left : left + patch] += fall
            hidden[top : top + patch, left : left + patch] += 1
    return to_maps((heat / hidden)[None], width)


# --- maps and what is read off them -------------------------------------------------------------


def to_maps(heat: Tensor, size: int) -> Tensor:
    """Heat (B, G, G) on any grid -> maps (B, size, size) float32 on the CPU that sum to one.

    Negative heat counts as none; an image without heat gets the same everywhere. Raises ValueError for heat
    that is not finite.
    """
    if not heat.isfinite().all():
        raise ValueError("attribution: NaN or infinite values. Look at the model's weights and the score.")
    known = heat.detach().cpu().double().clamp(min=0)[:, None]  # (B, 1, G, G)
    maps = interpolate(known, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    total = maps.sum(dim=(1, 2), keepdim=True)
    return torch.where(total > 0, maps / total, 1 / size**2).float()


def inside_share(attribution: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> float:
    """The share of an attribution (S, S) that lies inside of ``mask`` (S, S) bool, in the same frame.

    Compare it with the mask's share of the image, which the attribution that knows nothing would have.
    Raises ValueError for shapes that differ, a mask that is empty or not bool, or an attribution that is
    negative, not finite or zero everywhere.
    """
    heat, inside = _in_one_frame("inside_share", attribution, mask)
    return float(heat[inside].sum() / heat.sum())


def pointing_hit(
    attribution: np.ndarray | Tensor, region: np.ndarray | Tensor, tolerance: float = TOLERANCE
) -> bool:
    """The pointing game: whether the attribution's maximum is within ``tolerance`` of the region.

    Of several maxima the one nearest to their centre counts. An attribution that is the same everywhere
    points nowhere and does not hit.

    Args:
        attribution: (S, S).
        region: (S, S) bool, in the same frame.
        tolerance: Largest distance, as a share of the side.

    Source: Zhang et al., arXiv 1608.00507. Raises ValueError as ``inside_share`` does, or for a tolerance
    outside of [0, 1).
    """
    heat, inside = _in_one_frame("pointing_hit", attribution, region)
    if not 0 <= tolerance < 1:
        raise ValueError(f"pointing_hit: the tolerance is {tolerance}; use a share of the side in [0, 1).")
    maxima = np.argwhere(heat == heat.max())  # (M, 2)
    if len(maxima) == heat.size:
        return False
    point = maxima[np.hypot(*(maxima - maxima.mean(axis=0)).T).argmin()]
    distance = np.hypot(*(np.argwhere(inside) - point).T).min()
    return bool(distance <= tolerance * max(heat.shape))


def _in_one_frame(
    what: str, attribution: np.ndarray | Tensor, mask: np.ndarray | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    heat, inside = np.asarray(attribution, dtype=np.float64), np.asarray(mask)
    if heat.ndim != 2 or heat.shape != inside.shape:
        raise ValueError(
            f"{what}: the attribution is {heat.shape} and the mask {inside.shape}; bring both to the view's "
            "frame, (S, S)."
        )
    if inside.dtype != bool:
        raise ValueError(f"{what}: the mask is {inside.dtype}; give True inside of the region (mask > 0).")
    if not inside.any():
        raise ValueError(f"{what}: the mask is empty, so nothing can lie in it. Leave this image out.")
    if not np.isfinite(heat).all() or heat.min() < 0 or heat.sum() <= 0:
        raise ValueError(
            f"{what}: the attribution has negative, infinite or only zero values; give one that sums to one."
        )
    return heat, inside
