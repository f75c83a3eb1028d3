"""The weights of a transformer's block in three layouts: open_clip's, timm's and Hugging Face's."""

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
    """A parameter that holds one matrix, or several of equal size below each other."""

    module: nn.Module
    name: str  # of the parameter in ``module``
    matrices: int = 1

    @property
    def value(self) -> Tensor:
        """The parameter (P m, n), with P matrices."""
        return getattr(self.module, self.name)


class SelfAttention(ABC):
    """The self-attention of one block, and the MLP after it."""

    width: int  # W

    @abstractmethod
    def attention_weights(self) -> tuple[Weight, ...]:
        """Return the projections to q, k and v, in this order, and the projection of the output."""

    @abstractmethod
    def mlp_weights(self) -> tuple[Weight, ...]:
        """Return both layers of the block's MLP; () for another kind of MLP."""

    @abstractmethod
    def add(self, update: LowRank) -> None:
        """Add low-rank updates to the projections to q, k and v, in place."""


class OpenClipAttention(SelfAttention):
    """``nn.MultiheadAttention`` in a block of open_clip, or a ``LoraAttention`` in its place."""

    def __init__(self, block: nn.Module) -> None:
        self._block: Any = block
        attention: Any = block.attn
        self._frozen: Any = getattr(attention, "frozen", attention)
        self.width = self._frozen.embed_dim

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> list[Self]:
        """Return the attention of each block; an empty list if one has open_clip's own ``Attention``."""
        blocks = list(blocks)
        kinds = (nn.MultiheadAttention, LoraAttention)
        supported = all(isinstance(getattr(block, "attn", None), kinds) for block in blocks)
        return [cls(block) for block in blocks] if supported else []

    def attention_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.attention_weights``; q, k and v are in one parameter."""
        return Weight(self._frozen, "in_proj_weight", 3), Weight(self._frozen.out_proj, "weight")

    def mlp_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.mlp_weights``."""
        return _layers(self._block.mlp, "c_fc", "c_proj")

    def add(self, update: LowRank) -> None:
        """See ``SelfAttention.add``."""
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


class TimmAttention(SelfAttention):
    """timm's ``Attention``: one linear layer projects to q, k and v."""

    def __init__(self, block: nn.Module) -> None:
        self._block: Any = block
        self._attention: Any = block.attn
        self.width = self._attention.proj.in_features

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> list[Self]:
        """Return the attention of each block; an empty list if one has another kind of attention."""
        from timm.layers.attention import Attention

        blocks = list(blocks)
        supported = all(
            type(attention := getattr(block, "attn", None)) is Attention
            and attention.attn_dim == attention.num_heads * attention.head_dim == attention.proj.out_features
            for block in blocks
        )
        return [cls(block) for block in blocks] if supported else []

    def attention_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.attention_weights``; q, k and v are in one parameter."""
        return Weight(self._attention.qkv, "weight", 3), Weight(self._attention.proj, "weight")

    def mlp_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.mlp_weights``."""
        return _layers(self._block.mlp, "fc1", "fc2")

    def add(self, update: LowRank) -> None:
        """See ``SelfAttention.add``."""
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


class BertAttention(SelfAttention):
    """The attention of BERT and its relatives in Hugging Face's transformers: three linear layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Wrap a layer: ``attention`` with ``self`` and ``output``, ``intermediate`` and ``output``."""
        self._layer: Any = layer
        self._inner: Any = self._layer.attention.self
        self.width = self._inner.query.in_features

    @classmethod
    def of(cls, transformer: nn.Module) -> list[Self]:
        """Return the attention of each block of a transformer, the first block first."""

        def has_attention(module: Any) -> bool:
            attention = getattr(module, "attention", None)
            inner, output = getattr(attention, "self", None), getattr(attention, "output", None)
            layers = [getattr(inner, name, None) for name in ("query", "key", "value")]
            linear = all(isinstance(layer, nn.Linear | LoraLinear) for layer in layers)
            return linear and hasattr(output, "dense")

        return [cls(module) for module in transformer.modules() if has_attention(module)]

    def attention_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.attention_weights``."""
        inner, output = self._inner, self._layer.attention.output
        return tuple(Weight(layer, "weight") for layer in (inner.query, inner.key, inner.value, output.dense))

    def mlp_weights(self) -> tuple[Weight, ...]:
        """See ``SelfAttention.mlp_weights``."""
        parts = (getattr(self._layer, name, None) for name in ("intermediate", "output"))
        return tuple(weight for part in parts for weight in _layers(part, "dense"))

    def add(self, update: LowRank) -> None:
        """See ``SelfAttention.add``."""
        for part, name in enumerate(("query", "key", "value")):
            setattr(self._inner, name, LoraLinear(getattr(self._inner, name), update, part))


def _layers(module: Any, *names: str) -> tuple[Weight, ...]:
    """Return the weights of a module's linear layers; () unless it has all of them."""
    layers = [getattr(module, name, None) for name in names]
    plain = all(isinstance(layer, nn.Linear) for layer in layers)
    return tuple(Weight(layer, "weight") for layer in layers if layer is not None) if plain else ()
