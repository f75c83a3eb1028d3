"""Learn prompts: the text tower encodes texts in which learned vectors replace some tokens.

CoOp (Zhou et al., arXiv 2109.01134) and CoCoOp (arXiv 2203.05557) share this module. As in their public code,
a text is the start token, M contexts, the class name, a full stop and the end token, if the tokenizer writes
these. The tokenizer sees M placeholders "X" in place of the contexts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medfocus.clip.prompts import text_prompts

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

CLASS_TOKENS = ("end", "middle", "front")  # positions of the class name among the contexts
START_STD = 0.02  # of contexts that start from noise
_PLACEHOLDER = "X"  # a letter is one token in every tokenizer


class EmbeddedTexts:
    """The text tower of a frozen CLIP without its token embedding: embedded texts -> text features.

    It runs open_clip's forward pass, so mask, pooling and projection are open_clip's in every variant. In a
    copy of its modules, which shares the frozen weights, the given embeddings replace the token embedding.
    """

    def __init__(self, encoder: ClipEncoder, length: int | None = None) -> None:
        """Copy the tower for texts of ``length`` tokens; None means its context length.

        Raises TowerError if contexts cannot replace token embeddings.
        """
        encoder.require(("contexts",), "learned contexts")
        tower = encoder.text_tower
        self._embedding = tower.embedding
        self._device = encoder.device
        self._embedding_input = _EmbeddingInput()
        memo: dict[int, Any] = {id(self._embedding): self._embedding_input}
        if length is not None:
            memo |= tower.shortened(length)
        for tensor in (*encoder.model.parameters(), *encoder.model.buffers()):
            memo.setdefault(id(tensor), tensor)
        self._model: Any = copy.deepcopy(encoder.model, memo)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (N, L, W) of tokens (N, L) int64 on the CPU."""
        return self._embedding(tokens.to(self._device)).cpu()

    def __call__(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Encode embedded texts as text features (N, D) on the CPU, each of length one, with a gradient.

        Args:
            embedded: (N, L, W), the embedding of each token without its position.
            tokens: (N, L) int64; open_clip finds the end and the padding of a text in them.
        """
        self._embedding_input.embedded = embedded.to(self._device)
        try:
            return self._model.encode_text(tokens.to(self._device), normalize=True).cpu()
        finally:
            self._embedding_input.embedded = None  # frees the graph of the training step


class _EmbeddingInput(nn.Module):
    """A replacement of the token embedding that returns ``embedded``."""

    embedded: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.embedded is not None and self.embedded.shape[:2] == tokens.shape
        return self.embedded


@dataclass(frozen=True, eq=False)
class ContextTexts:
    """The tokenised text of each class, with slots for M contexts."""

    tokens: Tensor  # (K, L) int64; the tokens in the slots have no effect
    slots: Tensor  # (K, M) int64, the positions of the contexts


def write_texts(
    method: str, encoder: ClipEncoder, class_names: Sequence[str], contexts: int, class_token: str = "end"
) -> ContextTexts:
    """Write the texts of K class names with slots for ``contexts`` contexts, with little padding.

    The class name stands at the "end" of the contexts, in their "middle" (the smaller half of an odd number
    comes first) or in "front" of them.

    Raises ValueError without class names, for a text longer than the tower's context, and as
    ``find_placeholder`` does. The messages begin with ``method``.
    """
    if not class_names:
        raise ValueError(
            f"{method}: support.class_names is empty, so the method cannot write its texts. Give the class "
            "names."
        )
    start, ids = find_placeholder(method, encoder)
    tower = encoder.text_tower
    places = " ".join([_PLACEHOLDER] * contexts)
    texts = [text for (text,) in text_prompts(class_names, "other", [f"{places} {{c}}."])]
    tokens, used = _tokenise(encoder, texts)
    assert bool((tokens[:, start : start + contexts] == ids).all())
    if int(used.max()) > tower.context_length:
        longest = int(used.argmax())
        raise ValueError(
            f"{method}: the text of class '{class_names[longest]}' with {contexts} contexts has "
            f"{int(used[longest])} tokens, but the text tower of {encoder.name} reads "
            f"{tower.context_length}. Lower contexts or shorten the class name."
        )
    before = {"end": contexts, "middle": contexts // 2, "front": 0}[class_token]
    _, named = _tokenise(encoder, [text.removesuffix(".") for text in texts])
    _, unnamed = _tokenise(encoder, [places])
    order = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)  # (K, L) index of the token at a position
    slots = []
    for row, name in zip(order, (named - unnamed).tolist(), strict=True):
        first, last = start + before, start + contexts + name
        row[first:last] = torch.cat([row[start + contexts : last], row[first : start + contexts]])
        slots.append([*range(start, first), *range(first + name, last)])
    length = int(used.max()) if tower.ignores_padding else tower.context_length
    return ContextTexts(tokens.gather(1, order)[:, :length].contiguous(), torch.tensor(slots))


def start_contexts(
    method: str, encoder: ClipEncoder, contexts: int, start: str, generator: torch.Generator
) -> Tensor:
    """Return initial contexts (M, W): embeddings of the words of ``start``, or noise if ``start`` is empty.

    Raises ValueError if ``start`` does not have M tokens; the message begins with ``method``.
    """
    first, _ = find_placeholder(method, encoder)
    embedding = encoder.text_tower.embedding
    if not start:
        size = (contexts, embedding.embedding_dim)
        return START_STD * torch.randn(size, generator=generator)
    tokens, used = _tokenise(encoder, [start, ""])
    if (count := int(used[0] - used[1])) != contexts:
        raise ValueError(
            f"{method}: start is '{start}', which has {count} tokens, but contexts is {contexts}. Set "
            f"contexts to {count}, or start to a text of {contexts} tokens or to an empty text."
        )
    with torch.no_grad():
        return embedding(tokens[0, first : first + contexts].to(encoder.device)).cpu()


def _tokenise(encoder: ClipEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the tokens (N, L) of N texts, and the number (N,) of tokens before the padding."""
    most = max(len(text.encode()) for text in texts) + 3  # a text has at most as many tokens as bytes
    length = max(most, encoder.text_tower.context_length)
    tokens = encoder.tokenizer(texts, context_length=length)  # (N, L)
    written = tokens != tokens[:, -1:]  # the last token is padding
    used = (written * torch.arange(1, length + 1)).amax(dim=1)  # (N,)
    return tokens, used


def find_placeholder(method: str, encoder: ClipEncoder) -> tuple[int, int]:
    """Return the position of the first word of a text, and the token of the placeholder.

    Raises TowerError if contexts cannot replace token embeddings, and ValueError for a tokenizer that does
    not write a letter as one token. The messages begin with ``method``.
    """
    encoder.require(("contexts",), method)
    tokens, used = _tokenise(encoder, [f"{_PLACEHOLDER} {_PLACEHOLDER}", ""])
    start = int(tokens[0, 0] != tokens[0, 1])  # SigLIP's tokenizer writes no start token
    first, second = tokens[0, start : start + 2].tolist()
    if first != second or int(used[0] - used[1]) != 2:
        raise ValueError(
            f"{method}: the tokenizer of {encoder.name} ({type(encoder.tokenizer).__name__}) does not write "
            "at most one start token and then one token for a letter, so the positions of the contexts are "
            "unknown. Take a CLIP with open_clip's own tokenizer, such as ViT-B-32."
        )
    return start, first


class ContextTower:
    """The text tower with the texts of all classes: contexts -> text features."""

    def __init__(self, encoder: ClipEncoder, texts: ContextTexts) -> None:
        self.texts = texts
        self._tower = EmbeddedTexts(encoder, texts.tokens.shape[1])
        self._embedded = self._tower.embed(texts.tokens)  # (K, L, W)

    def embedded(self, contexts: Tensor) -> Tensor:
        """Put contexts (B, K, M, W), or (B, 1, M, W) for all classes, into embedded texts (B, K, L, W)."""
        images, width = len(contexts), contexts.shape[-1]
        at = self.texts.slots[..., None].expand(images, -1, -1, width)  # (B, K, M, W)
        return self._embedded.expand(images, -1, -1, -1).scatter(2, at, contexts.expand_as(at))

    def __call__(self, contexts: Tensor) -> Tensor:
        """Encode contexts (B, K, M, W) or (B, 1, M, W) as text features (B, K, D), each of length one."""
        images = len(contexts)
        tokens = self.texts.tokens.repeat(images, 1)  # (B K, L)
        features = self._tower(self.embedded(contexts).flatten(0, 1), tokens)
        return features.unflatten(0, (images, -1))
