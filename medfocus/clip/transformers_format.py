"""Rename the weights of transformers' ``CLIPModel``, such as PubMedCLIP's, to open_clip's ``CLIP``."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# A pattern of transformers' names -> open_clip's name. Layers of both towers come first.
_NAMES = (
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
)
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_QUERY = re.compile(r"\.self_attn\.q_proj\.(weight|bias)$")


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a ``CLIPModel`` under open_clip's names, and other weights unchanged."""
    if not {"text_projection.weight", "visual_projection.weight"} <= state.keys():
        return state
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.search(r"\.self_attn\.[kv]_proj\.|\.position_ids$", name):
            continue  # the keys and values join their queries; the positions are 0, 1, 2, ...
        if name in _PROJECTIONS:
            renamed[_PROJECTIONS[name]] = value.T
            continue
        if _QUERY.search(name):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = _QUERY.sub(r".attn.in_proj_\1", name), torch.cat(parts)
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed
