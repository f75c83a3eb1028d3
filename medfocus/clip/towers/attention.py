"""The self-attention of a block in three layouts: open_clip's, timm's and Hugging Face's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import linear

from medfocus.clip.towers.low_rank import LoraAttention, LoraLinear, LowRank


@dataclass(frozen=True)
class Projection:
    """A weight matrix of an attention: rows of a parameter, to change in place or to parametrise."""

    name: str  # "q", "k", "v" or "out"
    module: nn.Module
    parameter: str  # its name in ``module``
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """The matrix (W, W), a view of the parameter."""
        return getattr(self.module, self.parameter)[self.rows]


class SelfAttention(ABC):
    """The self-attention of one block: its weight matrices, and low-rank updates of them."""

    width: int  # W

    @abstractmethod
    def projections(self) -> tuple[Projection, ...]:
        """Return the projections to q, k and v, and of the output."""

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

    def projections(self) -> tuple[Projection, ...]:
        """See ``SelfAttention.projections``; q, k and v are rows of one parameter."""
        return (
            *_thirds(self._frozen, "in_proj_weight", self.width),
            Projection("out", self._frozen.out_proj, "weight"),
        )

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

    def __init__(self, attention: nn.Module) -> None:
        self._attention: Any = attention
        self.width = attention.proj.in_features  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]

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
        return [cls(block.attn) for block in blocks] if supported else []  # pyright: ignore[reportArgumentType]

    def projections(self) -> tuple[Projection, ...]:
        """See ``SelfAttention.projections``; q, k and v are rows of one parameter."""
        qkv, proj = self._attention.qkv, self._attention.proj
        return (*_thirds(qkv, "weight", self.width), Projection("out", proj, "weight"))

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

    def __init__(self, attention: nn.Module) -> None:
        """Wrap the module with the parts ``self`` (query, key, value) and ``output`` (dense)."""
        self._inner: Any = attention.self
        self._output: Any = attention.output
        self.width = self._inner.query.in_features

    @classmethod
    def of(cls, transformer: nn.Module) -> list[Self]:
        """Return the attention of each block of a transformer, the first block first."""

        def is_attention(module: nn.Module) -> bool:
            layers = [
                getattr(getattr(module, "self", None), name, None) for name in ("query", "key", "value")
            ]
            output = getattr(getattr(module, "output", None), "dense", None)
            return all(isinstance(layer, nn.Linear | LoraLinear) for layer in layers) and output is not None

        return [cls(module) for module in transformer.modules() if is_attention(module)]

    def projections(self) -> tuple[Projection, ...]:
        """See ``SelfAttention.projections``."""
        inner = self._inner
        layers = {"q": inner.query, "k": inner.key, "v": inner.value, "out": self._output.dense}
        return tuple(Projection(name, layer, "weight") for name, layer in layers.items())

    def add(self, update: LowRank) -> None:
        """See ``SelfAttention.add``."""
        for part, name in enumerate(("query", "key", "value")):
            setattr(self._inner, name, LoraLinear(getattr(self._inner, name), update, part))


def _thirds(module: nn.Module, parameter: str, width: int) -> list[Projection]:
    """Return the projections to q, k and v whose matrices stand below each other in one parameter."""
    return [
        Projection(name, module, parameter, slice(part * width, (part + 1) * width))
        for part, name in enumerate("qkv")
    ]
