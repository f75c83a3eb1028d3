"""The verbs of towers, and the base classes that refuse every verb by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Never

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medfocus.clip.towers.blocks import Block


@dataclass(frozen=True)
class Verb:
    """Something that some towers can do."""

    parts: tuple[str, ...]  # the towers that need it
    needs: str  # completes "the tower has no ..."
    instead: str  # a sentence: what to use with a tower that lacks the verb


IMAGE, TEXT = "image encoder", "text tower"
VERBS: dict[str, Verb] = {
    "stages": Verb((IMAGE,), "feature maps of layers", "Set layers to []."),
    "tail": Verb(
        (IMAGE,),
        "last blocks to train",
        "Use a method on frozen features, such as clip-linear-probe or clip-adapter.",
    ),
    "attention-bias": Verb(
        (IMAGE,), "attention that a region can bias", "Use the focus alpha, dual, crop or multiply."
    ),
    "channel": Verb(
        (IMAGE,),
        "first convolution with room for the region's channel",
        "Use the focus dual, crop or multiply.",
    ),
    "attention-maps": Verb((IMAGE,), "attention matrices", "Use Grad-CAM or occlusion."),
    "activation-maps": Verb((IMAGE,), "maps of a convolutional net", "Use attention or occlusion."),
    "projections": Verb(
        (IMAGE, TEXT),
        "blocks with projections to q, k and v",
        "Use clip-few-shot, or medfocusclip with tuning adapter or full.",
    ),
    "contexts": Verb(
        (TEXT,),
        "token embeddings that contexts can replace",
        "Use clip-adapter, tip-adapter-f or clip-linear-probe.",
    ),
}


class TowerError(ValueError):
    """A tower lacks something that a method or a focus needs."""


class Tower:
    """A tower that only encodes; subclasses add verbs."""

    part: str  # IMAGE or TEXT

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def verbs(self) -> frozenset[str]:
        """The keys of VERBS that this tower can do."""
        return frozenset()

    @property
    def kind(self) -> str:
        """The kind of the tower, for messages."""
        net = getattr(self.module, "trunk", None)  # in open_clip's TimmModel
        return type(self.module).__name__ if net is None else f"timm's {type(net).__name__}"

    def require(self, verb: str, caller: str, model: str = "this model") -> None:
        """Raise TowerError, beginning with ``caller``, if the tower of ``model`` lacks ``verb``."""
        if verb not in self.verbs:
            raise TowerError(
                f"{caller}: the {self.part} of {model} ({self.kind}) has no {VERBS[verb].needs}. "
                f"{VERBS[verb].instead}"
            )

    def blocks(self) -> Sequence[Block]:
        """Return the blocks of a transformer, the first block first. Needs "projections"."""
        self._lacks("projections")

    def _lacks(self, verb: str) -> Never:
        self.require(verb, "this call")
        raise NotImplementedError(f"{type(self).__name__} claims {verb} without its methods.")


class ImageTower(Tower):
    """An image encoder: pixels pass ``embed``, ``depth`` blocks and ``pool``.

    A *state* is the result of ``embed`` (layer 0) or of block n (layer n): tokens (B, L, W) of a
    transformer, or maps (B, W, G, G) of a convolutional net, where a block is a stage. A *bias* is a result
    of ``bias``.
    """

    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format  # of the pixels

    part = IMAGE

    # --- "stages"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        self._lacks("stages")

    def sides(self, image_size: int) -> tuple[int, ...]:
        """Return the cells a side of the maps of layers 0 to ``depth``."""
        self._lacks("stages")

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, C, S, S) into the state of layer 0."""
        self._lacks("stages")

    def block(self, number: int, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """Pass the state of layer ``number - 1`` through block ``number``."""
        self._lacks("stages")

    def pool(self, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """Turn the state of the last layer into image features (B, D), each of length one."""
        self._lacks("stages")

    def maps(self, state: Tensor) -> Tensor:
        """Return the feature maps (B, W, G, G) of a state."""
        self._lacks("stages")

    # --- "tail"

    def tail(self, blocks: int) -> nn.Module:
        """Return a copy of the module with only what follows the input of the last ``blocks`` blocks.

        ``image_tower`` of the copy turns such an input into image features by ``run`` from layer 0.
        """
        self._lacks("tail")

    def run(self, state: Tensor, bias: Tensor | None = None) -> Tensor:
        """Pass a state through all blocks and ``pool``: (B, ...) -> image features (B, D) of length one."""
        for number in range(1, self.depth + 1):
            state = self.block(number, state, bias)
        return self.pool(state, bias)

    # --- "attention-bias"

    def coverage(self, region: Tensor) -> Tensor:
        """Return the share (B, L) of each token's patch inside a region (B, 1, S, S) in [0, 1].

        Tokens without a patch have 0; the patches follow row by row.
        """
        self._lacks("attention-bias")

    def bias(self, coverage: Tensor, strength: float) -> Tensor:
        """Return the bias that adds β m to the attention logits of the patches, from coverage m (B, L).

        It acts on the queries of the tokens that pool: the class token; every patch if the features are the
        mean of the patches; or the learned query of an attention pool, and then only there. β is
        ``strength``.
        """
        self._lacks("attention-bias")

    # --- "channel"

    @property
    def first_conv(self) -> str:
        """Name of the convolution that takes the pixels, inside the module."""
        self._lacks("channel")

    # --- "attention-maps"

    def attended(self, pixels: Tensor, bias: Tensor | None = None) -> Attended:
        """Encode pixels (B, C, S, S) like ``run``, and keep the attention matrices as part of the graph."""
        self._lacks("attention-maps")


@dataclass(frozen=True)
class Attended:
    """Image features with the attention behind them; see ``medfocus.explain.transformer``."""

    features: Tensor  # (B, D) of length one
    blocks: list[Tensor]  # (B, H, L, L) of each block, rows of sum one
    pool: Tensor | None  # (B, H, 1, P) of an attention pool over the patches, or None
    queries: slice  # the tokens that pool; all patches for an attention pool
    patches: slice  # the tokens of the patches, row by row
