"""Vision transformers as image towers: open_clip's own, and timm's in open_clip's ``TimmModel``."""

from __future__ import annotations

import copy
from abc import abstractmethod
from math import isqrt
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize, pad

from medfocus.clip.towers.base import Attended, ImageTower
from medfocus.clip.towers.blocks import OpenClipBlock, TimmBlock


class VisionTransformerTower(ImageTower):
    """The base of both kinds: a state is tokens (B, L, W), ``prefix`` of them before the patches."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Number of tokens before the patches: the class token and registers."""

    @abstractmethod
    def side(self, image_size: int) -> int:
        """Return the number of patches a side."""

    @property
    @abstractmethod
    def queries(self) -> slice | None:
        """The tokens that pool; None if an attention pool with a query of its own does."""

    def sides(self, image_size: int) -> tuple[int, ...]:
        """See ``ImageTower.sides``: all layers have the same patches."""
        return (self.side(image_size),) * (self.depth + 1)

    def maps(self, state: Tensor) -> Tensor:
        """See ``ImageTower.maps``: the tokens of the patches."""
        return as_square(state[:, self.prefix :].mT)

    def coverage(self, region: Tensor) -> Tensor:
        """See ``ImageTower.coverage``."""
        size = region.shape[-1]
        return pad(avg_pool2d(region, size // self.side(size)).flatten(1), (self.prefix, 0))


class OpenClipViT(VisionTransformerTower):
    """open_clip's ``VisionTransformer``."""

    @property
    def prefix(self) -> int:
        """See ``VisionTransformerTower.prefix``."""
        return 1

    @property
    def verbs(self) -> frozenset[str]:
        """See ``Tower.verbs``."""
        visual, verbs = self.module, {"stages", "tail"}
        if visual.conv1 is not None:
            verbs.add("channel")
        if visual.attn_pool is None:
            verbs.add("attention-bias")
        if OpenClipBlock.of(visual.transformer.resblocks):
            verbs.add("projections")
            if visual.attn_pool is None:
                verbs.add("attention-maps")
        return frozenset(verbs)

    @property
    def depth(self) -> int:
        """See ``ImageTower.depth``."""
        return len(self.module.transformer.resblocks)

    def side(self, image_size: int) -> int:
        """See ``VisionTransformerTower.side``."""
        return self.module.grid_size[0]

    @property
    def queries(self) -> slice:
        """See ``VisionTransformerTower.queries``."""
        return slice(0, 1) if self.module.pool_type == "tok" else slice(1, None)

    def embed(self, pixels: Tensor) -> Tensor:
        """See ``ImageTower.embed``."""
        return self.module._embeds(pixels)

    def block(self, number: int, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.block``."""
        return self.module.transformer.resblocks[number - 1](state, attn_mask=bias)  # batch first

    def pool(self, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.pool``."""
        summary, _ = self.module._pool(state)
        assert self.module.proj is not None  # only open_clip's pruned towers have none
        return normalize(summary @ self.module.proj, dim=-1)

    def tail(self, blocks: int) -> nn.Module:
        """See ``ImageTower.tail``."""
        visual, cut = self.module, self.depth - blocks
        embedding = ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")
        copied: Any = _copy_without(visual, visual, embedding, visual.transformer.resblocks[:cut])
        copied.transformer.resblocks = copied.transformer.resblocks[cut:]
        return copied

    def bias(self, coverage: Tensor, strength: float) -> Tensor:
        """See ``ImageTower.bias``: (B * heads, L, L), as ``nn.MultiheadAttention`` takes it."""
        heads = self.module.transformer.resblocks[0].attn.num_heads
        return query_bias(coverage, strength, self.queries).repeat_interleave(heads, dim=0)

    @property
    def first_conv(self) -> str:
        """See ``ImageTower.first_conv``."""
        return "conv1"

    def blocks(self) -> list[OpenClipBlock]:
        """See ``Tower.blocks``."""
        return OpenClipBlock.of(self.module.transformer.resblocks)

    def attended(self, pixels: Tensor, bias: Tensor | None = None) -> Attended:
        """See ``ImageTower.attended``."""
        self.require("attention-maps", "gradient x attention")
        tokens, kept = self.embed(pixels), []
        for block, attention in zip(self.module.transformer.resblocks, self.blocks(), strict=True):
            weights, output = attention.attend(block.ln_1(tokens), bias)
            kept.append(weights)
            tokens = tokens + block.ls_1(output)
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return Attended(self.pool(tokens), kept, None, self.queries, slice(1, None))


class TimmViT(VisionTransformerTower):
    """timm's ``VisionTransformer``: BiomedCLIP's, or SigLIP's with an attention pool and no class token.

    The attention pool has a learned query, and the bias of a region acts on this query alone.
    """

    @property
    def _trunk(self) -> Any:
        return self.module.trunk

    @property
    def verbs(self) -> frozenset[str]:
        """See ``Tower.verbs``."""
        from timm.layers.attention_pool import AttentionPoolLatent
        from timm.layers.patch_embed import PatchEmbed
        from timm.models.vision_transformer import Block

        trunk, verbs = self._trunk, {"stages", "tail"}
        if isinstance(trunk.patch_embed, PatchEmbed):
            verbs.add("channel")
        plain = bool(TimmBlock.of(trunk.blocks))
        if plain:
            verbs.add("projections")
        if trunk.attn_pool is None or isinstance(trunk.attn_pool, AttentionPoolLatent):
            verbs.add("attention-bias")
            if plain and all(type(block) is Block for block in trunk.blocks):
                verbs.add("attention-maps")
        return frozenset(verbs)

    @property
    def depth(self) -> int:
        """See ``ImageTower.depth``."""
        return len(self._trunk.blocks)

    @property
    def prefix(self) -> int:
        """See ``VisionTransformerTower.prefix``."""
        return self._trunk.num_prefix_tokens

    def side(self, image_size: int) -> int:
        """See ``VisionTransformerTower.side``."""
        return self._trunk.patch_embed.dynamic_feat_size((image_size, image_size))[0]

    @property
    def queries(self) -> slice | None:
        """See ``VisionTransformerTower.queries``."""
        if self._trunk.attn_pool is not None:
            return None
        return slice(0, 1) if self._trunk.global_pool == "token" else slice(self.prefix, None)

    def embed(self, pixels: Tensor) -> Tensor:
        """See ``ImageTower.embed``."""
        trunk = self._trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels))))

    def block(self, number: int, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.block``."""
        mask = None if self.queries is None else bias
        return self._trunk.blocks[number - 1](state, attn_mask=mask)

    def pool(self, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``ImageTower.pool``."""
        trunk, tokens = self._trunk, self._trunk.norm(state)
        if self.queries is not None or bias is None:
            return normalize(self.module.head(trunk.forward_head(tokens)), dim=-1)
        return self._head(trunk.attn_pool(self._pooled(tokens), attn_mask=bias))

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Return those of the tokens (B, L, ...) over which the attention pool pools."""
        return tokens if self._trunk.pool_include_prefix else tokens[:, self.prefix :]

    def _head(self, summary: Tensor) -> Tensor:
        """Turn the result of the attention pool into image features (B, D), each of length one."""
        trunk = self._trunk
        return normalize(self.module.head(trunk.head(trunk.head_drop(trunk.fc_norm(summary)))), dim=-1)

    def tail(self, blocks: int) -> nn.Module:
        """See ``ImageTower.tail``."""
        trunk, cut = self._trunk, self.depth - blocks
        embedding = (
            "patch_embed",
            "cls_token",
            "reg_token",
            "pos_embed",
            "pos_drop",
            "patch_drop",
            "norm_pre",
        )
        copied: Any = _copy_without(self.module, trunk, embedding, trunk.blocks[:cut])
        copied.trunk.blocks = copied.trunk.blocks[cut:]
        return copied

    def bias(self, coverage: Tensor, strength: float) -> Tensor:
        """See ``ImageTower.bias``: (B, 1, L, L) for the blocks, or (B, 1, 1, L) for the attention pool."""
        if self.queries is not None:
            return query_bias(coverage, strength, self.queries)[:, None]
        return strength * self._pooled(coverage)[:, None, None]

    @property
    def first_conv(self) -> str:
        """See ``ImageTower.first_conv``."""
        return "trunk.patch_embed.proj"

    def blocks(self) -> list[TimmBlock]:
        """See ``Tower.blocks``."""
        return TimmBlock.of(self._trunk.blocks)

    def attended(self, pixels: Tensor, bias: Tensor | None = None) -> Attended:
        """See ``ImageTower.attended``."""
        self.require("attention-maps", "gradient x attention")
        tokens, kept = self.embed(pixels), []
        mask = None if self.queries is None else bias
        for block, attention in zip(self._trunk.blocks, self.blocks(), strict=True):
            weights, output = attention.attend(block.norm1(tokens), mask)
            kept.append(weights)
            tokens = tokens + block.ls1(output)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        patches = slice(self.prefix, None)
        if self.queries is not None:
            return Attended(self.pool(tokens), kept, None, self.queries, patches)
        weights, summary = self._pool_attention(self._pooled(self._trunk.norm(tokens)), bias)
        queries = slice(0, None) if self._trunk.pool_include_prefix else patches
        return Attended(self._head(summary), kept, weights, queries, patches)

    def _pool_attention(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the attention (B, H, Q, P) of the attention pool over tokens (B, P, W), and its output."""
        pool, count = self._trunk.attn_pool, len(tokens)
        if pool.pos_embed is not None:
            tokens = tokens + pool.pos_embed
        q = pool.q(pool.latent.expand(count, -1, -1)).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        k, v = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = pool.q_norm(q) @ pool.k_norm(k).mT * pool.scale
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        summary = pool.proj((weights @ v).transpose(1, 2).flatten(2))
        if pool.mlp is not None:
            summary = summary + pool.mlp(pool.norm(summary))
        return weights, summary[:, 0] if pool.pool == "token" else summary.mean(dim=1)


def as_square(patches: Tensor) -> Tensor:
    """Arrange patches (..., G * G), row by row, as maps (..., G, G)."""
    side = isqrt(patches.shape[-1])
    return patches.unflatten(-1, (side, side))


def query_bias(coverage: Tensor, strength: float, queries: slice) -> Tensor:
    """Return an attention mask (B, L, L) to add: β m from the tokens ``queries`` to each token, else 0.

    ``coverage`` (B, L) is the share m of each token's patch inside a region, and ``strength`` is β.
    """
    bias = coverage.new_zeros(*coverage.shape, coverage.shape[1])
    bias[:, queries] = strength * coverage[:, None]
    return bias


def _copy_without(visual: nn.Module, owner: Any, names: tuple[str, ...], blocks: Any) -> nn.Module:
    """Copy ``visual`` without parts of ``owner``, one of its modules or itself; the parts become None.

    ``blocks`` are shared with the copy instead of copied; the caller removes them.
    """
    unused = [part for name in names if (part := getattr(owner, name)) is not None]
    memo = {id(part): part for part in [*unused, *blocks]}
    copied: Any = copy.deepcopy(visual, memo)
    place: Any = copied if owner is visual else copied.trunk
    for name in names:
        setattr(place, name, None)
    return copied
