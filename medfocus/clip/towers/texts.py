"""Text towers: open_clip's own transformer, and one of Hugging Face in open_clip's ``HFTextEncoder``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from medfocus.clip.towers.base import TEXT, Tower
from medfocus.clip.towers.blocks import BertBlock, Block, OpenClipBlock


class TextTower(Tower):
    """A text tower: token embeddings, positions, blocks and pooling; open_clip's model runs it."""

    part = TEXT

    # --- "contexts"

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, before positions."""
        self._lacks("contexts")

    @property
    def context_length(self) -> int:
        """Number of tokens that the tower reads at most."""
        self._lacks("contexts")

    @property
    def ignores_padding(self) -> bool:
        """Whether padding has no effect on text features, so that it can be left out."""
        self._lacks("contexts")

    def shortened(self, length: int) -> dict[int, Any]:
        """Return id of a tensor -> the tensor in its place, in a copy of the tower for ``length`` tokens."""
        self._lacks("contexts")


class OpenClipText(TextTower):
    """open_clip's text transformer; SigLIP's has no causal mask and pools the last token."""

    @property
    def verbs(self) -> frozenset[str]:
        """See ``Tower.verbs``."""
        return frozenset({"contexts", "projections"} if self.blocks() else {"contexts"})

    @property
    def embedding(self) -> nn.Embedding:
        """See ``TextTower.embedding``."""
        return self.module.token_embedding

    @property
    def context_length(self) -> int:
        """See ``TextTower.context_length``."""
        return self.module.context_length

    @property
    def ignores_padding(self) -> bool:
        """See ``TextTower.ignores_padding``."""
        tower = self.module
        pooling = getattr(tower, "pool_type", None) or tower.text_pool_type
        causal = tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None
        return causal and pooling in ("argmax", "eos")

    def shortened(self, length: int) -> dict[int, Any]:
        """See ``TextTower.shortened``: fewer positions, and a smaller causal mask."""
        tower = self.module
        if length >= tower.context_length:
            return {}
        positions = nn.Parameter(tower.positional_embedding[:length].detach(), requires_grad=False)
        return {
            id(tower.positional_embedding): positions,
            id(tower.attn_mask): tower.attn_mask[:length, :length],
        }

    def blocks(self) -> Sequence[Block]:
        """See ``Tower.blocks``."""
        return OpenClipBlock.of(self.module.transformer.resblocks)


class HuggingFaceText(TextTower):
    """A transformer of Hugging Face, such as BiomedCLIP's PubMedBERT; it never attends to padding."""

    @property
    def kind(self) -> str:
        """See ``Tower.kind``."""
        return f"Hugging Face's {type(self.module.transformer).__name__}"

    @property
    def verbs(self) -> frozenset[str]:
        """See ``Tower.verbs``."""
        return frozenset({"contexts", "projections"} if self.blocks() else {"contexts"})

    @property
    def embedding(self) -> nn.Embedding:
        """See ``TextTower.embedding``."""
        return self.module.transformer.get_input_embeddings()

    @property
    def context_length(self) -> int:
        """See ``TextTower.context_length``."""
        return self.module.context_length

    @property
    def ignores_padding(self) -> bool:
        """See ``TextTower.ignores_padding``."""
        return True

    def shortened(self, length: int) -> dict[int, Any]:
        """See ``TextTower.shortened``: the transformer takes texts of any length."""
        return {}

    def blocks(self) -> Sequence[Block]:
        """See ``Tower.blocks``."""
        return BertBlock.of(self.module.transformer)
