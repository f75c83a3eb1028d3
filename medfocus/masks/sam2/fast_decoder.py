"""Decode many prompts of one image as SAM2's mask decoder does, up to rounding, with a quarter of the work.

For every prompt, SAM2's decoder (arXiv 2408.00714, the two-way transformer of arXiv 2304.02643) projects
all N positions of the image, although they attend to only about eight tokens T. Matrix products are
associative, so this decoder projects the tokens instead: q (X W)' = (q W') X' and A (X W) = (A X) W. It
computes everything that depends on the image alone once. The upscaling treats each position by itself, so
it becomes a matrix product, and the masks restore the order of the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

# Bytes of the positions (p, N, d) of p prompts, to fit the processor's cache: one prompt at 1024 px.
_CHUNK_BYTES = 4 * 2**20
_CHUNK_BYTES_GPU = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Scene:
    """Tensors that all prompts of one image share, for N = (S/16)² positions with d channels."""

    positions: Tensor  # (1, N, d)
    middle: Tensor  # (1, N, 4 (d/4)): the level at S/8 by position, plus the upscaling's bias
    fine: Tensor  # (1, 4N, 4 (d/8)): the same for the level at S/4
    keys: Tensor  # (1, H, N, c): of the first layer, before a prompt changes the positions
    queries: Tensor  # (1, H, N, c): of the first layer as well


@dataclass(frozen=True, eq=False)
class Answer:
    """The transformer's output for p prompts, from which ``FastDecoder.logits`` computes masks."""

    predicted_iou: Tensor  # (p, 3)
    positions: Tensor  # (p, N, d)
    hyper: Tensor  # (p, 3, d/8): times the upscaled positions, this gives the masks

    def only(self, prompts: np.ndarray) -> Answer:
        """Return the answers to the prompts with these indices."""
        if len(prompts) == len(self.positions):
            return self
        indices = torch.from_numpy(prompts).to(self.positions.device)
        return Answer(self.predicted_iou[indices], self.positions[indices], self.hyper[indices])


