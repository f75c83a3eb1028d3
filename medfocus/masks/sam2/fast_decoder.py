"""SAM2's mask decoder for many prompts of one image: the same numbers for a quarter of the work.

The decoder (arXiv 2408.00714, the two-way transformer of arXiv 2304.02643) projects each of the image's N
places anew for every prompt, to meet T tokens, eight or so. As a product of matrices may be bracketed either
way, the few tokens are projected here instead: q (X W)' is (q W') X', A (X W) is (A X) W. What depends on the
image alone is computed once, and the upscaling, whose steps look at one place each, is a product of
matrices too, in an order of pixels that is undone at the masks. Up to rounding nothing changes.
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

# Prompts at once: their places (p, N, d) stay in the processor's cache. At 1024 px that is one.
_CHUNK_BYTES = 4 * 2**20
_CHUNK_BYTES_GPU = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Scene:
    """What all prompts of one image share. N = (S/16)² places, d wide."""

    places: Tensor  # (1, N, d)
    middle: Tensor  # (1, N, 4 (d/4)), the level at S/8 by place, and what is added there
    fine: Tensor  # (1, 4N, 4 (d/8)), the level at S/4 likewise
    asked: Tensor  # (1, H, N, c), keys of the first layer, where no prompt has changed the places yet
    asking: Tensor  # (1, H, N, c), and queries


@dataclass(frozen=True, eq=False)
class Answer:
    """What the transformer makes of p prompts; ``FastDecoder.logits`` draws the masks."""

    predicted_iou: Tensor  # (p, 3)
    places: Tensor  # (p, N, d)
    hyper: Tensor  # (p, 3, d/8), a mask is its product with the upscaled places

    def only(self, prompts: np.ndarray) -> Answer:
        """Those of the prompts with these indices."""
        if len(prompts) == len(self.places):
            return self
        some = torch.from_numpy(prompts).to(self.places.device)
        return Answer(self.predicted_iou[some], self.places[some], self.hyper[some])


class FastDecoder:
    """Draws three candidates a prompt, as the decoder of ``model`` does."""

    def __init__(self, model: SAM2Base) -> None:
        """``model`` is trained and on its device; ``segmenter.fits`` says which will do."""
        self.model = model
        # Typed Any: the sam2 package's modules declare their parts as plain nn.Module.
        self._decoder: Any = model.sam_mask_decoder
        self._transformer: Any = self._decoder.transformer
        self._side: int = model.sam_prompt_encoder.image_embedding_size[0]
        with torch.inference_mode():
            self._position = model.sam_prompt_encoder.get_dense_pe().flatten(2).mT  # (1, N, d)
            # Of keys and queries that the places have, what they owe to their position: (1, H, N, c).
            self._owed = [
                (_heads(read.k_proj(self._position), read), _heads(written.q_proj(self._position), written))
                for layer in self._transformer.layers
                for read, written in [(layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)]
            ]
            last = self._transformer.final_attn_token_to_image
            self._owed_last = _heads(last.k_proj(self._position), last)

    def scene(self, embedding: Tensor, fine: tuple[Tensor, ...]) -> Scene:
        """What ``Features`` has of one image, B = 1 -> what all its prompts share."""
        first, _, _, second, _ = self._decoder.output_upscaling
        n = self._side
        dense = self.model.sam_prompt_encoder.no_mask_embed.weight  # (1, d)
        middle = fine[1].view(-1, n, 2, n, 2).permute(1, 3, 2, 4, 0)  # (n, n, 2, 2, d/4)
        finest = fine[0].view(-1, n, 2, 2, n, 2, 2).permute(1, 4, 2, 5, 3, 6, 0)  # (n, n, 2, 2, 2, 2, d/8)
        places = embedding.flatten(2).mT + dense  # (1, N, d)
        layer = self._transformer.layers[0]
        read, written = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        return Scene(
            places,
            (middle + first.bias).reshape(1, n * n, -1),
            (finest + second.bias).reshape(1, 4 * n * n, -1),
            _heads(read.k_proj(places + self._position), read),
            _heads(written.q_proj(places + self._position), written),
        )

    @property
    def chunk(self) -> int:
        """How many prompts to take at once."""
        size = 4 * self._side**2 * self._decoder.transformer_dim  # bytes of a prompt's places
        on_cpu = self._position.device.type == "cpu"
        return max(1, (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_GPU) // size)

    def answer(self, scene: Scene, coords: Tensor, labels: Tensor) -> Answer:
        """The transformer for p prompts, coords (p, n, 2) in pixels of S and labels (p, n)."""
        decoder = self._decoder
        sparse, _ = self.model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        heads = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if decoder.pred_obj_scores:
            heads.insert(0, decoder.obj_score_token.weight)
        own = torch.cat(heads).expand(len(coords), -1, -1)
        tokens = torch.cat([own, sparse], 1)  # (p, T, d)
        queries, places = tokens, scene.places
        for i, layer in enumerate(self._transformer.layers):
            asked, asking = (scene.asked, scene.asking) if i == 0 else self._owed[i]
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                q = queries + tokens
                queries = queries + layer.self_attn(q=q, k=q, v=queries)
            queries = layer.norm1(queries)
            read, written = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            queries = queries + _read(read, queries + tokens, places, asked, whole=i == 0)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            places = layer.norm4(_written(written, places, queries + tokens, queries, asking, whole=i == 0))
        last = self._transformer.final_attn_token_to_image
        queries = queries + _read(last, queries + tokens, places, self._owed_last)
        queries = self._transformer.norm_final_attn(queries)  # (p, T, d)
        at = len(heads) - 1  # after the token of the IoU those of the single mask and of the three
        made = [mlp(queries[:, at + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps) if i > 0]
        iou = decoder.iou_prediction_head(queries[:, at - 1])[:, 1:]
        return Answer(iou, places, torch.stack(made, 1))

    def logits(self, scene: Scene, answer: Answer) -> Tensor:
        """The candidates of p prompts, (p, 3, S/4, S/4), > 0 inside."""
        first, norm, act, second, act_fine = self._decoder.output_upscaling
        p, n = len(answer.places), self._side
        x = _added(scene.middle, answer.places, _pixels(first))  # (p, N, 4 (d/4))
        x = x.view(p, 4 * n * n, -1)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = act_fine(_added(scene.fine, x, _pixels(second)))  # (p, 4N, 4 (d/8))
        masks = answer.hyper @ x.view(p, 16 * n * n, -1).mT  # (p, 3, 16N)
        masks = masks.view(p, 3, n, n, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(p, 3, 4 * n, 4 * n)


def _heads(x: Tensor, attention: Any) -> Tensor:
    """(b, n, H c) -> (b, H, n, c)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _read(attention: Any, tokens: Tensor, places: Tensor, keys: Tensor, *, whole: bool = False) -> Tensor:
    """What tokens (p, T, d) find in places (p or 1, N, d): (p, T, d).

    ``keys`` (1, H, N, c) are those of the places if ``whole``, else the part that they owe to their position.
    """
    q = _heads(attention.q_proj(tokens), attention)  # (p, H, T, c)
    scores = _scores(q, attention.k_proj, places, keys, whole)  # (p, H, T, N)
    seen = (scores.softmax(-1).flatten(1, 2) @ places).unflatten(1, q.shape[1:3])  # (p, H, T, d)
    values = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))  # (H, c, d)
    bias = attention.v_proj.bias.unflatten(0, (attention.num_heads, 1, -1))  # the shares sum to 1
    return attention.out_proj((seen @ values.mT + bias).transpose(1, 2).flatten(2))


