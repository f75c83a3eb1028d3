"""A transformer's block in three layouts: open_clip's, timm's and Hugging Face's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import linear

from medfocus.clip.towers.low_rank import LoraAttention, LoraLinear, LowRank


@dataclass(frozen=True)
class Weight:
    """A parameter of ``count`` matrices (m, n) that stand below each other, to change or to parametrise."""

    module: nn.Module
    parameter: str  # its name in ``module``
    count: int = 1

    def matrices(self) -> Tensor:
        """Return the matrices (count, m, n), a view of the parameter."""
        return getattr(self.module, self.parameter).unflatten(0, (self.count, -1))


class Block(ABC):
    """One block of a transformer: its weights, and low-rank updates of its attention."""

    width: int  # W

    @abstractmethod
    def weights(self) -> list[Weight]:
        """Return the projections to q, k and v, that of the attention's output, and the layers of the MLP."""

    @abstractmethod
    def add(self, update: LowRank) -> None:
        """Add low-rank updates to the projections to q, k and v, in place."""


class OpenClipBlock(Block):
    """A block of open_clip with ``nn.MultiheadAttention``, or with a ``LoraAttention`` in its place."""

    def __init__(self, block: nn.Module) -> None:
        self._block: Any = block
        attention: Any = block.attn
        self._frozen: Any = getattr(attention, "frozen", attention)
        self.width = self._frozen.embed_dim

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> list[Self]:
        """Return the blocks; an empty list if one has open_clip's own ``Attention``."""
        blocks = list(blocks)
        kinds = (nn.MultiheadAttention, LoraAttention)
        supported = all(isinstance(getattr(block, "attn", None), kinds) for block in blocks)
        return [cls(block) for block in blocks] if supported else []

    def weights(self) -> list[Weight]:
        """See ``Block.weights``; q, k and v are one parameter."""
        attention = [Weight(self._frozen, "in_proj_weight", 3), Weight(self._frozen.out_proj, "weight")]
        return attention + _linear_weights(self._block.mlp)

    def add(self, update: LowRank) -> None:
        """See ``Block.add``."""
        self._block.attn = LoraAttention(self._frozen, update)

    def attend(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn normalised tokens (B, L, W) into attention (B, H, L, L) and the output (B, L, W).

        ``bias`` (B * H, L, L) is added to the attention logits.
        """
        attention, frozen = self._block.attn, self._frozen
        qkv = (
            linear(tokens, frozen.in_proj_weight, frozen.in_proj_bias)
            if attention is frozen
            else attention.qkv(tokens)
        )
        q, k, v = qkv.unflatten(-1, (3, frozen.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, L, L)
        if bias is not None:
            logits = logits + bias.unflatten(0, (-1, frozen.num_heads))
        weights = logits.softmax(dim=-1)
        return weights, frozen.out_proj((weights @ v).transpose(1, 2).flatten(2))


class TimmBlock(Block):
    """A block of timm with its ``Attention``, in which one linear layer projects to q, k and v."""

    def __init__(self, block: nn.Module) -> None:
        self._mlp: Any = block.mlp
        self._attention: Any = block.attn
        self.width = self._attention.proj.in_features

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> list[Self]:
        """Return the blocks; an empty list if one has another kind of attention."""
        from timm.layers.attention import Attention

        blocks = list(blocks)
        supported = all(
            type(attention := getattr(block, "attn", None)) is Attention
            and attention.attn_dim == attention.num_heads * attention.head_dim == attention.proj.out_features
            for block in blocks
        )
        return [cls(block) for block in blocks] if supported else []

    def weights(self) -> list[Weight]:
        """See ``Block.weights``; q, k and v are one parameter."""
        attention = [Weight(self._attention.qkv, "weight", 3), Weight(self._attention.proj, "weight")]
        return attention + _linear_weights(self._mlp)

    def add(self, update: LowRank) -> None:
        """See ``Block.add``."""
        self._attention.qkv = LoraLinear(self._attention.qkv, update)

    def attend(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn normalised tokens (B, L, W) into attention (B, H, L, L) and the output (B, L, W).

        ``bias`` (B, 1, L, L) is added to the attention logits.
        """
        attention = self._attention
        qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        logits = attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale  # (B, H, L, L)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        output = attention.norm((weights @ v).transpose(1, 2).flatten(2))
        if attention.gate is not None:
            output = output * attention.gate(tokens).sigmoid()
        return weights, attention.proj(output)


class BertBlock(Block):
    """A layer of BERT and its relatives in Hugging Face's transformers, with three layers for q, k, v."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer
        self._inner: Any = self._layer.attention.self
        self.width = self._inner.query.in_features

    @classmethod
    def of(cls, transformer: nn.Module) -> list[Self]:
        """Return the layers of a transformer, the first layer first; an empty list for another family."""

        def is_layer(module: Any) -> bool:
            inner = getattr(getattr(module, "attention", None), "self", None)
            parts = [getattr(inner, name, None) for name in ("query", "key", "value")]
            return all(isinstance(part, nn.Linear | LoraLinear) for part in parts)

        return [cls(module) for module in transformer.modules() if is_layer(module)]

    def weights(self) -> list[Weight]:
        """See ``Block.weights``."""
        layer, inner = self._layer, self._inner
        attention = [inner.query, inner.key, inner.value, layer.attention.output.dense]
        return [Weight(part, "weight") for part in (*attention, layer.intermediate.dense, layer.output.dense)]

    def add(self, update: LowRank) -> None:
        """See ``Block.add``."""
        for part, name in enumerate(("query", "key", "value")):
            setattr(self._inner, name, LoraLinear(getattr(self._inner, name), update, part))


def _linear_weights(mlp: nn.Module) -> list[Weight]:
    return [Weight(layer, "weight") for layer in mlp.modules() if isinstance(layer, nn.Linear)]
