"""Define the kinds of region that an image encoder can use with the image: REGIONS.

Each kind is a class, which defines its channels of a view, how it packs states of the encoder and how it
merges features. A region asks the encoder's tower (``medfocus.clip.towers``) for its patches and its first
convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from medfocus.clip.towers.base import ImageTower

ALPHA_MEAN, ALPHA_STD = 0.5, 0.26  # of a region in Alpha-CLIP's preprocessing
_ALPHA_KEY = "conv1_alpha.weight"  # of the channel in Alpha-CLIP's published weights


@dataclass(frozen=True)
class Region:
    """The base of all kinds, and the absence of a region: the encoder takes the RGB channels alone."""

    attention_bias: float = 0.0  # β of AttentionRegion; the others ignore it

    name: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()  # verbs of the image tower, see medfocus.clip.towers.base.VERBS
    # Focus of the image in the channels after RGB; None: they are the mask.
    focused: ClassVar[str | None] = None
    sees_one_rgb: ClassVar[bool] = True  # the first layer takes one RGB image

    @property
    def key(self) -> str:
        """The part of cache keys that identifies this region."""
        return f"{self.name} 0.0"

    def adapt(self, model: nn.Module, tower: ImageTower) -> nn.Module:
        """Return the open_clip model that this region needs; ``tower`` is that of the model."""
        return model

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the inputs of the image encoder in pixels (B, C, S, S)."""
        return (pixels[:, :3],)

    def bias(self, tower: ImageTower, pixels: Tensor) -> Tensor | None:
        """Return the attention bias of every block (see ``ImageTower.bias``), or None."""
        return None

    def pack(self, states: Sequence[Tensor], tower: ImageTower, pixels: Tensor) -> Tensor:
        """Join the state (B, ...) of each image into one tensor for ``unpack``."""
        return states[0]

    def unpack(self, packed: Tensor, tower: ImageTower) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the state of each image and the attention bias, from the result of ``pack``."""
        return (packed,), None

    def merge(self, features: Sequence[Tensor]) -> Tensor:
        """Merge the features (B, D) of each image into features (B, D), each of length one."""
        return features[0]


class AlphaRegion(Region):
    """A region in a fourth input channel of the first convolution (Alpha-CLIP, arXiv 2312.03818).

    As in Alpha-CLIP's code, the channel is (m - 0.5) / 0.26 for a region m in [0, 1].
    """

    name = "alpha"
    needs = ("channel",)
    sees_one_rgb = False

    def adapt(self, model: nn.Module, tower: ImageTower) -> nn.Module:
        """Return a copy of the model with an ``AlphaConv`` as first convolution."""
        adapted: Any = copy.deepcopy(model)
        conv = adapted.visual.get_submodule(tower.first_conv)
        adapted.visual.set_submodule(tower.first_conv, AlphaConv(conv))
        return adapted

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return all four channels as one input."""
        return (torch.cat([pixels[:, :3], (pixels[:, 3:] - ALPHA_MEAN) / ALPHA_STD], dim=1),)


class AttentionRegion(Region):
    """A region that the class token attends to more: every block adds β to the logits of its patches.

    In an encoder without a class token, the tokens that pool attend to the region; see ``ImageTower.bias``.
    """

    name = "attention"
    needs = ("attention-bias",)

    @property
    def key(self) -> str:
        """The name and β."""
        return f"{self.name} {self.attention_bias}"

    def bias(self, tower: ImageTower, pixels: Tensor) -> Tensor | None:
        """Return β times the coverage of each patch; None for β = 0."""
        if not self.attention_bias:
            return None
        return tower.bias(tower.coverage(pixels[:, 3:]), self.attention_bias)

    def pack(self, states: Sequence[Tensor], tower: ImageTower, pixels: Tensor) -> Tensor:
        """Append the coverage of each token as one more channel, (B, L, W + 1), unless β is 0."""
        if not self.attention_bias:
            return states[0]
        return torch.cat([states[0], tower.coverage(pixels[:, 3:])[..., None]], dim=2)

    def unpack(self, packed: Tensor, tower: ImageTower) -> tuple[Sequence[Tensor], Tensor | None]:
        """Split the coverage from the tokens and turn it into the attention bias."""
        if not self.attention_bias:
            return (packed,), None
        return (packed[..., :-1],), tower.bias(packed[..., -1], self.attention_bias)


