"""Train the singular values of CLIP's weight matrices: CLIP-SVD (Koleilat et al., arXiv 2509.03740).

In every block of both towers, each of the projections to q, k and v, the output of the attention, and both
layers of the MLP has a weight W = U diag(s) Vᵀ. The singular vectors U and V stay frozen, as do biases; only
s trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


class SingularValues(nn.Module):
    """A frozen weight with trained singular values: W -> W + U diag(s - s₀) Vᵀ, which is U diag(s) Vᵀ.

    In this form, training starts at exactly W.
    """

    start: Tensor  # s₀, (P, r)
    left: Tensor  # U, (P, m, r)
    right: Tensor  # Vᵀ, (P, r, n)

    def __init__(self, weight: Tensor, parts: int) -> None:
        """Decompose a weight (P m, n) of ``parts`` matrices P that stand below each other."""
        super().__init__()
        left, values, right = torch.linalg.svd(weight.detach().unflatten(0, (parts, -1)), full_matrices=False)
        self.values = nn.Parameter(values.clone())  # s, (P, r) with r = min(m, n)
        self.register_buffer("start", values, persistent=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """(P m, n) -> (P m, n)."""
        change = self.left * (self.values - self.start)[:, None]  # (P, m, r)
        return weight + (change @ self.right).flatten(0, 1)


class SvdTowers(nn.Module):
    """Both towers of a frozen CLIP with trained singular values.

    Its parameters and state are the singular values and, with the region "alpha", the fourth channel of the
    patch embedding. The towers are copies that share their frozen weights with the encoder.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        """Decompose the weights of every block in a copy of ``encoder``'s towers.

        Raises ValueError if a tower is not a transformer.
        """
        super().__init__()
        added = encoder.region.added_layer(encoder.model)
        trained = set() if added is None else set(map(id, added.parameters()))
        shared = {id(weight): weight for weight in encoder.model.parameters() if id(weight) not in trained}
        model = copy.deepcopy(encoder.model, shared)
        self.matrices = nn.ModuleList()
        for module, name, parts in _weights(encoder.name, model):
            values = SingularValues(getattr(module, name), parts)
            parametrize.register_parametrization(module, name, values, unsafe=True)
            self.matrices.append(values)
        if (layer := encoder.region.added_layer(model)) is not None:
            self.alpha = layer.requires_grad_(True)
        self.encoder = replace(encoder, model=model)  # not an nn.Module, so the state excludes the towers

    def forward(self, images: Tensor) -> Tensor:
        """Encode views (B, S, S, C) uint8 as image features (B, D) on the CPU, each of length one."""
        return self.encoder.image_features(self.encoder.preprocess(images)).cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts as text features (N, D) on the CPU, each of length one, with a gradient."""
        tokens = self.encoder.tokenizer(texts).to(self.encoder.device)  # (N, context)
        return self.encoder.model.encode_text(tokens, normalize=True).cpu()  # pyright: ignore[reportCallIssue]


def block_weights(tower: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield the weights of attention and MLP in every block of a transformer, the first block first.

    A weight is a module, the name of its parameter, and the number of matrices below each other in it. A
    layer belongs to a block if it stands inside a numbered module. This holds for blocks of open_clip, timm
    and Hugging Face, and not for their pooling and projection.
    """
    for path, module in tower.named_modules():
        if not any(part.isdigit() for part in path.split(".")[:-1]):
            continue
        if isinstance(module, nn.MultiheadAttention):
            yield module, "in_proj_weight", 3
        elif isinstance(module, nn.Linear):
            yield module, "weight", 3 if path.endswith(".qkv") else 1


def _weights(name: str, model: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield the weights of both towers. Raises ValueError for a tower without any."""
    # CLIP itself holds the blocks of its text tower; CustomTextCLIP holds them in ``text``.
    text: Any = getattr(model, "text", None) or model.transformer
    for part, tower in (("image encoder", model.visual), ("text tower", text)):
        found = list(block_weights(tower))  # pyright: ignore[reportArgumentType]
        if not found:
            raise ValueError(
                f"{name}: its {part} is {type(tower).__name__}, which has no transformer's blocks, so their "
                "singular values cannot be trained. Take a CLIP such as ViT-B-32, or another method."
            )
        yield from found