class FastDecoder:
    """A decoder of three candidates per prompt, like the decoder of ``model``."""

    def __init__(self, model: SAM2Base) -> None:
        """Prepare a trained ``model`` on its device; ``fits`` must hold for the model."""
        self.model = model
        # Typed Any, because the sam2 package declares these parts as plain nn.Module.
        self._decoder: Any = model.sam_mask_decoder
        self._transformer: Any = self._decoder.transformer
        self._side: int = model.sam_prompt_encoder.image_embedding_size[0]
        with torch.inference_mode():
            self._encoding = model.sam_prompt_encoder.get_dense_pe().flatten(2).mT  # (1, N, d)
            # For each layer, the keys and queries (1, H, N, c) of the positional encoding alone.
            self._encoded = [
                (_heads(read.k_proj(self._encoding), read), _heads(write.q_proj(self._encoding), write))
                for layer in self._transformer.layers
                for read, write in [(layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)]
            ]
            last = self._transformer.final_attn_token_to_image
            self._last_keys = _heads(last.k_proj(self._encoding), last)

    def scene(self, embedding: Tensor, fine: tuple[Tensor, ...]) -> Scene:
        """Compute the tensors that all prompts of an image share; its encoding has B = 1."""
        first, _, _, second, _ = self._decoder.output_upscaling
        n = self._side
        dense = self.model.sam_prompt_encoder.no_mask_embed.weight  # (1, d)
        middle = fine[1].view(-1, n, 2, n, 2).permute(1, 3, 2, 4, 0)  # (n, n, 2, 2, d/4)
        finest = fine[0].view(-1, n, 2, 2, n, 2, 2).permute(1, 4, 2, 5, 3, 6, 0)  # (n, n, 2, 2, 2, 2, d/8)
        positions = embedding.flatten(2).mT + dense  # (1, N, d)
        layer = self._transformer.layers[0]
        read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        return Scene(
            positions,
            (middle + first.bias).reshape(1, n * n, -1),
            (finest + second.bias).reshape(1, 4 * n * n, -1),
            _heads(read.k_proj(positions + self._encoding), read),
            _heads(write.q_proj(positions + self._encoding), write),
        )

    @property
    def chunk(self) -> int:
        """Return the number of prompts to decode at once."""
        size = 4 * self._side**2 * self._decoder.transformer_dim  # bytes of the positions of a prompt
        on_cpu = self._encoding.device.type == "cpu"
        return max(1, (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_GPU) // size)

    def answer(self, scene: Scene, coords: Tensor, labels: Tensor) -> Answer:
        """Run the transformer for p prompts, coords (p, n, 2) in pixels up to S and labels (p, n)."""
        decoder = self._decoder
        sparse, _ = self.model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        heads = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if decoder.pred_obj_scores:
            heads.insert(0, decoder.obj_score_token.weight)
        output_tokens = torch.cat(heads).expand(len(coords), -1, -1)
        tokens = torch.cat([output_tokens, sparse], 1)  # (p, T, d)
        queries, positions = tokens, scene.positions
        for i, layer in enumerate(self._transformer.layers):
            image_keys, image_queries = (scene.keys, scene.queries) if i == 0 else self._encoded[i]
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                q = queries + tokens
                queries = queries + layer.self_attn(q=q, k=q, v=queries)
            queries = layer.norm1(queries)
            read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            queries = queries + _read(read, queries + tokens, positions, image_keys, whole=i == 0)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            written = _write(write, positions, queries + tokens, queries, image_queries, whole=i == 0)
            positions = layer.norm4(written)
        last = self._transformer.final_attn_token_to_image
        queries = queries + _read(last, queries + tokens, positions, self._last_keys)
        queries = self._transformer.norm_final_attn(queries)  # (p, T, d)
        at = len(heads) - 1  # the IoU token precedes the tokens of the single mask and of the three masks
        hyper = [mlp(queries[:, at + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps) if i > 0]
        iou = decoder.iou_prediction_head(queries[:, at - 1])[:, 1:]
        return Answer(iou, positions, torch.stack(hyper, 1))

    def logits(self, scene: Scene, answer: Answer) -> Tensor:
        """Compute the candidates of p prompts: logits (p, 3, S/4, S/4), > 0 inside."""
        first, norm, act, second, act_fine = self._decoder.output_upscaling
        p, n = len(answer.positions), self._side
        x = _added(scene.middle, answer.positions, _pixels(first))  # (p, N, 4 (d/4))
        x = x.view(p, 4 * n * n, -1)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = act_fine(_added(scene.fine, x, _pixels(second)))  # (p, 4N, 4 (d/8))
        masks = answer.hyper @ x.view(p, 16 * n * n, -1).mT  # (p, 3, 16N)
        masks = masks.view(p, 3, n, n, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(p, 3, 4 * n, 4 * n)


def _heads(x: Tensor, attention: Any) -> Tensor:
    """Split heads: (b, n, H c) -> (b, H, n, c)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _read(attention: Any, tokens: Tensor, positions: Tensor, keys: Tensor, *, whole: bool = False) -> Tensor:
    """Attend from tokens (p, T, d) to positions (p or 1, N, d): (p, T, d).

    ``keys`` (1, H, N, c) are keys of the positions if ``whole``, else keys of their encoding alone.
    """
    q = _heads(attention.q_proj(tokens), attention)  # (p, H, T, c)
    scores = _scores(q, attention.k_proj, positions, keys, whole)  # (p, H, T, N)
    attended = (scores.softmax(-1).flatten(1, 2) @ positions).unflatten(1, q.shape[1:3])  # (p, H, T, d)
    values = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))  # (H, c, d)
    bias = attention.v_proj.bias.unflatten(0, (attention.num_heads, 1, -1))  # added once, as weights sum to 1
    return attention.out_proj((attended @ values.mT + bias).transpose(1, 2).flatten(2))


def _write(
    attention: Any, positions: Tensor, tokens: Tensor, values: Tensor, queries: Tensor, *, whole: bool
) -> Tensor:
    """Attend from positions (p or 1, N, d) to tokens (p, T, d) and add the result: (p, N, d).

    ``values`` (p, T, d) are the tokens without positional encoding. ``queries`` (1, H, N, c) are queries of
    the positions if ``whole``, else queries of their encoding alone.
    """
    k = _heads(attention.k_proj(tokens), attention)  # (p, H, T, c)
    v = _heads(attention.v_proj(values), attention)
    out = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)).permute(1, 2, 0)  # (H, c, d)
    change = v @ out + attention.out_proj.bias / attention.num_heads  # (p, H, T, d); the weights sum to 1
    shares = _scores(k, attention.q_proj, positions, queries, whole).softmax(2)  # (p, H, T, N)
    return _added(positions, shares.flatten(1, 2).mT, change.flatten(1, 2))


def _scores(tokens: Tensor, projection: Any, positions: Tensor, projected: Tensor, whole: bool) -> Tensor:
    """Return the attention scores (p, H, T, N) of tokens (p, H, T, c) and positions (p or 1, N, d).

    ``projected`` are the projected positions if ``whole``; else they are the projected encoding alone, and
    ``projection`` projects the positions.
    """
    tokens = tokens * tokens.shape[-1] ** -0.5
    scores = tokens @ projected.mT
    if whole:
        return scores
    weight = projection.weight.unflatten(0, (tokens.shape[1], -1))  # (H, c, d)
    content = (tokens @ weight).flatten(1, 2) @ positions.mT  # (p, H T, N)
    return scores + content.unflatten(1, tokens.shape[1:3])


def _pixels(upscaling: Any) -> Tensor:
    """Return a transposed convolution of stride and kernel 2 as a matrix (d, 4 d')."""
    return upscaling.weight.permute(0, 2, 3, 1).flatten(1)


def _added(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute base (p or 1, n, m) + a (p, n, k) @ b (p, k, m) or (k, m) in one pass: (p, n, m)."""
    p = len(a)
    return torch.baddbmm(base.expand(p, -1, -1), a, b.expand(p, *b.shape[-2:]))
