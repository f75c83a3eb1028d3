"""Rename the weights of transformers' ``CLIPModel`` and ``SiglipModel`` to those of open_clip.

Some medical models are published in these formats only: PubMedCLIP and PLIP are a ``CLIPModel``, and
MedSigLIP is a ``SiglipModel``. open_clip builds the image encoder of a SigLIP with timm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

# Pattern of a name in transformers -> its name in open_clip. All patterns that match apply, the first first.
_LAYER = (
    (r"\.self_attn\.in_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_TEXT = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.head\.", "text_projection."),
)
_CLIP_VISION = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
)
_SIGLIP_VISION = (
    (r"\.self_attn\.in_proj\.", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.trunk.pos_embed"),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe$", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.", "visual.trunk.attn_pool."),
)
_TRANSPOSED = ("visual.proj", "text_projection")


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model of transformers under open_clip's names, and other weights unchanged."""
    if "vision_model.head.probe" in state:
        return dict(_siglip(dict(_joined(state))))
    if "visual_projection.weight" in state:
        return dict(_clip(dict(_joined(state))))
    return state


def _clip(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        ours = _renamed(name, (*_LAYER, *_CLIP_VISION, *_TEXT))
        yield ours, value.T if ours in _TRANSPOSED else value


def _siglip(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if not name.startswith("vision_model."):
            text = _renamed(name, (*_LAYER, *_TEXT))
            yield (text if text.startswith("logit_") else f"text.{text}"), value
        elif pooled := re.match(r"vision_model\.head\.attention\.in_proj_(weight|bias)$", name):
            query, key, values = value.chunk(3)
            yield f"visual.trunk.attn_pool.q.{pooled[1]}", query
            yield f"visual.trunk.attn_pool.kv.{pooled[1]}", torch.cat([key, values])
        else:
            ours = _renamed(name, _SIGLIP_VISION)
            yield ours, value[None] if ours == "visual.trunk.pos_embed" else value


def _joined(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, with queries, keys and values as one projection, and without position ids."""
    for name, value in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            yield name.replace(".q_proj.", ".in_proj."), torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.|\.position_ids$", name):
            yield name, value


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in patterns:
        name = re.sub(pattern, ours, name)
    return name
