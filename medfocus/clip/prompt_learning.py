"""Prompt learning: open_clip's text tower on texts some of whose tokens are learned vectors.

What CoOp (Zhou et al., arXiv 2109.01134) and CoCoOp (arXiv 2203.05557) share. As in their public code a text
is the start token, M contexts, the class's name, a full stop and the end token, and M placeholders "X" hold
the contexts' places while it is tokenised.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medfocus.clip.prompts import text_prompts

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

CLASS_TOKENS = ("end", "middle", "front")  # where a class's name stands among its contexts
WARMUP_LR = 1e-5  # published, whatever the learning rate is
START_STD = 0.02  # of contexts that start at no words
_PLACEHOLDER = "X"  # a letter is one token of every tokenizer


def check_prompt_learning(method: str, *, epochs: int, warmup: int, **counts: int) -> None:
    """Raise ValueError, in the name of ``method``, for settings under which nothing would be learned.

    These are a number of ``epochs`` or one of ``counts`` below one, and a ``warmup`` that no epoch follows.
    """
    for name, count in {"epochs": epochs, **counts}.items():
        if count < 1:
            raise ValueError(f"{method}: {name} is {count}; use 1 or more.")
    if not 0 <= warmup < epochs:
        raise ValueError(
            f"{method}: warmup is {warmup} epochs of {epochs}; use 0 or more, and fewer than epochs."
        )


class TextTower:
    """A frozen CLIP's text tower behind its token embedding: embedded texts -> text features.

    It is open_clip's own forward pass, so that mask, pooling and projection are open_clip's in every variant;
    a copy of its modules, which share the frozen weights, finds the given embeddings where it would look
    tokens up. The encoder is left as it was.
    """

    def __init__(self, encoder: ClipEncoder, length: int | None = None) -> None:
        """Cut the tower off at ``length`` tokens; None is its context length.

        Raises ValueError where the text tower is not open_clip's own.
        """
        tower = _text_tower(encoder)
        self._embedding: nn.Embedding = tower.token_embedding
        self._device = encoder.device
        self._given = _Given()
        memo: dict[int, Any] = {id(tower.token_embedding): self._given}
        if length is not None and length < tower.context_length:
            memo[id(tower.positional_embedding)] = nn.Parameter(
                tower.positional_embedding[:length].detach(), requires_grad=False
            )
            memo[id(tower.attn_mask)] = tower.attn_mask[:length, :length]
        for tensor in (*encoder.model.parameters(), *encoder.model.buffers()):
            memo.setdefault(id(tensor), tensor)
        self._model: Any = copy.deepcopy(encoder.model, memo)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) int64 -> their embeddings (N, L, W) on the CPU."""
        return self._embedding(tokens.to(self._device)).cpu()

    def __call__(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Embedded texts -> text features (N, D) on the CPU, each of length one, with their gradient.

        Args:
            embedded: (N, L, W) what stands at the place of each token, without its position.
            tokens: (N, L) int64, by which open_clip finds the end of a text and its padding.
        """
        self._given.embedded = embedded.to(self._device)
        try:
            return self._model.encode_text(tokens.to(self._device), normalize=True).cpu()
        finally:
            self._given.embedded = None  # else it would keep the step's graph alive


class _Given(nn.Module):
    """Stands for the token embedding and answers with what it was given."""

    embedded: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.embedded is not None and self.embedded.shape[:2] == tokens.shape
        return self.embedded


def _text_tower(encoder: ClipEncoder) -> Any:
    """CLIP keeps its text tower's parts among its own, CustomTextCLIP keeps a tower."""
    tower = getattr(encoder.model, "text", encoder.model)
    if not isinstance(getattr(tower, "token_embedding", None), nn.Embedding):
        raise ValueError(
            f"{encoder.name}: its text tower is {type(tower).__name__}, whose token embeddings cannot be "
            "replaced by learned contexts. Take a CLIP with open_clip's own text tower, such as ViT-B-32, or "
            "another method."
        )
    return tower


@dataclass(frozen=True, eq=False)
class ContextTexts:
    """One tokenised text a class, with free places for M contexts."""

    tokens: Tensor  # (K, L) int64; what stands in a free place does not matter
    slots: Tensor  # (K, M) int64, the free places in their order


def write_texts(
    method: str, encoder: ClipEncoder, class_names: Sequence[str], contexts: int, class_token: str = "end"
) -> ContextTexts:
    """Class names (K) -> their texts around ``contexts`` free places, no longer than the longest needs.

    The class's name stands at the "end" of the contexts, in their "middle" (of an odd number the smaller half
    comes first) or in "front" of them.

    Raises ValueError, in the name of ``method``, without class names, for a text that is longer than the
    tower's context, and as ``TextTower`` does.
    """
    if not class_names:
        raise ValueError(
            f"{method}: it writes the classes' texts itself, but support.class_names is empty. Give the name "
            "of each class."
        )
    tower = _text_tower(encoder)
    places = " ".join([_PLACEHOLDER] * contexts)
    texts = [text for (text,) in text_prompts(class_names, "other", [f"{places} {{c}}."])]
    tokens, used = _tokenise(encoder, texts)
    start, ids = _probe(method, encoder)
    assert bool((tokens[:, start : start + contexts] == ids).all())
    if int(used.max()) > tower.context_length:
        longest = int(used.argmax())
        raise ValueError(
            f"{method}: the text of class '{class_names[longest]}' with {contexts} contexts has "
            f"{int(used[longest])} tokens, but the text tower of {encoder.name} reads "
            f"{tower.context_length}. Lower contexts or shorten the class's name."
        )
    before = {"end": contexts, "middle": contexts // 2, "front": 0}[class_token]
    _, named = _tokenise(encoder, [text.removesuffix(".") for text in texts])
    _, unnamed = _tokenise(encoder, [places])
    order = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)  # (K, L) which token goes to a place
    slots = []
    for row, name in zip(order, (named - unnamed).tolist(), strict=True):
        first, last = start + before, start + contexts + name
        row[first:last] = torch.cat([row[start + contexts : last], row[first : start + contexts]])
        slots.append([*range(start, first), *range(first + name, last)])
    length = int(used.max()) if _reads_no_further(tower) else tower.context_length
    return ContextTexts(tokens.gather(1, order)[:, :length].contiguous(), torch.tensor(slots))


def start_contexts(
    method: str, encoder: ClipEncoder, contexts: int, start: str, generator: torch.Generator
) -> Tensor:
    """The M vectors (M, W) that training starts from: the words of ``start``, or noise where it is empty.

    Raises ValueError, in the name of ``method``, where ``start`` has not M tokens.
    """
    tower = _text_tower(encoder)
    if not start:
        size = (contexts, tower.token_embedding.embedding_dim)
        return START_STD * torch.randn(size, generator=generator)
    tokens, used = _tokenise(encoder, [start, ""])
    if (count := int(used[0] - used[1])) != contexts:
        raise ValueError(
            f"{method}: start is '{start}', which has {count} tokens, but contexts is {contexts}. Set "
            f"contexts to {count}, or start to a text of {contexts} tokens or to nothing."
        )
    first, _ = _probe(method, encoder)
    with torch.no_grad():
        return tower.token_embedding(tokens[0, first : first + contexts].to(encoder.device)).cpu()


def _tokenise(encoder: ClipEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts (N) -> tokens (N, L) of which none is cut off, and how many each takes up (N,)."""
    room = max(len(text.encode()) for text in texts) + 3  # a text has at most as many tokens as bytes
    length = max(room, _text_tower(encoder).context_length)
    tokens = encoder.tokenizer(texts, context_length=length)  # (N, L)
    padding = tokens[:, -1:]
    used = length - (tokens != padding).flip(1).int().argmax(dim=1)  # (N,)
    return tokens, used


def _probe(method: str, encoder: ClipEncoder) -> tuple[int, int]:
    """Where a text's words begin, and the token of the placeholder."""
    tokens, used = _tokenise(encoder, [f"{_PLACEHOLDER} {_PLACEHOLDER}", ""])
    before, first, second = tokens[0, :3].tolist()
    if before == first or first != second or int(used[0] - used[1]) != 2:
        raise ValueError(
            f"{method}: the tokenizer of {encoder.name} ({type(encoder.tokenizer).__name__}) does not write "
            "one start token and then one token a letter, so the contexts have no known place. Take a CLIP "
            "with open_clip's own tokenizer, such as ViT-B-32."
        )
    return 1, first


def _reads_no_further(tower: Any) -> bool:
    """True where nothing behind the end of a text has a part in its features, so that it can be left out."""
    pooling = getattr(tower, "pool_type", None) or tower.text_pool_type
    causal = tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None
    return causal and pooling in ("argmax", "eos")


class ContextTower:
    """Contexts -> the text features of every class."""

    def __init__(self, encoder: ClipEncoder, texts: ContextTexts) -> None:
        self.texts = texts
        self._tower = TextTower(encoder, texts.tokens.shape[1])
        self._embedded = self._tower.embed(texts.tokens)  # (K, L, W)

    def embedded(self, contexts: Tensor) -> Tensor:
        """Contexts (B, K, M, W), or (B, 1, M, W) for all classes -> the texts' embeddings (B, K, L, W)."""
        images, width = len(contexts), contexts.shape[-1]
        at = self.texts.slots[..., None].expand(images, -1, -1, width)  # (B, K, M, W)
        return self._embedded.expand(images, -1, -1, -1).scatter(2, at, contexts.expand_as(at))

    def __call__(self, contexts: Tensor) -> Tensor:
        """Contexts (B, K, M, W) or (B, 1, M, W) -> text features (B, K, D), each of length one."""
        images = len(contexts)
        tokens = self.texts.tokens.repeat(images, 1)  # (B K, L)
        features = self._tower(self.embedded(contexts).flatten(0, 1), tokens)
        return features.unflatten(0, (images, -1))


def train_sgd(
    parameters: Iterable[nn.Parameter],
    accumulate: Callable[[Tensor, Tensor], None],
    count: int,
    *,
    views: int,
    epochs: int,
    max_steps: int,
    batch_size: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """Minimise by SGD of momentum 0.9 as CoOp and CoCoOp do, and keep the last iterate.

    Args:
        parameters: What trains.
        accumulate: Adds a batch's gradient to them, from image indices (B,) and the view drawn for each
            (B,).
        count: N, images in the support.
        views: How many cached views each image has; one is drawn per image and step.
        epochs: Passes over the support.
        max_steps: A bound on the steps. Where it binds, ``learning_rate`` runs through all its epochs in so
            many steps.
        batch_size: Images a step; the last batch of an epoch may be smaller.
        lr: See ``learning_rate``.
        warmup: See ``learning_rate``.
        weight_decay: SGD's, a part of the gradient.
        generator: The source of batch order and view draws.
    """
    optimizer = torch.optim.SGD(list(parameters), lr=lr, momentum=0.9, weight_decay=weight_decay)
    steps = min(epochs * math.ceil(count / batch_size), max_steps)
    step = 0
    while step < steps:
        for index in torch.randperm(count, generator=generator).split(batch_size)[: steps - step]:
            view = torch.randint(views, (len(index),), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * epochs // steps, epochs=epochs, lr=lr, warmup=warmup)
            optimizer.zero_grad(set_to_none=True)
            accumulate(index, view)
            optimizer.step()
            step += 1


def learning_rate(epoch: int, *, epochs: int, lr: float, warmup: int) -> float:
    """The published schedule: 1e-5 for ``warmup`` epochs, then a cosine from ``lr`` on.

    As in the public code the cosine is one over all ``epochs`` but counts from the end of the warm-up, so the
    last of them are not reached.
    """
    if epoch < warmup:
        return WARMUP_LR
    return lr / 2 * (1 + math.cos(math.pi * (epoch - warmup) / epochs))