def _written(
    attention: Any, places: Tensor, tokens: Tensor, values: Tensor, queries: Tensor, *, whole: bool
) -> Tensor:
    """Places (p or 1, N, d) and what they find in tokens (p, T, d): their sum, (p, N, d).

    ``values`` (p, T, d) are the tokens without their own position; ``queries`` as the keys of ``_read``.
    """
    k = _heads(attention.k_proj(tokens), attention)  # (p, H, T, c)
    v = _heads(attention.v_proj(values), attention)
    out = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1)).permute(1, 2, 0)  # (H, c, d)
    change = v @ out + attention.out_proj.bias / attention.num_heads  # (p, H, T, d); the shares sum to 1
    shares = _scores(k, attention.q_proj, places, queries, whole).softmax(2)  # (p, H, T, N)
    return _added(places, shares.flatten(1, 2).mT, change.flatten(1, 2))


def _scores(tokens: Tensor, projection: Any, places: Tensor, projected: Tensor, whole: bool) -> Tensor:
    """Projected tokens (p, H, T, c) by places (p or 1, N, d) that are to be projected: (p, H, T, N)."""
    tokens = tokens * tokens.shape[-1] ** -0.5
    scores = tokens @ projected.mT
    if whole:
        return scores
    weight = projection.weight.unflatten(0, (tokens.shape[1], -1))  # (H, c, d)
    own = (tokens @ weight).flatten(1, 2) @ places.mT  # (p, H T, N)
    return scores + own.unflatten(1, tokens.shape[1:3])


def _pixels(upscaling: Any) -> Tensor:
    """A transposed convolution of stride and kernel 2 as a matrix (d, 4 d'): the pixels of each place."""
    return upscaling.weight.permute(0, 2, 3, 1).flatten(1)


def _added(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base (p or 1, n, m) + a (p, n, k) @ b, (p, k, m) or (k, m): (p, n, m), without a second pass."""
    p = len(a)
    return torch.baddbmm(base.expand(p, -1, -1), a, b.expand(p, *b.shape[-2:]))