class DualRegion(Region):
    """A region in a second image, in which only the region remains.

    The features are the sum of both images' features; feature maps of layers stand side by side.
    """

    name = "dual"
    focused = "multiply"
    sees_one_rgb = False

    def images(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return the image and the focused image from six channels."""
        return pixels.split(3, dim=1)

    def pack(self, states: Sequence[Tensor], tower: ImageTower, pixels: Tensor) -> Tensor:
        """Concatenate the states of both images along dimension 1: tokens, or channels of maps."""
        return torch.cat(list(states), dim=1)

    def unpack(self, packed: Tensor, tower: ImageTower) -> tuple[Sequence[Tensor], Tensor | None]:
        """Split the states of both images."""
        return packed.chunk(2, dim=1), None

    def merge(self, features: Sequence[Tensor]) -> Tensor:
        """Add the features of both images and normalise the sum."""
        return normalize(features[0] + features[1], dim=-1)


class DualCropRegion(DualRegion):
    """A region in a second image, which is cropped to it."""

    name = "dual-crop"
    focused = "crop"


REGIONS: dict[str, type[Region]] = {
    "alpha": AlphaRegion,
    "attention": AttentionRegion,
    "dual": DualRegion,
    "dual-crop": DualCropRegion,
}


class AlphaConv(nn.Module):
    """A first convolution with a fourth channel for the region: conv(RGB) + alpha(region).

    ``alpha`` starts at zero, so a region has no effect on the features until it is trained.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.alpha = copy.deepcopy(conv)  # the same geometry, also in timm's kinds of convolution
        self.alpha.in_channels = 1
        self.alpha.bias = None
        self.alpha.weight = nn.Parameter(torch.zeros_like(conv.weight[:, :1]), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, 4, S, S) into maps (B, W, G, G)."""
        return self.conv(pixels[:, :3]) + self.alpha(pixels[:, 3:])


def alpha_layer(model: nn.Module) -> nn.Module | None:
    """Return the convolution of the fourth channel, or None if the model has none."""
    return next((module.alpha for module in model.modules() if isinstance(module, AlphaConv)), None)


def load_alpha(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load Alpha-CLIP's published weights into a model with an ``AlphaConv``, in place.

    Args:
        model: The result of ``AlphaRegion.adapt``.
        state: The image encoder's tensors with the names of Alpha-CLIP's checkpoints, or only its channel
            ``conv1_alpha.weight``; with or without the prefix "visual.".

    Raises ValueError for weights of another architecture or without the channel.
    """
    visual: Any = model.visual
    place = next(name for name, module in visual.named_modules() if isinstance(module, AlphaConv))
    given = {name.removeprefix("visual."): value for name, value in state.items()}
    if _ALPHA_KEY not in given:
        raise ValueError(
            f"clip.alpha: the weights have no {_ALPHA_KEY}. Give a checkpoint of Alpha-CLIP's image encoder."
        )
    renamed = {f"{place}.alpha.weight": given.pop(_ALPHA_KEY)}
    for name, value in given.items():
        name = name.replace("attn.in_proj.", "attn.in_proj_")  # Alpha-CLIP has a linear layer there
        renamed[name.replace(f"{place}.", f"{place}.conv.", 1) if name.startswith(f"{place}.") else name] = (
            value
        )
    own = visual.state_dict()
    wrong = [name for name, value in renamed.items() if name not in own or own[name].shape != value.shape]
    missing = own.keys() - renamed.keys() if given else set()
    if fault := sorted({*wrong, *missing}):
        raise ValueError(
            f"clip.alpha: the weights are of another architecture ({fault[0]}). Set clip.model to theirs."
        )
    visual.load_state_dict(renamed, strict=False)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights without the fourth channel, under the names of a model without it."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, AlphaConv):
            del state[f"{name}.alpha.weight"]
            state = {weight.replace(f"{name}.conv.", f"{name}."): value for weight, value in state.items()}
    return dict(state)


def channel_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the fourth channel for ``load_alpha``; empty without such weights."""
    layer: Any = alpha_layer(model)
    return {_ALPHA_KEY: layer.weight} if layer is not None and bool(layer.weight.any()) else {}
